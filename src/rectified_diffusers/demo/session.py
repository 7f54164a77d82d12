"""The state of a visitor: the current settings and the history of images."""

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from rectified_diffusers.demo.requests import MAX_SEED, PROMPTS, Generation, ImageRequest, cut_prompt
from rectified_diffusers.demo.worker import AnyStudio

LENGTH = 24
THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class Entry:
    """A generated image in the history, with its request, without styles."""

    request: ImageRequest
    thumbnail: Image.Image

    @property
    def settings(self) -> tuple[str, int, int, float]:
        request = self.request
        return request.prompt, request.seed, request.steps, request.guidance_scale

    @property
    def caption(self) -> str:
        steps = "" if self.request.steps == 1 else f", {self.request.steps} steps"
        return f"{self.request.prompt[:60]} · seed {self.request.seed}{steps}"


def remember(entries: Sequence[Entry], request: ImageRequest, image: Image.Image) -> list[Entry]:
    """Return the history, at most LENGTH entries, with an image at the front; it replaces one of the same request."""
    thumbnail = image.convert("RGB")
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    return [Entry(request, thumbnail), *(entry for entry in entries if entry.request != request)][:LENGTH]


def pack(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the entries as JSON values for the browser to store, about 3 kB each, without style files."""
    packed = []
    for entry in entries:
        file = io.BytesIO()
        entry.thumbnail.save(file, format="PNG")
        known = dict(zip(("prompt", "seed", "steps", "guidance"), entry.settings, strict=True))
        packed.append({**known, "thumbnail": base64.b64encode(file.getvalue()).decode()})
    return packed


def unpack(packed: Any) -> list[Entry]:
    """Return the entries stored by a browser. They may come from another version or be forged: skip invalid ones."""
    entries = []
    for item in packed[:LENGTH] if isinstance(packed, list) else []:
        try:
            request = ImageRequest(item["prompt"], item["seed"], item["steps"], item["guidance"])
            image = Image.open(io.BytesIO(base64.b64decode(item["thumbnail"], validate=True)), formats=["PNG"])
            if max(image.size) > THUMBNAIL:  # checked before its pixels are read
                continue
            entries.append(Entry(request, image.convert("RGB")))
        except (KeyError, TypeError, ValueError, SyntaxError, OSError, Image.DecompressionBombError):
            continue  # base64 and PIL raise all of these
    return entries


SLOTS = 6  # sliders for styles


@dataclass(frozen=True)
class Session:
    """A visitor's files and images. The settings on the screen are passed with every call.

    Attributes:
        styles: style files, one per slider in use.
        entries: the most recent images, newest first.
        own_seconds: time of the model's last image, to compare with the teacher's.
        shown: request of the model's image on the screen, including styles; None if the caption does not belong to it.
    """

    styles: tuple[Path, ...] = ()
    entries: tuple[Entry, ...] = field(default=(), repr=False)
    own_seconds: float = 0.0
    shown: ImageRequest | None = None

    def request(self, prompt: Any, seed: Any, steps: Any, guidance: Any, *scales: Any) -> tuple[ImageRequest, str]:
        """Return the request for the settings on the screen, and a remark about what is not used."""
        text, remark = cut_prompt(prompt)
        styles = tuple(zip(self.styles, scales, strict=False))
        return ImageRequest(text, seed, steps, guidance, styles), remark

    def add_style(self, file: str | Path) -> "Session":
        path = Path(file)
        if path in self.styles:
            return self
        if len(self.styles) >= SLOTS:
            raise ValueError(f"The page has room for {SLOTS} styles. Reload it to remove yours.")
        return replace(self, styles=(*self.styles, path))

    def with_generation(self, request: ImageRequest, generation: Generation, *, keep: bool) -> "Session":
        """Return the session after an image of the model; with `keep`, the image is added to the history."""
        entries = self.entries
        if keep and generation.image is not None:
            entries = tuple(remember(entries, replace(request, styles=()), generation.image))
        return replace(self, entries=entries, own_seconds=generation.seconds, shown=request)


def unread_remark(studio: AnyStudio, prompt: str) -> str:
    unread = studio.unread(prompt)
    shown = unread if len(unread) <= 40 else f"… {unread[-38:]}"
    return f"The prompt is too long for the model, which ignores its end: “{shown}”." if unread else ""


def other_seed() -> int:
    return random.randint(0, MAX_SEED)


def other_prompt(prompt: str) -> str:
    return random.choice([other for other in PROMPTS if other != prompt])
