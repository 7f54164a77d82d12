"""A run on two processes, or with its weights shared out between them, is the run on one, up to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor

from rectified_diffusers.cli import main
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.distributed import several_on_cpu
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.training.sharding import full, is_sharded, shard_like
from tests.forks import free_port
from tests.tiny import make_tiny_pipeline
from tests.training.checkpoints import read_checkpoint
from tests.training.helpers import SHORT, digests, make_trainer

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate_configs"
STEPS = 4
OPTIONS: dict[str, Any] = {**SHORT, "max_steps": STEPS, "keep_checkpoints": 2}
# Sums over the batch are made in another order. Adam divides a gradient by its own size, so that where a gradient is
# nearly zero its rounding decides about a part of a whole step (the learning rate is 1e-3): that bounds the largest
# difference, the mean stays below float32's resolution.
MEAN, LARGEST = 1e-7, 1e-4


def launch(words: list[str], timeout: int = 1200, **environment: str) -> str:
    """Run a command that starts processes, with a free PORT for them, and return what they printed."""
    port = str(free_port())
    known = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **environment}
    known["PYTHONPATH"] = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
    words = [word.replace("PORT", port) for word in words]
    done = subprocess.run(words, cwd=ROOT, env=known, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def launch_fsdp(dataset: TripletDataset, output: Path, runs: list[str]) -> None:
    """Run trainings of `tests.training.processes` on two processes that share the weights out."""
    fsdp = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())["fsdp_config"]
    environment = {name.upper(): str(value) for name, value in fsdp.items()}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT"]
    launch(
        [*torchrun, "-m", "tests.training.processes", str(dataset.folder), str(output), *runs],
        ACCELERATE_USE_CPU="true",
        ACCELERATE_USE_FSDP="true",
        **environment,
    )


def tensors(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    """Return everything that a checkpoint holds, by file and name."""
    files = read_checkpoint(folder / "checkpoints" / f"step-{step:08d}").tensors
    return {f"{file}/{name}": value for file, values in files.items() for name, value in values.items()}


def check_that_they_agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare weights, average and optimizer state of two runs by the mean and the largest of their differences."""
    assert found.keys() == expected.keys()
    differences = torch.cat([(found[name] - expected[name]).abs().flatten() for name in expected])
    print(
        f"\nmean difference {differences.mean():.3g}, largest {differences.max():.3g}, of {len(differences)} numbers"
    )
    assert differences.mean() < MEAN
    assert differences.max() < LARGEST


@pytest.fixture(scope="module")
def alone(dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    make_trainer("reflow", dataset, folder, max_steps=STEPS).train()
    return folder


def command_line(dataset: TripletDataset, model: Path, output: Path) -> list[str]:
    options = {"model": model, "triplets": dataset.folder, "output_dir": output, **OPTIONS}
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    return ["reflow", *(word for pair in words for word in pair)]


def test_the_command_line_is_the_python_api(dataset: TripletDataset, alone: Path, tmp_path: Path) -> None:
    make_tiny_pipeline().save_pretrained(tmp_path / "model")
    assert main(command_line(dataset, tmp_path / "model", tmp_path / "run")) == 0
    found, expected = tensors(tmp_path / "run"), tensors(alone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (alone / "log.jsonl").read_bytes()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert digests(tmp_path / "run")[weights] == digests(alone)[weights]


@pytest.mark.very_slow
def test_accelerate_launch_with_two_processes_is_one(dataset: TripletDataset, alone: Path, tmp_path: Path) -> None:
    make_tiny_pipeline().save_pretrained(tmp_path / "model")
    words = ["accelerate", "launch", "--config_file", str(CONFIGS / "cpu_2.yaml"), "--main_process_port", "PORT"]
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:]]
    command = command_line(dataset, tmp_path / "model", tmp_path / "run")
    printed = launch([*words, "-m", "rectified_diffusers.cli", *command])
    assert printed.count("trained to step") == 1  # two processes that do not know of each other say it twice
    check_that_they_agree(tensors(tmp_path / "run"), tensors(alone))
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (tmp_path / "run", alone)]
    for line, expected in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert line == pytest.approx(expected, rel=1e-5)
    assert isinstance(RectifiedFlowPipeline.from_pretrained(tmp_path / "run"), RectifiedFlowPipeline)


@pytest.mark.very_slow
def test_distribution_matching_on_two_processes_is_that_on_one(dataset: TripletDataset, tmp_path: Path) -> None:
    """Student, fake velocity and discriminator: two networks in turn, each with its own gradients to share."""
    options = {"max_steps": 2, "fake_updates": 2, "first_fake_updates": 1}
    make_trainer("dmd", dataset, tmp_path / "alone", real_data=dataset, **options).train()
    run = f"two={json.dumps({'method': 'dmd', **options})}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT"]
    words = ["-m", "tests.training.processes", str(dataset.folder), str(tmp_path), run]
    launch([*torchrun, *words], ACCELERATE_USE_CPU="true")
    assert json.loads((tmp_path / "two-1.json").read_text())["processes"] == 2
    check_that_they_agree(tensors(tmp_path / "two", 2), tensors(tmp_path / "alone", 2))


@pytest.mark.very_slow
def test_weights_shared_out_by_fsdp_are_those_of_one_process(
    dataset: TripletDataset, alone: Path, tmp_path: Path
) -> None:
    """Clipping, the average, validation, checkpoints, resuming; and a checkpoint is whole, for any number of them."""
    make_trainer("reflow", dataset, tmp_path / "from_one", max_steps=2).train()
    whole_run = {"micro_batch_size": 1, "validate_every_steps": STEPS, "validation_prompts": ["a cat"]}
    runs = {"straight": [whole_run], "parts": [{**whole_run, "max_steps": 2}, whole_run], "from_one": [{}]}
    runs |= {"lora": [{"lora_rank": 2, "max_steps": 2}]}
    words = [f"{name}={json.dumps({'max_steps': STEPS, **part})}" for name, parts in runs.items() for part in parts]
    launch_fsdp(dataset, tmp_path, words)
    records = [json.loads((tmp_path / f"straight-{i}.json").read_text()) for i in range(2)]
    size = sum(weight.numel() for weight in make_tiny_pipeline().unet.parameters())
    for record in records:
        assert record["processes"] == 2
        assert record["distributed_type"] == "FSDP"
        assert record["sharded"]
        assert record["held"] < 0.6 * size  # uneven where a dimension is odd
    assert sum(record["held"] for record in records) == size
    straight = tensors(tmp_path / "straight")
    for name in ("straight", "from_one"):
        check_that_they_agree(tensors(tmp_path / name), tensors(alone))
    parts = tensors(tmp_path / "parts")
    assert all(torch.equal(parts[name], straight[name]) for name in straight)
    assert [path.name for path in (tmp_path / "straight" / "validation").iterdir()] == ["step-00000004.png"]
    pipelines = [RectifiedFlowPipeline.from_pretrained(folder) for folder in (tmp_path / "straight", alone)]
    found, expected = ({**pipeline.unet.state_dict()} for pipeline in pipelines)
    check_that_they_agree(found, expected)
    make_trainer("reflow", dataset, tmp_path / "lora_alone", max_steps=2, lora_rank=2).train()
    check_that_they_agree(tensors(tmp_path / "lora", 2), tensors(tmp_path / "lora_alone", 2))


@pytest.mark.very_slow
def test_distribution_matching_sharded_by_fsdp_is_that_of_one_process(dataset: TripletDataset, tmp_path: Path) -> None:
    """Two sharded networks, and a discriminator with a gradient for the data alone; one run is resumed."""
    options = {"max_steps": 2, "fake_updates": 2, "first_fake_updates": 1, "save_every_steps": 1}
    make_trainer("dmd", dataset, tmp_path / "alone", real_data=dataset, **options).train()
    words = [
        f"{name}={json.dumps({'method': 'dmd', **options, 'max_steps': steps})}"
        for name, steps in (("straight", 2), ("parts", 1), ("parts", 2))
    ]
    launch_fsdp(dataset, tmp_path, words)
    assert json.loads((tmp_path / "straight-1.json").read_text())["sharded"]
    straight, parts = (tensors(tmp_path / name, 2) for name in ("straight", "parts"))
    check_that_they_agree(straight, tensors(tmp_path / "alone", 2))
    assert all(torch.equal(parts[name], straight[name]) for name in straight)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(config: Path) -> None:
    read: Any = load_config_from_file(str(config))
    processes = {"cpu_2": 2, "gpu_1": 1, "gpu_8": 8, "fsdp": 8, "nodes": 32}
    assert read.num_processes == processes[config.stem]
    assert read.mixed_precision == "no"  # the trainers say it themselves
    if config.stem == "fsdp":
        assert read.fsdp_config["fsdp_version"] == 2


def test_all_configs_are_there() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"cpu_2", "gpu_1", "gpu_8", "fsdp", "nodes"}


def test_processes_on_the_cpu_are_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = getattr(torch, "accelerator", torch.cuda)
    monkeypatch.setattr(devices, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not several_on_cpu()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert several_on_cpu()
    monkeypatch.setattr(devices, "is_available", lambda: True)
    assert not several_on_cpu()


def test_the_first_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator()
    assert not is_sharded(accelerator)
    known = (1, 2) if hasattr(FullyShardedDataParallelPlugin, "fsdp_version") else (1,)
    for version in known:
        plugin: Any = FullyShardedDataParallelPlugin()
        plugin.fsdp_version = version
        monkeypatch.setitem(accelerator.state.__dict__, "fsdp_plugin", plugin)
        if version == 2:
            assert is_sharded(accelerator)
            continue
        with pytest.raises(ValueError, match=r"Expected FSDP version 2, got 1. Set fsdp_version: 2 .*fsdp\.yaml"):
            is_sharded(accelerator)


def test_a_weight_of_one_process_is_whole() -> None:
    weight = torch.nn.Parameter(torch.randn(3))
    assert full(weight).data_ptr() == weight.data_ptr()
    assert not full(weight).requires_grad
    value = torch.randn(3)
    assert shard_like(value, weight) is value
