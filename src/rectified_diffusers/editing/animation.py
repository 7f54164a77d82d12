"""Pictures as an animation, a GIF or an MP4. Free of torch."""

from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from rectified_diffusers.checks import require_type

ANIMATIONS = (".gif", ".mp4")


def check_animation(path: Path) -> None:
    """Find out before the work whether an animation can be written under this name."""
    suffix = path.suffix.lower()
    if suffix not in ANIMATIONS:
        raise ValueError(f"an animation is a .gif or an .mp4, got {path.name!r}.")
    if suffix == ".mp4":
        _ffmpeg()


def save_animation(images: Sequence[Image.Image], path: str | Path, frames_per_second: float = 15) -> None:
    """Write pictures of one size as an animation that repeats, .gif, or as an .mp4 (H.264, which needs ffmpeg).

    A GIF counts time in hundredths of a second, so that its speed is the nearest that has a whole number of them.
    """
    path = Path(path)
    check_animation(path)
    for image in images:
        require_type("each of images", image, Image.Image, "Give what `interpolate` or a pipeline made.")
    require_type("frames_per_second", frames_per_second, Real, "Give a number in (0, 50].")
    if not images or len({image.size for image in images}) > 1:
        raise ValueError(f"an animation needs pictures of one size, got sizes {[image.size for image in images]}.")
    if not 0 < frames_per_second <= 50:
        raise ValueError(f"frames_per_second must be in (0, 50], got {frames_per_second}.")
    frames = [image.convert("RGB") for image in images]
    if path.suffix.lower() == ".gif":
        duration = 10 * round(100 / frames_per_second)
        frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
        return
    # Even sides are what H.264 with halved colours needs; the default of 16 would stretch the picture to it.
    writer = _ffmpeg().write_frames(
        str(path), frames[0].size, fps=frames_per_second, codec="libx264", macro_block_size=2, ffmpeg_log_level="error"
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def _ffmpeg() -> ModuleType:
    """Import imageio_ffmpeg, which brings a program ffmpeg along, and find that program."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            "an .mp4 needs the package imageio-ffmpeg, which brings ffmpeg along: "
            'pip install "rectified_diffusers[video]"; or write a .gif.'
        ) from error
    return imageio_ffmpeg
