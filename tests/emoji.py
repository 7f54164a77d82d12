"""Run the scripts of examples/emoji in small."""

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[1] / "examples" / "emoji"
SIZE = 64  # pixels: canny works in multiples of it
CORNERS = (8, 40)


@contextmanager
def example(script: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """Yield what runs a script with arguments for its namespace; its neighbours' short names are forgotten after."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)

    def run(*arguments: str, name: str = "__main__") -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", [script, *arguments])
        return runpy.run_path(str(FOLDER / script), run_name=name)

    yield run
    for name in {"loop", "teacher", "text", "vae"} & (set(sys.modules) - before):
        del sys.modules[name]


def write_data(folder: Path) -> None:
    """Write what data.py writes: pictures of a dark square in one of four corners, the last two of them held out."""
    folder.mkdir()
    images = torch.full((4, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        row, column = CORNERS[i // 2], CORNERS[i % 2]
        image[:, row : row + 16, column : column + 16] = 0
    rows = [
        {"label": "square", "tags": ["dark"], "style": "flat", "split": split}
        for split in ("train", "train", "caption", "caption")
    ]
    save_file({"images": images}, folder / "images.safetensors")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
