"""Triplets and checkpoints of Stable Diffusion 3 and FLUX as the releases before the generic adapter wrote them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.manifest import Manifest
from rectified_diffusers.data.shards import shard_path, write_shard
from rectified_diffusers.training.checkpoint_reading import STATE, sealed, unsealed
from rectified_diffusers.training.config import ReflowConfig
from rectified_diffusers.training.reflow import ReflowTrainer
from tests.models_any.families import build
from tests.models_any.test_training import PROMPTS, RUN

pytestmark = pytest.mark.usefixtures("plain_charts")
SHAPE = (4, 8, 8)  # (C, H, W) of both families: the tokens of FLUX were packed by our own adapter


def write_older(pipeline: Any, folder: Path) -> TripletDataset:
    """Write triplets in format 1, with the settings that the hand-written adapters recorded."""
    settings = {
        "format": 1,
        "num_triplets": 2,
        "triplets_per_shard": 2,
        "storage_dtype": "float32",
        "num_prompts": 2,
        "pipeline": type(pipeline).__name__,
        "solver": "FlowMatchEulerDiscreteScheduler",
        "num_inference_steps": 25,
        "guidance_scale": 3.5,
        "latent_shape": list(SHAPE),
        "vae_scaling_factor": pipeline.vae.config.scaling_factor,
        "vae_shift_factor": pipeline.vae.config.shift_factor,
    }
    manifest = Manifest.of(settings)
    manifest.write(folder)
    noise, data = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(0))
    header = {"shard": 0, "manifest": manifest.identity, "prompts": PROMPTS}
    write_shard(shard_path(folder, 0), {"noise": noise, "data": data}, header)
    return TripletDataset(folder)


def make(pipeline: Any, triplets: TripletDataset, folder: Path, steps: int) -> ReflowTrainer:
    return ReflowTrainer(pipeline, triplets, ReflowConfig(output_dir=folder, max_steps=steps, **RUN))


def test_triplets_and_checkpoints_of_stable_diffusion_3_are_continued(tmp_path: Path) -> None:
    """Their latents are what the scheduler sees; an older checkpoint does not record its starting model."""
    pipeline, _ = build("sd3")
    triplets = write_older(pipeline, tmp_path / "triplets")
    run = tmp_path / "run"
    make(pipeline, triplets, run, 1).train()
    (state,) = (run / "checkpoints").glob(f"*/{STATE}")
    content = unsealed(state.read_text())
    del content["run"]["starting_model"]
    state.write_text(sealed(content))
    record = json.loads((run / "training.json").read_text())
    make(build("sd3")[0], triplets, run, 2).train()
    assert json.loads((run / "training.json").read_text())["steps"] == record["steps"] + 1


def test_triplets_of_flux_are_refused_by_their_format(tmp_path: Path) -> None:
    """Their latents are (C, H, W), and the scheduler of FLUX sees tokens; a checkpoint needs its triplets to go on."""
    pipeline, _ = build("flux")
    triplets = write_older(pipeline, tmp_path / "triplets")
    with pytest.raises(ValueError, match=r"have shape \(16, 16\), .* \(4, 8, 8\) \(format 1\). Make the triplets"):
        make(pipeline, triplets, tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    write_older(build("sd3")[0], tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 3'))
    with pytest.raises(ValueError, match="has format 3, expected 1 or 2"):
        TripletDataset(tmp_path)
