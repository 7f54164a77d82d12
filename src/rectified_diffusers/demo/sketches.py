"""Convert what a browser sends, sketches and photos, to input images. Does not import torch."""

import base64
import io
import json
import math
from contextlib import suppress
from typing import Any

from PIL import Image, ImageDraw, ImageOps

MAX_POINTS = 50_000  # in all lines together
PHOTO_SIDE = 1024  # pixels, of a photo as the browser sends it
PHOTO_PREFIX = "data:image/jpeg;base64,"
WIDTH = 1 / 170  # line width relative to the image: 1 pixel at 64, 3 at 512, the width of Canny edges


def lines_of(sketch: Any, size: tuple[int, int]) -> Image.Image | None:
    """Return an image with the lines of a sketch, white on black, as an edge ControlNet expects.

    Args:
        sketch: JSON of lines, each a list of points (x, y) in [0, 1]^2 from the upper left corner; or nothing.
        size: width and height of the image.

    Returns:
        RGB image, each pixel 0 or 255; None if the sketch is empty.
    """
    lines: Any = None
    with suppress(ValueError, RecursionError):  # RecursionError: deeply nested brackets
        lines = json.loads(sketch) if isinstance(sketch, str) and sketch else []
    if not _are_lines(lines):
        raise ValueError(f"A sketch is a list of lines of points in [0, 1]^2, {MAX_POINTS:,} at most. Clear it.")
    if not any(lines):
        return None
    image = Image.new("L", size, 0)
    pen = ImageDraw.Draw(image)
    width = max(1, round(min(size) * WIDTH))
    for line in lines:
        points = [(x * (size[0] - 1), y * (size[1] - 1)) for x, y in line]
        pen.line(points if len(points) > 1 else points * 2, fill=255, width=width, joint="curve")
    return image.convert("RGB")


def photo_of(photo: Any, size: tuple[int, int]) -> Image.Image:
    """Return a photo as an RGB image, cropped at the center to a size.

    Args:
        photo: a JPEG as a data URL, at most PHOTO_SIDE pixels wide and high.
        size: width and height of the image.
    """
    try:
        if not isinstance(photo, str) or not photo.startswith(PHOTO_PREFIX):
            raise ValueError("not a data URL")
        data = base64.b64decode(photo.removeprefix(PHOTO_PREFIX), validate=True)
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        if max(image.size) > PHOTO_SIDE:  # checked before its pixels are read
            raise ValueError("too large")
        return ImageOps.fit(image.convert("RGB"), size)
    except (ValueError, SyntaxError, OSError, Image.DecompressionBombError) as error:  # PIL raises all of these
        raise ValueError(f"A photo is a JPEG of at most {PHOTO_SIDE} pixels a side. Choose another.") from error


def _are_lines(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(line, list) for line in value):
        return False
    if sum(len(line) for line in value) + len(value) > MAX_POINTS:
        return False
    points = [point for line in value for point in line]
    if not all(isinstance(point, list) and len(point) == 2 for point in points):
        return False
    return all(isinstance(x, (int, float)) and math.isfinite(x) and 0 <= x <= 1 for point in points for x in point)
