"""The state of a visitor: the current settings and the history of images."""

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from rectified_diffusers.demo.requests import MAX_SEED, PROMPTS, Drawing, Order, Style, cut_prompt
from rectified_diffusers.demo.worker import AnyStudio

LENGTH = 24
THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class Entry:
    """A generated image in the history, with its order without styles, which generates it again."""

    order: Order
    thumbnail: Image.Image

    @property
    def caption(self) -> str:
        steps = "" if self.order.steps == 1 else f", {self.order.steps} steps"
        return f"{self.order.prompt[:60]} · seed {self.order.seed}{steps}"


def remember(entries: Sequence[Entry], order: Order, image: Image.Image) -> list[Entry]:
    """Return the history with an image at the front, replacing one of the same order, with at most LENGTH entries."""
    thumbnail = image.convert("RGB")
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    return [Entry(order, thumbnail), *(entry for entry in entries if entry.order != order)][:LENGTH]


def pack(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the entries as JSON values for the browser to store, about 3 kB each, without style files."""
    packed = []
    for entry in entries:
        file = io.BytesIO()
        entry.thumbnail.save(file, format="PNG")
        order = entry.order
        known = {"prompt": order.prompt, "seed": order.seed, "steps": order.steps, "guidance": order.guidance_scale}
        packed.append({**known, "thumbnail": base64.b64encode(file.getvalue()).decode()})
    return packed


def unpack(packed: Any) -> list[Entry]:
    """Return the entries stored by a browser. They may come from another version or be forged: skip invalid ones."""
    entries = []
    for item in packed[:LENGTH] if isinstance(packed, list) else []:
        try:
            order = Order(item["prompt"], item["seed"], item["steps"], item["guidance"])
            image = Image.open(io.BytesIO(base64.b64decode(item["thumbnail"], validate=True)), formats=["PNG"])
            if max(image.size) > THUMBNAIL:  # checked before its pixels are read
                continue
            entries.append(Entry(order, image.convert("RGB")))
        except (KeyError, TypeError, ValueError, SyntaxError, OSError, Image.DecompressionBombError):
            continue  # base64 and PIL raise all of these
    return entries


SLOTS = 6  # sliders for styles


@dataclass(frozen=True)
class Visit:
    """A visitor's files and images. The settings on the screen are passed with every call.

    Attributes:
        styles: style files, one per slider in use.
        entries: the most recent images, newest first.
        own_seconds: time of the model's last image, to compare with the teacher's.
        shown: order of the model's image on the screen, including styles; None if the caption does not belong to it.
    """

    styles: tuple[Path, ...] = ()
    entries: tuple[Entry, ...] = field(default=(), repr=False)
    own_seconds: float = 0.0
    shown: Order | None = None

    def order(self, prompt: Any, seed: Any, steps: Any, guidance: Any, scales: Sequence[Any]) -> tuple[Order, str]:
        """Return the order for the settings on the screen, and a remark about what is not used."""
        text, remark = cut_prompt(prompt)
        styles: tuple[Style, ...] = tuple(zip(self.styles, scales, strict=False))
        return Order(text, seed, steps, guidance, styles), remark

    def add_style(self, file: str | Path) -> "Visit":
        path = Path(file)
        if path in self.styles:
            return self
        if len(self.styles) >= SLOTS:
            raise ValueError(f"The page has room for {SLOTS} styles; reload it to begin with none of yours.")
        return replace(self, styles=(*self.styles, path))

    def drawn(self, order: Order, drawing: Drawing, *, keep: bool) -> "Visit":
        """Return the visit after an image of the model; with `keep`, the image is added to the history."""
        entries = self.entries
        if keep and drawing.image is not None:
            entries = tuple(remember(entries, replace(order, styles=()), drawing.image))
        return replace(self, entries=entries, own_seconds=drawing.seconds, shown=order)


def unread_remark(studio: AnyStudio, prompt: str) -> str:
    unread = studio.unread(prompt)
    shown = unread if len(unread) <= 40 else f"… {unread[-38:]}"
    return f"The model has no room for the end of this: “{shown}”." if unread else ""


def other_seed() -> int:
    return random.randint(0, MAX_SEED)


def other_prompt(prompt: str) -> str:
    return random.choice([other for other in PROMPTS if other != prompt])
