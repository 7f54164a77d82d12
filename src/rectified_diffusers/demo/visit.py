"""What one visitor's page holds, and what its buttons do to it: functions of values, without gradio."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rectified_diffusers.demo.answers import Drawing
from rectified_diffusers.demo.history import Entry, remember
from rectified_diffusers.demo.orders import MAX_SEED, PROMPTS, Order, Style, cut_prompt
from rectified_diffusers.demo.waiting import AnyStudio

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
