"""generate --fast."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rectified_diffusers import cli
from tests.speed.test_optimize import make_tiny_decoder
from tests.tiny import make_tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_pipeline().save_pretrained(folder)
    return str(folder)


def generate(model: str, output: Path, *arguments: str) -> np.ndarray:
    assert cli.main(["generate", *arguments, "-o", str(output), "--model", model, "--device", "cpu"]) == 0
    return np.asarray(Image.open(output).convert("RGB")).astype(int)


def test_fast_draws_nearly_the_same_pictures(model, tmp_path):
    words = ["a fox", "an owl", "--num-images", "5", "--guidance-scale", "2", "--negative-prompt", "red"]
    slow = generate(model, tmp_path / "slow.png", *words)
    exact = generate(model, tmp_path / "exact.png", *words, "--fast", "--dtype", "float32")
    fast = generate(model, tmp_path / "fast.png", *words, "--fast")
    assert slow.shape == fast.shape == (64, 160, 3)
    assert np.abs(exact - slow).max() <= 3
    assert np.abs(fast - slow).mean() < 3


def test_fast_with_a_tiny_decoder(model, tmp_path):
    make_tiny_decoder().save_pretrained(tmp_path / "tiny")
    picture = generate(model, tmp_path / "a.png", "a fox", "--fast", "--tiny-decoder", str(tmp_path / "tiny"))
    assert picture.shape == (32, 32, 3)


def test_a_tiny_decoder_alone_is_refused(model, tmp_path, capsys):
    arguments = ["generate", "a fox", "-o", str(tmp_path / "a.png"), "--model", model, "--tiny-decoder", "x/y"]
    assert cli.main(arguments) == 2
    assert "--tiny-decoder has no effect without --fast" in capsys.readouterr().err
