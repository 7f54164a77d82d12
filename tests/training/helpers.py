"""Tiny runs for the tests of the trainers: a few triplets of 4x8x8 latents and the U-Net of `tests.tiny`."""

import hashlib
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.manifest import FORMAT, Manifest
from rectified_diffusers.data.shards import shard_path, write_shard
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.training import checkpoint_writing
from rectified_diffusers.training.config import (
    DistillConfig,
    DistributionMatchingConfig,
    ProgressiveConfig,
    ReflowConfig,
    TrainerConfig,
)
from rectified_diffusers.training.distill import DistillTrainer
from rectified_diffusers.training.dmd import DistributionMatchingTrainer
from rectified_diffusers.training.progressive import ProgressiveTrainer
from rectified_diffusers.training.reflow import ReflowTrainer
from rectified_diffusers.training.trainer import Trainer
from tests.tiny import make_tiny_pipeline

PROMPTS = ["a red apple", "the sea", "a cat", "two dogs"]


def make_ends(rows: int = 4, channels: int = 4) -> tuple[Tensor, Tensor]:
    """Sample white noise, and data that is smooth and unrelated to it."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(rows, channels, 8, 8, generator=generator)
    corners = torch.randn(rows, channels, 2, 2, generator=generator)
    return noise, torch.nn.functional.interpolate(corners, (8, 8), mode="bilinear")


def write_dataset(folder: Path, noise: Tensor, data: Tensor, prompts: list[str]) -> TripletDataset:
    """Write triplets by hand in the format of `generate_triplets`, in one shard of float32."""
    settings: dict[str, Any] = {
        "format": FORMAT,
        "num_triplets": len(noise),
        "triplets_per_shard": len(noise),
        "storage_dtype": "float32",
        "num_prompts": len(prompts),
        "latent_shape": list(noise.shape[1:]),
    }
    manifest = Manifest.of(settings)
    manifest.write(folder)
    header = {"shard": 0, "manifest": manifest.identity, "prompts": prompts}
    write_shard(shard_path(folder, 0), {"noise": noise, "data": data}, header)
    return TripletDataset(folder)


def make_dataset(folder: Path) -> TripletDataset:
    return write_dataset(folder, *make_ends(), PROMPTS)


SHORT: dict[str, Any] = {
    "max_steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 4,
    "mixed_precision": "no",
    "save_every_steps": 2,
    "log_every_steps": 3,
}
TRAINERS: dict[str, tuple[Any, type[TrainerConfig]]] = {
    "reflow": (ReflowTrainer, ReflowConfig),
    "distill": (DistillTrainer, DistillConfig),
    "progressive": (ProgressiveTrainer, ProgressiveConfig),
    "dmd": (DistributionMatchingTrainer, DistributionMatchingConfig),
}
ROUNDS: dict[str, Any] = {"teacher_steps": 8, "steps_per_round": 2}  # 8 -> 4 -> 2 -> 1


def make_trainer(
    method: str, dataset: TripletDataset, output_dir: Path, kind: Any = "flow", **options: Any
) -> Trainer[Any]:
    """Build a trainer of 6 steps by default, from a fresh tiny pipeline with the same weights each time.

    The 6 steps of a progressive distillation are three rounds of two. The teacher of a distribution matching is a flow
    with other weights in its network; its option `real_data` is an argument of the trainer.
    """
    trainer_class, config_class = TRAINERS[method]
    options = {**SHORT, **options}
    if config_class is ProgressiveConfig:
        options = {**ROUNDS, **options}
        del options["max_steps"]  # follows from the rounds
    teacher: dict[str, Any] = {}
    if config_class is DistributionMatchingConfig:
        options = {"fake_updates": 2, **options}
        teacher |= {"teacher": make_matching_teacher(), "real_data": options.pop("real_data", None)}
    config = config_class(output_dir=output_dir, **options)
    pipeline = make_tiny_pipeline(kind) if isinstance(kind, str) else kind
    return trainer_class(pipeline, dataset, config, **teacher)


def make_matching(dataset: TripletDataset, output_dir: Path, **options: Any) -> DistributionMatchingTrainer:
    trainer = make_trainer("dmd", dataset, output_dir, **options)
    assert isinstance(trainer, DistributionMatchingTrainer)
    return trainer


def make_matching_teacher(kind: Any = "flow") -> Any:
    """Build a pipeline with the tiny text encoder and VAE, and a network of its own."""
    pipeline, other = make_tiny_pipeline(kind), make_tiny_pipeline(kind, seed=1)
    network = "unet" if hasattr(pipeline, "unet") else "transformer"
    pipeline.register_modules(**{network: getattr(other, network)})
    return pipeline


def one_step_error(method: str, dataset: TripletDataset, output_dir: Path, max_steps: int, **options: Any) -> float:
    """Train on the triplets; return the RMSE between their data and one-step results of the saved pipeline."""
    fit: dict[str, Any] = {"max_steps": max_steps, "learning_rate": 2e-2, "warmup_steps": 5, "lr_schedule": "cosine"}
    make_trainer(method, dataset, output_dir, **fit, ema_decay=0.8, save_every_steps=1000, **options).train()
    pipeline = RectifiedFlowPipeline.from_pretrained(output_dir)
    pipeline.set_progress_bar_config(disable=True)
    triplets = dataset.rows(range(len(dataset)))
    result: Any = pipeline(
        triplets.prompts, latents=triplets.noise, num_inference_steps=1, guidance_scale=1.0, output_type="latent"
    )
    return (result.images - triplets.data).square().mean().sqrt().item()


def record_unet_calls(trainer: Trainer[Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Collect x_t, timestep and prompt embeddings of every call of the trainer's U-Net."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def before(module: Any, args: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> None:
        calls.append((*args, kwargs["encoder_hidden_states"]))

    trainer.student.network.register_forward_pre_hook(before, with_kwargs=True)
    return calls


def digests(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder by its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, fail: Callable[[], object]) -> None:
    """Let the given call of `owner.name`, counted from 1, do `fail` instead of its work."""
    original, calls = getattr(owner, name), count(1)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return fail() if next(calls) == call else original(*args, **kwargs)

    monkeypatch.setattr(owner, name, replacement)


KILLED_RUN: dict[str, Any] = {
    "validate_every_steps": 2,
    "validation_prompts": ("a cat",),
    "mixed_precision": "bf16",
}


def train_to_a_kill(triplets: Path, method: str, output_dir: Path, name: str, call: int) -> None:
    """Train, and end this process by SIGKILL at one of its writes."""
    owner = Path if name == "replace" else checkpoint_writing
    fail_at(pytest.MonkeyPatch(), owner, name, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
    make_trainer(method, TripletDataset(triplets), output_dir, **KILLED_RUN).train()
