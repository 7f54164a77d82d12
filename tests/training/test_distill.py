"""Distillation: only t = 0 is trained, in latents or on decoded pictures."""

from pathlib import Path

import pytest
import torch

from rectified_diffusers.data.dataset import TripletDataset
from tests.training.helpers import make_trainer, one_step_error, record_unet_calls


def test_the_unet_is_asked_at_the_noise_end_only(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("distill", dataset, output_dir)
    calls = record_unet_calls(trainer)
    for step in (1, 2):
        trainer.train_step(step)
        rows, _, dropped = trainer.sample_inputs(step)
        x_t, timestep, _ = calls[-1]
        assert torch.equal(timestep, torch.full((4,), 1000.0))
        assert torch.equal(x_t, dataset.rows(rows.tolist()).noise)
        assert not dropped.any()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["l2", "pseudo_huber"])
def test_one_step_lands_near_the_data(loss: str, dataset: TripletDataset, output_dir: Path) -> None:
    error = one_step_error("distill", dataset, output_dir, max_steps=120, loss=loss)
    assert error < 0.2  # noise and data are 1.26 apart


@pytest.mark.parametrize("loss", ["lpips", "lpips_huber"])
def test_lpips_step(loss: str, backbone: Path, dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("distill", dataset, output_dir, loss=loss, lpips_weights=backbone)
    before = [weight.detach().clone() for weight in trainer.student.parameters]
    value, grad_norm = trainer.train_step(1)
    assert value > 0
    assert grad_norm > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, trainer.student.parameters, strict=True))
    assert all(weight.grad is None for weight in trainer.pipeline.vae.parameters())


def test_lpips_of_the_right_data_is_zero(
    backbone: Path, dataset: TripletDataset, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer("distill", dataset, output_dir, loss="lpips", lpips_weights=backbone)
    batch = dataset.rows(range(4))
    monkeypatch.setattr(trainer, "predict_velocity", lambda x_t, t, prompts: batch.data - batch.noise)
    torch.testing.assert_close(trainer.compute_loss(batch, torch.zeros(4)), torch.zeros(4), atol=1e-6, rtol=0)
