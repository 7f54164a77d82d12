"""examples/emoji/average.py: the shares of each model, and what it refuses."""

import json

import pytest
import torch

from rectified_diffusers import RectifiedFlowPipeline
from tests import emoji
from tests.tiny import make_tiny_pipeline


def make_models(folder, count=2):
    """Write pipelines that differ in a bias of their U-Nets, and return their folders."""
    for i in range(count):
        pipeline = make_tiny_pipeline()
        with torch.no_grad():
            pipeline.unet.conv_out.bias.fill_(float(i))
        pipeline.save_pretrained(folder / f"model-{i}")
    return [str(folder / f"model-{i}") for i in range(count)]


def test_weights_are_averaged_by_share(monkeypatch, tmp_path):
    models = make_models(tmp_path)
    with emoji.example("average.py", monkeypatch) as example:
        example("--models", *models, "--shares", "0.25", "0.75", "--output", str(tmp_path / "average"))
    average = RectifiedFlowPipeline.from_pretrained(tmp_path / "average")
    torch.testing.assert_close(average.unet.conv_out.bias, torch.full_like(average.unet.conv_out.bias, 0.75))
    first = RectifiedFlowPipeline.from_pretrained(models[0])
    torch.testing.assert_close(average.unet.conv_in.weight, first.unet.conv_in.weight)
    record = json.loads((tmp_path / "average" / "training.json").read_text(encoding="utf-8"))
    assert record == {"average": {"model-0": 0.25, "model-1": 0.75}}


@pytest.mark.parametrize("shares", [["1"], ["0.5", "0.4"], ["nan", "1"]])
def test_shares_that_are_no_average_are_refused(monkeypatch, tmp_path, capsys, shares):
    arguments = ["--models", "a", "b", "--shares", *shares, "--output", str(tmp_path / "average")]
    with emoji.example("average.py", monkeypatch) as example, pytest.raises(SystemExit):
        example(*arguments)
    assert "expected one share per model with a sum of 1, got 2 models" in capsys.readouterr().err
