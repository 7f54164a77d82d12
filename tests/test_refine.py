"""One-step pictures enlarged and refined by a pipeline of the shape of SDXL's refiner, on the command line and not."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rectified_diffusers import cli
from rectified_diffusers.cli.generate import REFINER
from tests.tiny import make_tiny_pipeline
from tests.tiny_inputs import make_refiner

EXAMPLE = Path(__file__).parent.parent / "examples" / "refine.py"
SIZE = 32  # pixels of the tiny pipeline's pictures
SHORT = ["--refine-steps", "4", "--refine-strength", "0.5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_pipeline("flow").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def refiner(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("refiner")
    make_refiner().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder"] == [None, None]
    assert index["requires_aesthetics_score"] is True
    return str(folder)


def generate(model: str, output: Path, *arguments: str) -> np.ndarray:
    assert cli.main(["generate", *arguments, "-o", str(output), "--model", model, "--device", "cpu"]) == 0
    return np.asarray(Image.open(output))


def by_hand(prompt: str, seed: int, strength: float, steps: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the one-step picture enlarged, and refined."""
    draw: Any = make_tiny_pipeline("flow")
    small = draw(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]
    large = small.resize((2 * SIZE, 2 * SIZE), Image.Resampling.LANCZOS)
    refine: Any = make_refiner()
    refine.set_progress_bar_config(disable=True)
    options.pop("guidance_scale", None)
    generator = torch.Generator().manual_seed(seed)
    result = refine(
        prompt, image=large, strength=strength, num_inference_steps=steps, generator=generator, **options
    ).images[0]
    return np.asarray(large), np.asarray(result)


def test_equals_the_two_pipelines_called_by_hand(model, refiner, tmp_path):
    picture = generate(model, tmp_path / "a.png", "a fox", "--seed", "3", "--refine", refiner, *SHORT)
    enlarged, expected = by_hand("a fox", 3, 0.5, 4)
    assert picture.shape == (2 * SIZE, 2 * SIZE, 3)
    np.testing.assert_array_equal(picture, expected)
    assert (picture != enlarged).any()


def test_defaults_and_negative_prompt(model, refiner, tmp_path):
    arguments = ["--refine", refiner, "--guidance-scale", "1.5", "--negative-prompt", "red"]
    picture = generate(model, tmp_path / "a.png", "a fox", *arguments)
    _, expected = by_hand("a fox", 0, 0.3, 50, guidance_scale=1.5, negative_prompt="red")
    np.testing.assert_array_equal(picture, expected)


def test_each_picture_of_a_sheet_is_refined_alone(model, refiner, tmp_path):
    arguments = ["--refine", refiner, *SHORT]
    sheet = generate(model, tmp_path / "sheet.png", "a fox", "--num-images", "2", *arguments)
    assert sheet.shape == (2 * SIZE, 4 * SIZE, 3)
    alone = generate(model, tmp_path / "a.png", "a fox", "--seed", "1", *arguments)
    np.testing.assert_array_equal(sheet[:, 2 * SIZE :], alone)


def test_the_default_is_the_published_refiner(model, tmp_path, capsys):
    """The tests run with HF_HUB_OFFLINE=1, so nothing is asked."""
    output = str(tmp_path / "a.png")
    assert cli.main(["generate", "a fox", "-o", output, "--model", model, "--device", "cpu", "--refine"]) == 2
    assert REFINER in capsys.readouterr().err
    assert not Path(output).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--refine-strength", "0.5"], "--refine-strength has no effect without --refine"),
        (["--refine-steps", "5"], "--refine-steps has no effect without --refine"),
        (["--refine", "x/y", "--refine-strength", "0"], "--refine-strength must be above 0 and at most 1, got 0.0"),
        (["--refine", "x/y", "--refine-strength", "nan"], "--refine-strength must be above 0 and at most 1, got nan"),
        (["--refine", "x/y", "--refine-strength", "1.1"], "--refine-strength must be above 0 and at most 1, got 1.1"),
        (
            ["--refine", "x/y", "--refine-steps", "3"],
            "--refine-strength 0.3 of --refine-steps 3 is less than one step",
        ),
        (["--refine", "x/y", "--refine-steps", "0"], "is less than one step"),
        (["--refine", "no-such-folder"], "no folder 'no-such-folder', and it is no Hub id"),
    ],
    ids=" ".join,
)
def test_refuses(model, tmp_path, capsys, arguments, message):
    command = ["generate", "a fox", "-o", str(tmp_path / "a.png"), "--model", model, "--device", "cpu"]
    assert cli.main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_that_is_no_refiner_is_refused(model, tmp_path, capsys):
    command = ["generate", "a fox", "-o", str(tmp_path / "a.png"), "--model", model, "--device", "cpu"]
    assert cli.main([*command, "--refine", model]) == 2
    assert "--refine needs an SDXL refiner such as" in capsys.readouterr().err


def test_example(model, refiner, tmp_path, monkeypatch):
    output = tmp_path / "fox.png"
    options = ["--model", model, "--refiner", refiner, "--output", str(output), "--prompt", "a fox"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options, "--steps", "4", "--strength", "0.5"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    _, expected = by_hand("a fox", 0, 0.5, 4)
    assert Image.open(tmp_path / "fox-one-step.png").size == (SIZE, SIZE)
    if not torch.cuda.is_available():
        np.testing.assert_array_equal(np.asarray(Image.open(output)), expected)
