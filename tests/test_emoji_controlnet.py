"""examples/emoji/controlnet.py in small: what it trains is a ControlNet whose edges the one step sees."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from rectified_diffusers import RectifiedFlowControlNetPipeline, RectifiedFlowPipeline
from tests import emoji
from tests.emoji import SIZE, write_data
from tests.tiny import make_components, make_unet, sample

pytest.importorskip("controlnet_aux")


@pytest.fixture
def example(monkeypatch) -> Iterator[Any]:
    with emoji.example("controlnet.py", monkeypatch) as run:
        yield run


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
