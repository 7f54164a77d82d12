"""Requests for images, validated, and their results."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

MAX_CHARACTERS = 2000  # per prompt; CLIP's text encoders read about 300
MAX_STEPS = 50
MAX_FRAMES = 60  # per animation, from one image to the other
MAX_GUIDANCE = 20.0
MIN_STRENGTH = 0.1  # of image-to-image
MAX_SEED = 2**32 - 1  # numbers in a browser are exact up to 2^53
STYLE_SCALES = (-1.0, 2.0)

PROMPTS = (
    "a red apple",
    "grinning face",
    "rocket",
    "tropical fish",
    "birthday cake",
    "a red heart, 3d style",
    "cat face",
    "christmas tree",
    "a pizza",
    "ghost",
    "mushroom",
    "umbrella",
    "soccer ball",
    "dog face, flat style",
    "sun",
    "house with garden",
)
"""Prompts that "Surprise me" chooses from: captions that the bundled model was trained on and other models know."""

Style = tuple[Path, float]
"""A LoRA or weight delta, and its scale."""


@dataclass(frozen=True)
class ImageRequest:
    """A request for one image; the values are checked, because they come from a browser."""

    prompt: str
    seed: int = 0
    steps: int = 1
    guidance_scale: float = 1.0
    styles: tuple[Style, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError("The prompt is empty. Describe an image.")
        if len(self.prompt) > MAX_CHARACTERS:
            raise ValueError(f"A prompt has at most {MAX_CHARACTERS} characters, got {len(self.prompt)}. Shorten it.")
        _check_number("seed", self.seed, 0, MAX_SEED, whole=True)
        _check_number("steps", self.steps, 1, MAX_STEPS, whole=True)
        _check_number("guidance scale", self.guidance_scale, 0, MAX_GUIDANCE)
        for _, scale in self.styles:
            _check_number("scale of a style", scale, *STYLE_SCALES)

    def describe(self) -> str:
        """Return the settings of the image as JSON, which is stored in the PNG file."""
        styles = {path.name: scale for path, scale in self.styles if scale}
        return json.dumps({**vars(self), "styles": styles}, ensure_ascii=False)


def cut_prompt(text: Any) -> tuple[str, str]:
    """Return the part of a text that is used, and a remark if the text is truncated."""
    if not isinstance(text, str):
        raise TypeError(f"A prompt is a text, got {type(text).__name__}.")
    if len(text) <= MAX_CHARACTERS:
        return text, ""
    return text[:MAX_CHARACTERS], f"Only the first {MAX_CHARACTERS:,} of {len(text):,} characters are read."


def check_frames(frames: Any) -> None:
    _check_number("number of frames", frames, 1, MAX_FRAMES, whole=True)


def check_strength(strength: Any) -> None:
    _check_number("strength", strength, MIN_STRENGTH, 1)


def _check_number(name: str, value: Any, least: float, most: float, *, whole: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most or (whole and not isinstance(value, int)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"The {name} is {kind} from {least:g} to {most:g}, got {value!r}.")


OWN_STEPS = 8  # steps of the model itself when it replaces a missing teacher


@dataclass(frozen=True)
class Generation:
    """A generated image, or the progress toward it while `step` is below `steps`.

    Attributes:
        image: the image or a preview; None during generation if no preview is due.
        seconds: time since the prompt, excluding previews.
    """

    image: Image.Image | None
    seconds: float
    step: int
    steps: int

    @property
    def done(self) -> bool:
        return self.step == self.steps


@dataclass(frozen=True)
class Comparison:
    """Name and generation settings of the comparison shown next to the model."""

    name: str
    steps: int
    guidance_scale: float
    remark: str = ""


def comparison_with(teacher: bool, steps: int, guidance_scale: float) -> Comparison:
    """Return the comparison for the model: its teacher, or the model itself with OWN_STEPS steps."""
    if teacher:
        return Comparison("Teacher", steps, guidance_scale)
    remark = "The image on the right is from the same model, with more steps."
    return Comparison("The same model", OWN_STEPS, 1.0, remark)
