"""Absurd numbers and incomplete models are one line and exit code 2, before any work begins."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rectified_diffusers import TripletConfig, cli
from rectified_diffusers.cli import shared
from rectified_diffusers.data.manifest import MANIFEST_NAME, Manifest
from rectified_diffusers.distributed import several_on_cpu
from rectified_diffusers.options import LARGEST
from rectified_diffusers.training.config import DistillConfig, ReflowConfig
from tests.tiny import make_tiny_pipeline

TRIPLETS = ["triplets", "--teacher", "no/model", "--output-dir", "out", "--prompts", "a.txt"]
TRAINING = ["--model", "no/model", "--triplets", "no-folder", "--output-dir", "out"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["generate", "a cat", "-o", "a.png", "--num-images", "1000000000000"],
            "num_images must be at most 1,000,000",
        ),
        (["generate", "a cat", "-o", "a.png", "--steps", "1000000000"], "steps must be at most 100,000"),
        (["generate", "a", "-o", "a.png", "--height", "10000000", "--width", "64"], "height must be at most 16,384"),
        (["generate", "a", "-o", "a.png", "--height", "64", "--width", "10000000"], "width must be at most 16,384"),
        (["generate", "a", "-o", "a.png", "--columns", "1" + "0" * 40], "columns must be at most 1,000,000,000"),
        (["interpolate", "a", "b", "-o", "a.gif", "--frames", "1000000000000"], "frames must be at most 100,000"),
        ([*TRIPLETS, "--num-triplets", "1000000000000000"], "num_triplets must be at most 1,000,000,000"),
        ([*TRIPLETS, "--num-triplets", "1", "--batch-size", "1000000000000"], "batch_size must be at most"),
        ([*TRIPLETS, "--num-triplets", "1", "--height", "1000000000"], "height must be at most 16,384"),
        ([*TRIPLETS, "--num-triplets", "1", "--num-inference-steps", "1000000000"], "num_inference_steps must be at"),
        (["distill", *TRAINING, "--max-steps", "1000000000000"], "max_steps must be at most 1,000,000,000"),
        (["reflow", *TRAINING, "--lora-rank", "1000000"], "lora_rank must be at most 100,000"),
        (["dmd", *TRAINING, "--teacher", "no/model", "--batch-size", "1000000000000"], "batch_size must be at most"),
    ],
)
def test_a_command_refuses_absurd_numbers(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a cat\n")
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (TripletConfig, {"num_triplets": 10**15}),
        (TripletConfig, {"num_triplets": 4, "triplets_per_shard": 10**12}),
        (ReflowConfig, {"output_dir": Path("out"), "max_steps": 10**12}),
        (DistillConfig, {"output_dir": Path("out"), "lora_rank": 10**6, "lora_target_modules": ("to_q",)}),
    ],
)
def test_so_do_the_options_of_the_functions(config, options):
    with pytest.raises(ValueError, match="must be at most"):
        config(**options)


def test_a_seed_may_be_large():
    assert TripletConfig(num_triplets=LARGEST, seed=2**62).seed == 2**62


@pytest.mark.parametrize("name", ["num_triplets", "triplets_per_shard", "num_prompts", "latent_shape"])
def test_a_manifest_of_absurd_numbers_is_refused(name, tmp_path):
    manifest = {
        "format": 1,
        **dict.fromkeys(("num_triplets", "triplets_per_shard", "num_prompts"), 4),
        "latent_shape": [4, 8, 8],
        "storage_dtype": "float16",
        "text_embeddings": None,
    }
    manifest[name] = [4, 8, 10**15] if name == "latent_shape" else 10**15
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"expected {name} to be .* to 1,000,000,000, got"):
        Manifest.read(tmp_path)


# ---------------------------------------------------------------------------------------------- models


def with_values(part: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "lacks the folder tokenizer"),
    "no U-Net": (lambda folder: shutil.rmtree(folder / "unet"), "lacks the folder unet"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "lacks the folder scheduler"),
    "an empty tokenizer": (
        lambda folder: [path.unlink() for path in (folder / "tokenizer").iterdir()],
        "no vocabulary",
    ),
    "no config of the U-Net": (lambda folder: (folder / "unet/config.json").unlink(), "config.json"),
    "no weights of the U-Net": (lambda folder: (folder / WEIGHTS).unlink(), "diffusion_pytorch_model"),
    "an empty U-Net": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "damaged or incomplete"),
    "a cut U-Net": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
        "damaged or incomplete",
    ),
    "a million layers": (with_values("unet", layers_per_block=10**6), "layers_per_block of at most 1,000"),
    "a million layers of text": (with_values("text_encoder", num_hidden_layers=10**6), "num_hidden_layers of at"),
    "huge layers": (with_values("unet", block_out_channels=[2**40, 2**40]), "block_out_channels of at most"),
    "a huge image": (with_values("unet", sample_size=10**12), "sample_size of at most 16,384"),
    "a huge vocabulary": (with_values("text_encoder", vocab_size=10**13), "vocab_size of at most"),
    "wide layers": (with_values("vae", block_out_channels=[10**7, 10**7]), "cannot be loaded"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_pipeline("flow").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", MODELS)
def test_an_incomplete_or_absurd_model_is_one_line(variant, model, tmp_path, capsys):
    damage, message = MODELS[variant]
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    damage(folder)
    assert (
        cli.main(["generate", "a cat", "--model", str(folder), "-o", str(tmp_path / "a.png"), "--device", "cpu"]) == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert message in error


def test_memory_that_is_not_there_is_one_line(monkeypatch, capsys):
    def fail(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("rectified_diffusers.cli.generate.load_pipeline", fail)
    assert cli.main(["generate", "a cat", "-o", "a.png"]) == 2
    assert "error: not enough memory: [enforce fail" in capsys.readouterr().err


@pytest.mark.parametrize(("terminal", "rank", "shown"), [(True, "0", True), (True, "1", False), (False, "0", False)])
def test_a_terminal_sees_what_is_loaded(terminal, rank, shown, model, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    shared.load_pipeline(str(model), "cpu", "float32")
    assert (f"rectified-diffusers: loading {model} ...\n" in capsys.readouterr().err) == shown


# ---------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("variables", "warned"),
    [
        ({"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}, True),
        ({"ACCELERATE_USE_CPU": "true"}, False),
        ({"MASTER_ADDR": "127.0.0.1"}, False),
        ({"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"}, False),
        ({"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "OMPI_COMM_WORLD_SIZE": "2"}, False),
    ],
)
def test_one_process_instead_of_several_is_a_warning(variables, warned, monkeypatch, caplog):
    for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    several_on_cpu()
    assert ("has started one process" in caplog.text) == warned
