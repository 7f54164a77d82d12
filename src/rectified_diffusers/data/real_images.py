"""Read real images with captions, and select the images that an evaluation compares with.

A folder has one of two formats: images with a `metadata.jsonl` (the imagefolder format of datasets on the Hub, with
`file_name` and `text` on each line, optionally `split`, `style` and `tags`), or the output of examples/emoji/data.py
(`images.safetensors` and `rows.jsonl`).
"""

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.checks import require_count, require_unicode
from rectified_diffusers.digests import hash_file
from rectified_diffusers.images import open_square
from rectified_diffusers.lines import read_lines, read_object


@dataclass(frozen=True)
class RealPictures:
    """Indexed images with their captions, splits and styles, which are empty strings where the data has none.

    Attributes:
        read: maps indices to images `(B, 3, H, W)` uint8.
        identity: a digest of the data. Metrics are compared only if it is the same.
        tags: further words of each image that captions may be made of; empty if the data has none.
    """

    captions: list[str]
    splits: list[str]
    styles: list[str]
    identity: str
    read: Callable[[Sequence[int]], Tensor]
    tags: list[list[str]] = field(default_factory=list)

    def words(self, split: str) -> set[str]:
        """Return the words, in lower case, of all captions and tags of a split."""
        texts = [self.captions[number] for number in self.numbers(split)]
        texts += [tag for number in self.numbers(split) if self.tags for tag in self.tags[number]]
        return {word for text in texts for word in words_of(text)}

    def numbers(self, split: str) -> list[int]:
        """Return the indices of the images of a split."""
        return [i for i, own in enumerate(self.splits) if own == split]


@dataclass(frozen=True)
class Choice:
    """Prompts to generate images for, and two equally large sets of real images.

    Generated images are compared with `reference`. The distance between `reference` and `floor` is the floor of the
    metric. If `paired`, image i of both sets shows caption i.
    """

    prompts: list[str]
    reference: list[int]
    floor: list[int]
    paired: bool


def words_of(text: str) -> set[str]:
    """Return the words of a text, in lower case and without punctuation."""
    return set(re.findall(r"\w+", text.lower()))


def read_pictures(folder: str | Path, size: int, split: str = "train") -> RealPictures:
    """Open a folder of captioned images, which are read on demand.

    Args:
        size: side in pixels of the images of an imagefolder. The shorter side is resized to it (Lanczos), the longer
            side is center-cropped.
        split: split of the images that do not name one.
    """
    folder = Path(folder)
    require_count("size", size)
    if (folder / "rows.jsonl").is_file() and (folder / "images.safetensors").is_file():
        return _read_tensor(folder, split)
    if (folder / "metadata.jsonl").is_file():
        return _read_imagefolder(folder, size, split)
    raise FileNotFoundError(
        f"no captioned images in {folder}: expected a metadata.jsonl with file_name and text on each line next to the "
        "images, or the output of examples/emoji/data.py."
    )


def choose(pictures: RealPictures, split: str, count: int | None, seed: int) -> Choice:
    """Sample captions of a split and their real images: two images per caption if there are enough such pairs.

    Distinct captions come first, then the same captions with other images. If captions have one image each, as in
    COCO, the images are divided at random. The floor then has other captions, which is common practice.

    Args:
        count: number of captions; None for as many as available.
    """
    numbers = pictures.numbers(split)
    draw = random.Random(f"{seed}/{split}")
    by_caption: dict[str, list[int]] = defaultdict(list)
    for number in numbers:
        by_caption[pictures.captions[number]].append(number)
    pairs = []  # (round, random order, two images)
    for _, own in sorted(by_caption.items()):
        order = draw.random()
        draw.shuffle(own)
        pairs += [(i, order, own[i : i + 2]) for i in range(0, len(own) - 1, 2)]
    paired = len(pairs) >= (count or 2)
    if paired:
        chosen = [both for *_, both in sorted(pairs)[:count]]
        reference, floor = [both[0] for both in chosen], [both[1] for both in chosen]
    else:
        draw.shuffle(numbers)
        half = len(numbers) // 2 if count is None else count
        reference, floor = numbers[:half], numbers[half : 2 * half]
    if len(floor) < max(2, count or 2):
        most = len(numbers) // 2
        lower = f"Lower num_pictures, or num_held_out for the held-out split, to {most} at most."
        raise ValueError(
            f"{count or 2} images of split {split!r} need as many other real images for the floor, and there are "
            f"{len(numbers)} in total. {lower if most >= 2 else 'Add images, at least 4 are needed.'}"
        )
    return Choice([pictures.captions[number] for number in reference], reference, floor, paired)


def _read_tensor(folder: Path, split: str) -> RealPictures:
    from safetensors import safe_open

    path = folder / "images.safetensors"
    rows = _rows(folder / "rows.jsonl", ("label",))
    file: Any = safe_open(path, framework="pt")
    images = file.get_slice("images")
    if images.get_shape()[0] != len(rows):
        raise ValueError(f"{path} has {images.get_shape()[0]} images, rows.jsonl {len(rows)} lines: make it again.")
    digest = hashlib.blake2b((folder / "rows.jsonl").read_bytes(), digest_size=16)
    digest.update(_content(path))
    return _pictures(rows, "label", split, digest, lambda number: images[number])


def _read_imagefolder(folder: Path, size: int, split: str) -> RealPictures:
    rows = _rows(folder / "metadata.jsonl", ("file_name", "text"))
    paths = [folder / row["file_name"] for row in rows]
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    for row, path in zip(rows, paths, strict=True):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"metadata.jsonl: expected a file_name in {folder}, got {row['file_name']!r}. Move the file."
            )
        if not path.is_file():
            raise FileNotFoundError(f"metadata.jsonl names {row['file_name']!r}, which is not in {folder}.")
        digest.update(json.dumps(row, sort_keys=True).encode() + _content(path))
    return _pictures(rows, "text", split, digest, lambda number: open_square(paths[number], size))


def _pictures(
    rows: list[dict[str, Any]], key: str, split: str, digest: Any, read: Callable[[int], Tensor]
) -> RealPictures:
    return RealPictures(
        [row[key] for row in rows],
        [row.get("split", split) for row in rows],
        [row.get("style", "") for row in rows],
        digest.hexdigest(),
        lambda numbers: torch.stack([read(number) for number in numbers]),
        [_tags(row) for row in rows],
    )


def _tags(row: dict[str, Any]) -> list[str]:
    tags = row.get("tags", [])
    return [str(tag) for tag in tags] if isinstance(tags, list) else [str(tags)]


def _content(path: Path) -> bytes:
    return hash_file(path, hashlib.blake2b(digest_size=16)).digest()


def _rows(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for _, number, line in read_lines(path):
        rows.append(read_object(path, number, line, *keys))
        require_unicode(f"{path}, line {number}", [rows[-1][key] for key in keys])
    if not rows:
        raise ValueError(f"{path} holds no line. Write one per image.")
    return rows
