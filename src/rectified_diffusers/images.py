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
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_LUMINANCE = np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
_OVERSHOOT = 1e-2  # of resampling filters, and of half precision
_LAYOUT = "Arrays are (H, W, C) or (B, H, W, C), tensors (C, H, W) or (B, C, H, W), with 1 to 4 channels."
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
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # PIL raises all of these for damaged files
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
    if latent_channels is not None and _is_start(value, latent_channels):
        return value
    if isinstance(value, Image.Image):
        return to_rgb(value) if channels == 3 else to_rgb(value).convert("L")
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
        return to_mask(value)
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


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Convert gray to RGB or RGB to gray, with the luminance of ITU-R 601 as PIL."""
    if pixels.shape[-1] == channels:
        return pixels
    return np.repeat(pixels, 3, axis=-1) if channels == 3 else (pixels @ _LUMINANCE)


def _is_start(value: Any, latent_channels: int) -> bool:
    """Return whether diffusers starts from a tensor as it is: from latents, or from an image in [-1, 1]."""
    if not _is_floating(value):
        return False
    return value.shape[-3] == latent_channels or (
        value.shape[-3] == 3 and -1 <= float(value.min()) < 0 and float(value.max()) <= 1
    )


def _is_ready(value: Any, channels: int) -> bool:
    """Return whether a value is a floating-point tensor of `channels`, all in [0, 1]."""
    has_channels = _is_floating(value) and value.shape[-3] == channels
    return has_channels and float(value.min()) >= 0 and float(value.max()) <= 1


def _is_floating(value: Any) -> bool:
    """Return whether a value is a floating-point tensor `(C, H, W)` or `(B, C, H, W)`."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim in (3, 4)


def _channels_last(name: str, value: Any) -> tuple[np.ndarray, bool]:
    """Return an array or a tensor as `(B, H, W, C)`, and whether it had a batch axis."""
    if not isinstance(value, (np.ndarray, torch.Tensor)):
        raise TypeError(f"{name}: expected an image, got {type(value).__name__}. {_KINDS}")
    shape = tuple(value.shape)
    if isinstance(value, torch.Tensor):
        value = (value.float() if value.is_floating_point() else value).detach().cpu()
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
    image = ImageOps.exif_transpose(image)
    if image.mode in ("La", "RGBa"):
        return image.convert(image.mode.upper())
    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image, dtype=np.float64)
    scale = 1 / 257  # of 16 bit
    if not image.mode.startswith("I;16") and levels.max() <= 255:
        scale = 255 if image.mode == "F" and levels.max() <= 1 else 1
    return Image.fromarray(np.round(levels * scale).clip(0, 255).astype(np.uint8))


def _like(value: Any, pixels: np.ndarray, batched: bool) -> torch.Tensor:
    """Return pixels `(B, H, W, C)` as a tensor with the device, the dtype and the batch axis of `value`."""
    tensor = torch.from_numpy(pixels).movedim(-1, -3).contiguous()
    tensor = tensor.to(value.device, value.dtype) if isinstance(value, torch.Tensor) else tensor
    return tensor if batched else tensor[0]


def batched(images: Any) -> Any:
    """Return a single tensor `(C, H, W)` with a batch axis, whose length pipelines take for the number of images."""
    return images[None] if isinstance(images, torch.Tensor) and images.ndim == 3 else images


def require_finite_images(images: torch.Tensor) -> None:
    """Raise a FloatingPointError if decoded images have NaN or infinite values, which would become black."""
    if not bool(images.isfinite().all()):
        raise FloatingPointError(
            f"Expected finite values in the decoded images, got NaN or infinity in {images.dtype}. Load the pipeline "
            "in float32 or bfloat16; if they stay, its weights are damaged."
        )
