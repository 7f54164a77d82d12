"""Read image files, and convert whatever holds an image or a mask into what diffusers' pipelines read correctly.

| input | levels |
|---|---|
| PIL image of any mode | its own; 16 and 32 bit are scaled to 8, not cut |
| uint8, int16 to int64 array or tensor | 0 to 255, or 0 to 65535 if a value exceeds 255 |
| floating-point array or tensor | 0 to 1; -1 to 1 if a value is negative; 0 to 255 if a value exceeds 2 |
| bool array or tensor | 0 and 1 |

Arrays are `(H, W)`, `(H, W, C)` or `(B, H, W, C)`, tensors `(H, W)`, `(C, H, W)` or `(B, C, H, W)`, with C = 1 (gray),
2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha). Transparency is composited on white, so hidden colors never show. The EXIF
orientation is applied. Integers become PIL images, which are exact; floating-point values keep their precision.
Floating-point tensors of four channels are latents, unless all values are in [0, 1], which no latents are.
"""

import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_LUMINANCE = np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
_OVERSHOOT = 1e-2  # of resampling filters, and of half precision
_LAYOUT = "Arrays are (H, W, C) or (B, H, W, C), tensors (C, H, W) or (B, C, H, W), with 1 to 4 channels."
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, struct.error)  # of PIL, for damaged files
_KINDS = "Pass a PIL image, a NumPy array, a tensor, or a list of them."


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, with its orientation applied and its transparency on white.

    Raises:
        ValueError: the file is not an image, is damaged, or has more pixels than PIL accepts.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path}: expected at most {Image.MAX_IMAGE_PIXELS} pixels. Resize the image. ({error})"
        ) from None
    except FileNotFoundError:
        raise
    except _DAMAGED as error:
        raise ValueError(f"{path} is not a readable image ({error}). Save it again as PNG or JPEG.") from None


def open_square(path: str | Path, size: int) -> torch.Tensor:
    """Read an image file as a tensor `(3, size, size)` uint8: resized (Lanczos) and center-cropped."""
    square = ImageOps.fit(open_image(path), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a PIL image of any mode as RGB."""
    image = _upright(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def to_mask(image: Image.Image) -> Image.Image:
    """Return a PIL image of any mode as a mask in mode L, white where the image is to be repainted.

    The mask is the alpha channel if that varies, otherwise the luminance.
    """
    image = _upright(image)
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        low, high = alpha.getextrema()
        if low != high or high == 0:
            return alpha
    return image.convert("RGB").convert("L")


def as_images(name: str, value: Any, channels: int = 3, latent_channels: int | None = None) -> Any:
    """Return images, or nested lists of them, as PIL images or tensors that diffusers reads correctly.

    Args:
        name: of the argument, for errors.
        channels: 3 for RGB, 1 for gray.
        latent_channels: given for an image to start from, which can be latents with this number of channels, or an
            image in [-1, 1]; such floating-point tensors are returned unchanged.

    Raises:
        TypeError: a value is not an image.
        ValueError: its shape or its values are not those of an image.
    """
    if isinstance(value, (list, tuple)):
        return [as_images(name, item, channels, latent_channels) for item in value]
    if isinstance(value, Image.Image):
        image = _converted(name, to_rgb, value)
        return image if channels == 3 else image.convert("L")
    value = _plain(name, value)
    if latent_channels is not None and _is_start(value, latent_channels):
        return value
    if _is_ready(value, channels):
        return value
    pixels, batched = _channels_last(name, value)
    if pixels.dtype.kind != "f":
        images = [as_images(name, _to_pil(name, item), channels) for item in pixels]
        return images if batched else images[0]
    pixels = _unit_range(name, pixels)
    if pixels.shape[-1] in (2, 4):
        alpha = pixels[..., -1:]
        pixels = pixels[..., :-1] * alpha + (1 - alpha)
    return _like(value, _with_channels(pixels, channels), batched)


def as_masks(name: str, value: Any) -> Any:
    """Return masks, or lists of them, as PIL images in mode L or tensors in [0, 1].

    Integers and bools become PIL images; integers up to 1 are read as bools. As in diffusers, a tensor of three
    dimensions is `(B, H, W)`. The errors are those of `as_images`.
    """
    if isinstance(value, (list, tuple)):
        return [as_masks(name, item) for item in value]
    if isinstance(value, Image.Image):
        return _converted(name, to_mask, value)
    value = _plain(name, value)
    if getattr(value, "ndim", 0) == 3 and (isinstance(value, torch.Tensor) or value.shape[-1] not in _MODES):
        value = value[:, None] if isinstance(value, torch.Tensor) else value[..., None]
    pixels, batched = _channels_last(name, value)
    if pixels.dtype.kind != "f":
        pixels = pixels.astype(np.int64) * 255 if pixels.max() <= 1 else pixels
        masks = [to_mask(_to_pil(name, item)) for item in pixels]
        return masks if batched else masks[0]
    pixels = _unit_range(name, pixels)
    alpha = pixels[..., -1:]
    if pixels.shape[-1] in (2, 4):
        pixels = alpha if np.ptp(alpha) > 0 or alpha.max() == 0 else pixels[..., :-1]
    return _like(value, _with_channels(pixels, 1), batched)


def _converted(name: str, convert: Callable[[Image.Image], Image.Image], image: Image.Image) -> Image.Image:
    """Convert a PIL image, which may be read from its file only now."""
    if 0 in image.size:
        raise ValueError(f"{name}: expected an image, got one of {image.width} x {image.height} pixels.")
    try:
        return convert(image)
    except _DAMAGED as error:
        raise ValueError(f"{name}: the image cannot be read ({error}). Save it again as PNG or JPEG.") from error


def _plain(name: str, value: Any) -> Any:
    """Return an array or a tensor without gradient; raise a TypeError if it does not hold real numbers."""
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.layout != torch.strided or value.is_complex():
            raise TypeError(f"{name}: expected a dense tensor of real numbers, got {value.dtype} on {value.device}.")
        return value.detach() if value.requires_grad else value
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected an image, got {type(value).__name__}. {_KINDS}")
    if value.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected an array of real numbers, got {value.dtype}. {_KINDS}")
    return np.asarray(value)


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Convert gray to RGB or RGB to gray, with the luminance of ITU-R 601 as PIL."""
    if pixels.shape[-1] == channels:
        return pixels
    return np.repeat(pixels, 3, axis=-1) if channels == 3 else (pixels @ _LUMINANCE)


def _is_start(value: Any, latent_channels: int) -> bool:
    """Return whether diffusers starts from a tensor as it is: from latents, or from an image in [-1, 1]."""
    if not _is_floating(value):
        return False
    channels = value.shape[-3]
    low, high = (float(value.min()), float(value.max())) if value.numel() else (0.0, 0.0)
    if channels == latent_channels:
        return not 0 <= low < high <= 1  # those are RGB and alpha
    return channels == 3 and -1 <= low < 0 and high <= 1


def _is_ready(value: Any, channels: int) -> bool:
    """Return whether a value is a floating-point tensor of `channels`, all in [0, 1]."""
    has_channels = _is_floating(value) and value.shape[-3] == channels and value.numel() > 0
    return has_channels and float(value.min()) >= 0 and float(value.max()) <= 1


def _is_floating(value: Any) -> bool:
    """Return whether a value is a floating-point tensor `(C, H, W)` or `(B, C, H, W)`."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim in (3, 4)


def _channels_last(name: str, value: Any) -> tuple[np.ndarray, bool]:
    """Return an array or a tensor as `(B, H, W, C)`, and whether it had a batch axis."""
    shape = tuple(value.shape)
    if isinstance(value, torch.Tensor):
        value = (value.float() if value.is_floating_point() else value).cpu()
        value = (value.movedim(-3, -1) if value.ndim > 2 else value).numpy()
    value = value[..., None] if value.ndim == 2 else value
    batched = value.ndim == 4
    if value.ndim not in (3, 4) or value.shape[-1] not in _MODES or 0 in shape:
        raise ValueError(f"{name}: expected the shape of an image, got {shape}. {_LAYOUT}")
    return value if batched else value[None], batched


def _unit_range(name: str, pixels: np.ndarray) -> np.ndarray:
    """Return floating-point levels as float32 in [0, 1]."""
    pixels = pixels.astype(np.float32)
    low, high = float(pixels.min()), float(pixels.max())
    if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        return pixels.clip(0, 1)
    if -1 - _OVERSHOOT <= low < 0 and high <= 1 + _OVERSHOOT:
        return ((pixels + 1) / 2).clip(0, 1)
    if low >= 0 and 2 < high <= 255:
        return pixels / 255
    raise ValueError(
        f"{name}: expected floating-point levels in [0, 1], [-1, 1] or [0, 255], got {low:g} to {high:g}. "
        "Scale them to [0, 1]."
    )


def _to_pil(name: str, pixels: np.ndarray) -> Image.Image:
    """Return bools or integer levels `(H, W, C)` as a PIL image of 8 bits a channel."""
    pixels = pixels * np.uint8(255) if pixels.dtype == bool else pixels
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"{name}: expected integer levels in [0, 255] or [0, 65535], got {low} to {high}. Scale them."
        )
    levels = (np.round(pixels / 257) if high > 255 else pixels).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def _upright(image: Image.Image) -> Image.Image:
    """Return an image in its EXIF orientation, with 8 bits a channel and alpha that is not premultiplied."""
    image.load()
    with suppress(*_DAMAGED):  # of the EXIF data; the image has been read
        image = ImageOps.exif_transpose(image)
    if image.mode in ("La", "RGBa"):
        return image.convert(image.mode.upper())
    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image, dtype=np.float64)
    low, high = float(levels.min()), float(levels.max())
    if not 0 <= low <= high <= 65535:
        raise ValueError(f"expected levels from 0 to 255 or 65535, got {low:g} to {high:g} in mode {image.mode}")
    scale = 1 / 257  # of 16 bit
    if not image.mode.startswith("I;16") and high <= 255:
        scale = 255 if image.mode == "F" and high <= 1 else 1
    gray = Image.fromarray(np.round(levels * scale).astype(np.uint8))
    transparent = image.info.get("transparency")  # the level, in PNG files
    if transparent is None:
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8))))


def _like(value: Any, pixels: np.ndarray, batched: bool) -> torch.Tensor:
    """Return pixels `(B, H, W, C)` as a tensor with the device, the dtype and the batch axis of `value`."""
    tensor = torch.from_numpy(pixels).movedim(-1, -3).contiguous()
    tensor = tensor.to(value.device, value.dtype) if isinstance(value, torch.Tensor) else tensor
    return tensor if batched else tensor[0]


def batched(name: str, images: Any) -> Any:
    """Return the images of `as_images` or `as_masks` as pipelines count them: PIL images, or one tensor (B, C, H, W).

    Lists of both become a tensor in [0, 1].
    """
    if isinstance(images, Image.Image):
        return images
    if isinstance(images, torch.Tensor):
        return images[None] if images.ndim == 3 else images
    items = list(_flat(images))
    if not items:
        raise ValueError(f"{name}: expected an image, got an empty list.")
    if isinstance(items[0], Image.Image) and all(isinstance(item, Image.Image) for item in items):
        return items
    kinds = {isinstance(item, torch.Tensor) and float(item.min()) < 0 for item in items}
    tensors = [_to_unit(item) if len(kinds) > 1 or isinstance(item, Image.Image) else item for item in items]
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise ValueError(f"{name}: expected images of one size, got {' and '.join(map(str, shapes))}. Resize them.")
    return torch.stack([tensor.to(tensors[-1].device) for tensor in tensors])


def _flat(images: Any) -> Iterator[Any]:
    """Yield the PIL images and the tensors (C, H, W) of nested lists and batches."""
    if isinstance(images, Image.Image) or (isinstance(images, torch.Tensor) and images.ndim == 3):
        yield images
    else:
        for image in images:
            yield from _flat(image)


def _to_unit(image: Any) -> torch.Tensor:
    """Return a PIL image or a tensor in [-1, 1] as a tensor in [0, 1]."""
    if isinstance(image, torch.Tensor):
        return (image + 1) / 2 if float(image.min()) < 0 else image
    return torch.from_numpy(np.atleast_3d(np.asarray(image)) / np.float32(255)).movedim(-1, 0)


def as_pil(images: Any) -> Any:
    """Return a batch of one image as a PIL image, which diffusers needs to crop it; a larger one is unchanged."""
    if not isinstance(images, (list, torch.Tensor)) or len(images) != 1:
        return images
    image = images[0]
    if isinstance(image, Image.Image) or len(image) not in (1, 3):
        return image
    levels = (_to_unit(image).float() * 255).round().byte().movedim(0, -1).cpu().numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def require_size(name: str, images: Any, smallest: int) -> None:
    """Raise a ValueError if images, which are not latents, have fewer pixels in a direction than a VAE needs."""
    for image in images if isinstance(images, list) else [images]:
        size = image.size if isinstance(image, Image.Image) else tuple(image.shape[:-3:-1])
        if min(size) < smallest:
            raise ValueError(f"{name}: expected at least {smallest} x {smallest} pixels, got {size[0]} x {size[1]}.")


def require_finite_images(images: torch.Tensor) -> None:
    """Raise a FloatingPointError if decoded images have NaN or infinite values, which would become black."""
    if not bool(images.isfinite().all()):
        raise FloatingPointError(
            f"Expected finite values in the decoded images, got NaN or infinity in {images.dtype}. Load the pipeline "
            "in float32 or bfloat16; if they stay, its weights are damaged."
        )
