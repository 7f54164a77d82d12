"""What a visitor has done: the current settings and the history of images."""

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
    """A picture that was drawn; its order, without styles, draws it again."""

    order: Order
    thumbnail: Image.Image

    @property
    def caption(self) -> str:
        steps = "" if self.order.steps == 1 else f", {self.order.steps} steps"
        return f"{self.order.prompt[:60]} · seed {self.order.seed}{steps}"


def remember(entries: Sequence[Entry], order: Order, image: Image.Image) -> list[Entry]:
    """Put a picture in front; one of the same order moves there, and the oldest goes beyond LENGTH."""
    thumbnail = image.convert("RGB")
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    return [Entry(order, thumbnail), *(entry for entry in entries if entry.order != order)][:LENGTH]


def pack(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Give the entries as JSON, about 3 kB each, for the browser to keep. Files of styles are not part of them."""
    packed = []
    for entry in entries:
        file = io.BytesIO()
        entry.thumbnail.save(file, format="PNG")
        order = entry.order
        known = {"prompt": order.prompt, "seed": order.seed, "steps": order.steps, "guidance": order.guidance_scale}
        packed.append({**known, "thumbnail": base64.b64encode(file.getvalue()).decode()})
    return packed


def unpack(packed: Any) -> list[Entry]:
    """Read what a browser kept. It may be of another version or made up: what cannot be read is left out."""
    entries = []
    for item in packed[:LENGTH] if isinstance(packed, list) else []:
        try:
            order = Order(item["prompt"], item["seed"], item["steps"], item["guidance"])
            image = Image.open(io.BytesIO(base64.b64decode(item["thumbnail"], validate=True)), formats=["PNG"])
            if max(image.size) > THUMBNAIL:  # before its pixels are read
                continue
            entries.append(Entry(order, image.convert("RGB")))
        except (KeyError, TypeError, ValueError, SyntaxError, OSError, Image.DecompressionBombError):
            continue  # base64 and PIL raise all of these
    return entries


SLOTS = 6  # sliders for styles


@dataclass(frozen=True)
class Visit:
    """A visitor's files and pictures; what is on the screen comes with every call.

    Attributes:
        styles: one per slider in use.
        entries: the last pictures, newest first.
        own_seconds: of the model's last picture, to compare the teacher's with.
        shown: what the model's picture on the screen is of, styles and all; None if its caption is not of it.
    """

    styles: tuple[Path, ...] = ()
    entries: tuple[Entry, ...] = field(default=(), repr=False)
    own_seconds: float = 0.0
    shown: Order | None = None

    def order(self, prompt: Any, seed: Any, steps: Any, guidance: Any, scales: Sequence[Any]) -> tuple[Order, str]:
        """Read the screen; the second is a remark about what of it is not used."""
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
        """Note a picture of the model; `keep` puts it into the history."""
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
