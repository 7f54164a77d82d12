"""Pictures from the decoder's output: scaled, rounded and turned into bytes on the device that drew them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rectified_diffusers.speed.replacing import replaced


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Turn `(B, 3, H, W)` in [-1, 1] into pictures; in float32 the bytes are those of diffusers' image processor."""
    levels = ((images.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


@contextmanager
def pictures_on_device(pipeline: Any) -> Iterator[None]:
    """Send bytes, not floats, from the device to the pictures: a quarter of the data, and no arithmetic in numpy."""
    processor = pipeline.image_processor
    stock = processor.postprocess

    def postprocess(
        image: Any, output_type: str = "pil", do_denormalize: Sequence[bool] | None = None, **kwargs: Any
    ) -> Any:
        scales = processor.config.do_normalize if do_denormalize is None else all(do_denormalize)
        colours = isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == 3
        if output_type == "pil" and scales and colours and not kwargs:
            return to_pictures(image)
        return stock(image, output_type, do_denormalize, **kwargs)

    with replaced(processor, "postprocess", postprocess):
        yield
