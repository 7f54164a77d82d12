"""Save images as an animation, GIF or MP4. Does not import torch."""

from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from rectified_diffusers.checks import require_type

ANIMATIONS = (".gif", ".mp4")


def check_animation(path: Path) -> None:
    """Raise before any work is done if an animation cannot be written to this path.

    Raises:
        ValueError: the suffix is neither .gif nor .mp4.
        ImportError: an .mp4 needs imageio-ffmpeg, which is missing or has no ffmpeg.
    """
    suffix = path.suffix.lower()
    if suffix not in ANIMATIONS:
        raise ValueError(f"an animation must be a .gif or an .mp4, got {path.name!r}.")
    if suffix == ".mp4":
        _ffmpeg()


def save_animation(images: Sequence[Image.Image], path: str | Path, frames_per_second: float = 15) -> None:
    """Write images of one size as a looping .gif or as an .mp4 (H.264, which needs ffmpeg).

    GIF frame durations are multiples of 1/100 s, so the frame rate of a GIF is rounded to the nearest such duration.
    """
    path = Path(path)
    check_animation(path)
    for image in images:
        require_type("each of images", image, Image.Image, "Pass the images of `interpolate` or of a pipeline.")
    require_type("frames_per_second", frames_per_second, Real, "Pass a number in (0, 50].")
    if not images or len({image.size for image in images}) > 1:
        raise ValueError(f"an animation needs images of one size, got sizes {[image.size for image in images]}.")
    if not 0 < frames_per_second <= 50:
        raise ValueError(f"frames_per_second must be in (0, 50], got {frames_per_second}.")
    frames = [image.convert("RGB") for image in images]
    if path.suffix.lower() == ".gif":
        duration = 10 * round(100 / frames_per_second)
        frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
        return
    # H.264 with chroma subsampling needs even sides. The default of 16 would stretch the image to multiples of 16.
    writer = _ffmpeg().write_frames(
        str(path), frames[0].size, fps=frames_per_second, codec="libx264", macro_block_size=2, ffmpeg_log_level="error"
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def _ffmpeg() -> ModuleType:
    """Import and return imageio_ffmpeg after checking that the ffmpeg program that it bundles can be found."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        install = 'pip install "rectified_diffusers[video]"'
        raise ImportError(f"an .mp4 needs the package imageio-ffmpeg: {install}; or write a .gif.") from error
    return imageio_ffmpeg
