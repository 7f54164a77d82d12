"""`rectified-diffusers inspect`: one screen, or JSON, of what a pipeline is."""

import json
from pathlib import Path
from typing import Any

import pytest

from rectified_diffusers.cli import main
from rectified_diffusers.models.inspection import count_memory, inspect_pipeline
from tests.models_any.families import build
from tests.models_any.made_up import make_made_up_pipeline
from tests.tiny import make_components, make_diffusion_scheduler, make_tiny_pipeline

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3")
    make_tiny_pipeline("sd3").save_pretrained(folder)
    return folder


def test_one_screen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--device", "cpu", "--height", "32", "--width", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    found = {line[:14].strip(): line[14:] for line in lines}
    assert (found["teacher"], found["student"]) == ("yes", "yes")
    assert found["network"].startswith("transformer, SD3Transformer2DModel")
    assert found["latents"] == "4 x 8 x 8, a tensor as argument hidden_states, several rows at once"
    assert found["time"] == "timestep = 1 * timestep"
    assert found["prediction"] == "noise - data"
    assert found["guidance"] == "linear, batched, uncond first, guidance_scale is 7 by default"


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--device", "cpu", "--height", "32", "--width", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["teacher"], found["network"]["component"], found["latents"]["shape"]) == (
        "yes",
        "transformer",
        [4, 8, 8],
    )
    assert found["self_test"]["euler"] <= 1e-5


def test_a_reason_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    StableDiffusionImg2ImgPipeline(**make_components(), scheduler=make_diffusion_scheduler()).save_pretrained(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["inspect", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "teacher       no: its call with nothing but a prompt fails with" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_counts_below_one_are_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--height", "0"]) == 2
    assert "--height must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "student"), [("sd", "yes, as a diffusion U-Net"), ("pixart_sigma", "no: a diffusion transformer")]
)
def test_students_of_diffusion_models(name: str, student: str) -> None:
    pipeline, options = build(name)
    found = inspect_pipeline(pipeline, options)
    assert found.teacher == "yes"
    assert found.student.startswith(student)
    assert found.prediction == "epsilon"


def test_memory_is_counted_from_the_parameters() -> None:
    pipeline: Any = make_tiny_pipeline("sd3")
    memory = count_memory(pipeline, pipeline.transformer, 2, LAYERS)
    count = pipeline.transformer.num_parameters()
    assert memory.full == 20 * count
    assert memory.lora is not None
    assert memory.quantized_lora is not None
    assert 2 * count < memory.lora < memory.full
    assert memory.quantized_lora < memory.lora
    made_up = make_made_up_pipeline()
    assert count_memory(made_up, made_up.predictor, 2, LAYERS).lora is None
