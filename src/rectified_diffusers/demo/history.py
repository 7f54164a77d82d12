"""The visitor's last pictures: what made each, and a thumbnail. The browser keeps them over a reload."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from rectified_diffusers.demo.orders import Order

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
