"""`rectified-diffusers inspect`: one screen, or JSON, of what a pipeline is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from rectified_diffusers.cli import main
from rectified_diffusers.loading.errors import dtype_option
from rectified_diffusers.models.inspection import TRAINED, count_memory, inspect_pipeline
from rectified_diffusers.models.quantization import quantized_loading, stored_tensors
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
    assert memory.full == 20 * pipeline.transformer.num_parameters()
    assert memory.lora is not None
    assert memory.lora_int8 is not None
    assert memory.lora_nf4 is not None
    assert memory.lora_nf4 < memory.lora_int8 < memory.lora < memory.full
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    assert memory.text_encoders == sum(weight.nbytes for part in encoders for weight in part.parameters())
    assert memory.vae == sum(weight.nbytes for weight in pipeline.vae.parameters())
    made_up = make_made_up_pipeline()
    assert count_memory(made_up, made_up.predictor, 2, LAYERS).lora is None


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "sd"])
def test_the_memory_of_a_lora_is_that_of_its_tensors(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pipeline, _ = build(name)
    pipeline.save_pretrained(tmp_path)
    options = {**dtype_option(torch.float32), "quantization_config": quantized_loading(str(tmp_path), "int8")}
    quantized = type(pipeline).from_pretrained(tmp_path, **options)
    component = "unet" if name == "sd" else "transformer"
    network, base = getattr(pipeline, component), getattr(quantized, component)
    memory = count_memory(pipeline, network, 2, LAYERS)
    tensors = [part for weight in base.named_parameters() for _, part in stored_tensors(*weight)]
    frozen = sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point() or tensor.dtype == torch.int8)
    network.add_adapter(LoraConfig(r=2, target_modules=list(LAYERS)))
    added = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    assert memory.lora_int8 == frozen + TRAINED * added
    assert memory.lora == 4 * sum(weight.numel() for weight in network.parameters()) + (TRAINED - 4) * added
