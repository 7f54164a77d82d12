"""examples/emoji/controlnet.py in small: what it trains is a ControlNet whose edges the one step sees."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file

from rectified_diffusers import RectifiedFlowControlNetPipeline, RectifiedFlowPipeline
from tests.tiny import make_components, make_unet, sample

pytest.importorskip("controlnet_aux")

EXAMPLE = Path(__file__).parents[1] / "examples" / "emoji" / "controlnet.py"
SIZE = 64  # pixels: canny works in multiples of it
CORNERS = (8, 40)


@pytest.fixture
def example(monkeypatch) -> Iterator[Any]:
    """Run the example with arguments and give its namespace; its neighbours' short names are forgotten after."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    before = set(sys.modules)

    def run(*arguments: str, name: str = "__main__") -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", [EXAMPLE.name, *arguments])
        return runpy.run_path(str(EXAMPLE), run_name=name)

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


def test_what_it_trains_draws_along_edges(example, tmp_path, capsys):
    model, data, output = (tmp_path / name for name in ("model", "data", "controlnet"))
    components = {**make_components(), "unet": make_unet(sample_size=SIZE // 4)}
    pipeline = RectifiedFlowPipeline(**components, scheduler=None)
    pipeline.save_pretrained(model)
    write_data(data)
    arguments = ["--model", str(model), "--data", str(data), "--output", str(output), "--mixed-precision", "no"]
    arguments += ["--batch-size", "2", "--learning-rate", "1e-2", "--ema-decay", "0", "--warmup-steps", "0"]
    parts = example(*arguments, "--max-steps", "2", "--decay-steps", "0")
    assert Image.open(output / "samples.png").size == (2 * 128, 3 * 128)  # edges, along them, without them
    assert "agreement with the given edges (F1): " in capsys.readouterr().out

    controlnet = ControlNetModel.from_pretrained(output)
    edges = parts["find_edges"](parts["load_file"](data / "images.safetensors")["images"].numpy())[2:]
    steered_by = RectifiedFlowControlNetPipeline.from_pipe(pipeline, controlnet=controlnet)
    left, right = (sample(steered_by, image=edge[None], num_inference_steps=1) for edge in edges)
    without = sample(pipeline, num_inference_steps=1)
    assert not torch.equal(left, right)
    assert not torch.equal(left, without)

    example(*arguments, "--max-steps", "3", "--decay-steps", "0")  # goes on from the second step
    assert [file.name for file in sorted(output.glob("checkpoints/*"))] == ["2.safetensors", "3.safetensors"]


def test_agreement_of_edges_forgives_one_pixel(example):
    edge_agreement = example(name="example")["edge_agreement"]
    given = torch.zeros(1, 3, SIZE, SIZE)
    given[:, :, 20:40, 30] = 1
    assert edge_agreement(given, given) == pytest.approx(1)
    assert edge_agreement(given, given.roll(1, -1)) == pytest.approx(1)
    assert edge_agreement(given, given.roll(2, -1)) == 0
    half = given.clone()
    half[:, :, 30:] = 0  # all that is found is right; of the 20 given pixels, 11 are found or have one beside them
    assert edge_agreement(given, half) == pytest.approx(2 * (11 / 20) / (1 + 11 / 20))
