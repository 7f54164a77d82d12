"""Reflow: what the U-Net is given, and that it learns to carry the stored noise to the stored data."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rectified_diffusers.data.dataset import TripletDataset
from tests.training.helpers import make_trainer, one_step_error, record_unet_calls


def test_the_unet_sees_the_straight_path(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("reflow", dataset, output_dir, prompt_dropout=0.0)
    calls = record_unet_calls(trainer)
    trainer.train_step(1)
    rows, t, _ = trainer.draw(1)
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
    rows, _, dropped = trainer.draw(1)
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
    _, t, _ = trainer.draw(1)
    share = ((t < 0.1) | (t > 0.9)).float().mean().item()
    assert share == pytest.approx(at_the_ends, abs=0.03)


@pytest.mark.parametrize("options", [{}, pytest.param({"loss": "pseudo_huber"}, marks=pytest.mark.slow)])
def test_one_step_lands_near_the_data(options: dict[str, Any], dataset: TripletDataset, output_dir: Path) -> None:
    error = one_step_error("reflow", dataset, output_dir, max_steps=120, batch_size=8, prompt_dropout=0.0, **options)
    assert error < 0.4  # noise and data are 1.26 apart; a wrong sign or a swapped time gives more than that
