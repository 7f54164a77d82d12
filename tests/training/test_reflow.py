"""Reflow: what the U-Net is given, and that it learns to carry the stored noise to the stored data."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from rectified_diffusers import (
    DistillConfig,
    DistillTrainer,
    RectifiedFlowImg2ImgPipeline,
    RectifiedFlowPipeline,
    export_diffusers,
    export_unet,
    generate_real_triplets,
)
from rectified_diffusers.data.config import RealTripletConfig
from rectified_diffusers.data.dataset import TripletDataset
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import SHORT, TRAINERS, make_trainer, one_step_error, record_unet_calls


def test_the_unet_sees_the_straight_path(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("reflow", dataset, output_dir, prompt_dropout=0.0)
    calls = record_unet_calls(trainer)
    trainer.train_step(1)
    rows, t, _ = trainer.sample_inputs(1)
    batch = dataset.rows(rows.tolist())
    x_t, timestep, _ = calls[0]
    time = t[:, None, None, None]
    torch.testing.assert_close(x_t, time * batch.data + (1 - time) * batch.noise)
    torch.testing.assert_close(timestep, 1000 * (1 - t))
    assert timestep.dtype.is_floating_point
    assert len(set(t.tolist())) == len(t)


def test_dropped_prompts_are_the_empty_prompt(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("reflow", dataset, output_dir, batch_size=32, prompt_dropout=0.5)
    calls = record_unet_calls(trainer)
    trainer.train_step(1)
    rows, _, dropped = trainer.sample_inputs(1)
    prompts = dataset.rows(rows.tolist()).prompts
    assert 5 < dropped.sum() < 27
    encode = trainer.pipeline.encode_prompt
    for embeds, prompt, drop in zip(calls[0][2], prompts, dropped, strict=True):
        expected = encode("" if drop else prompt, trainer.device, 1, do_classifier_free_guidance=False)[0][0]
        torch.testing.assert_close(embeds, expected)


@pytest.mark.parametrize(
    ("time_density", "at_the_ends"), [("uniform", 0.2), ("logit_normal", 0.03), ("u_shaped", 0.34)]
)
def test_time_densities(time_density: str, at_the_ends: float, dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("reflow", dataset, output_dir, time_density=time_density, batch_size=4096)
    _, t, _ = trainer.sample_inputs(1)
    share = ((t < 0.1) | (t > 0.9)).float().mean().item()
    assert share == pytest.approx(at_the_ends, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"loss": "pseudo_huber"}])
def test_one_step_lands_near_the_data(options: dict[str, Any], dataset: TripletDataset, output_dir: Path) -> None:
    error = one_step_error("reflow", dataset, output_dir, max_steps=120, batch_size=8, prompt_dropout=0.0, **options)
    assert error < 0.4  # noise and data are 1.26 apart; a wrong sign or a swapped time gives more than that


def make_curved(kind: Any = "flow") -> Any:
    """Build a tiny pipeline whose scheduler says what that of `reflow --interpolation cosine` does."""
    pipeline = make_tiny_pipeline(kind)
    pipeline.scheduler.register_to_config(interpolation="cosine")
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["straight", "cosine", "variance_preserving"])
def test_every_path_learns_a_flow_from_the_noise_to_the_data(
    interpolation: str, dataset: TripletDataset, output_dir: Path
) -> None:
    options: dict[str, Any] = {"max_steps": 160, "learning_rate": 2e-2, "warmup_steps": 5, "lr_schedule": "cosine"}
    options |= {"batch_size": 8, "prompt_dropout": 0.0, "ema_decay": 0.8, "save_every_steps": 1000}
    make_trainer("reflow", dataset, output_dir, "diffusion", interpolation=interpolation, **options).train()
    pipeline = RectifiedFlowPipeline.from_pretrained(output_dir)
    assert pipeline.scheduler.config.get("interpolation", "straight") == interpolation
    pipeline.set_progress_bar_config(disable=True)
    triplets = dataset.rows(range(len(dataset)))
    errors = []
    for steps in (1, 30):
        run: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
        result: Any = pipeline(triplets.prompts, latents=triplets.noise.clone(), **run)
        errors.append((result.images - triplets.data).square().mean().sqrt().item())
    assert errors[1] < 0.4  # noise and data are 1.26 apart
    if interpolation != "straight":
        assert errors[0] > 0.5  # one step of a curved path does not end at the data


def test_the_unet_sees_the_cosine_path(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("reflow", dataset, output_dir, prompt_dropout=0.0, interpolation="cosine")
    calls = record_unet_calls(trainer)
    trainer.train_step(1)
    rows, t, _ = trainer.sample_inputs(1)
    batch = dataset.rows(rows.tolist())
    angle = torch.pi / 2 * t[:, None, None, None]
    torch.testing.assert_close(calls[0][0], angle.sin() * batch.data + angle.cos() * batch.noise)
    torch.testing.assert_close(calls[0][1], 1000 * (1 - t))
    assert trainer.validation_steps == (10, 25)


def test_a_path_that_the_model_cannot_have_is_refused(dataset: TripletDataset, output_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"RectifiedFlowEulerScheduler has none\. Set interpolation to 'cosine'"):
        make_trainer("reflow", dataset, output_dir, interpolation="variance_preserving")
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline keeps its own scheduler"):
        make_trainer("reflow", dataset, output_dir, "sd3", interpolation="cosine")


@pytest.mark.parametrize("method", ["progressive", "dmd"])
def test_trainers_that_ask_the_teacher_on_the_straight_path_refuse_others(
    method: str, dataset: TripletDataset, output_dir: Path
) -> None:
    trainer, config = TRAINERS[method]
    curved = make_curved()
    teacher = {"teacher": curved} if method == "dmd" else {}
    rest = {"teacher_steps": 2} if method == "progressive" else {}
    with pytest.raises(ValueError, match=r"needs a flow with the straight path, .* interpolation='cosine'"):
        trainer(curved, dataset, config(output_dir=output_dir, mixed_precision="no", **rest), **teacher)
    assert not (output_dir / "log.jsonl").exists()


def test_distillation_of_a_curved_flow_is_a_plain_one_step_model(dataset: TripletDataset, output_dir: Path) -> None:
    """It asks nothing of its teacher but the triplets, and trains at t = 0 alone."""
    trainer = DistillTrainer(make_curved(), dataset, DistillConfig(output_dir=output_dir, **SHORT))
    trainer.train()
    assert "interpolation" not in RectifiedFlowPipeline.from_pretrained(output_dir).scheduler.config


def test_the_path_is_kept_when_a_scheduler_is_saved_or_rebuilt(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    scheduler = make_curved().scheduler
    scheduler.save_pretrained(tmp_path)
    for again in (type(scheduler).from_pretrained(tmp_path), type(scheduler).from_config(scheduler.config)):
        assert again.config["interpolation"] == "cosine"
        with pytest.raises(ValueError, match="straight path"):
            again.add_noise(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.tensor([500.0]))
    assert not caplog.records  # diffusers warns of keys that it does not know


def test_what_mixes_noise_and_data_refuses_a_curved_flow(tmp_path: Path) -> None:
    curved = make_curved()
    message = "needs a flow with the straight path, got interpolation='cosine'"
    with pytest.raises(ValueError, match=message):
        RectifiedFlowImg2ImgPipeline(**curved.components)("a cat", image=torch.rand(1, 3, 32, 32), strength=0.5)
    with pytest.raises(ValueError, match=message):
        curved.scheduler.get_velocity(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=message):
        export_diffusers(curved, tmp_path)
    with pytest.raises(ValueError, match=message):
        export_unet(curved, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=f"inversion_time=0.9 {message}"):
        generate_real_triplets(curved, tmp_path, tmp_path / "real", RealTripletConfig(num_triplets=1))
