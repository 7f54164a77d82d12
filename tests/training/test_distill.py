"""Distillation: only t = 0 is trained, in latents or on decoded pictures."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rectified_diffusers.data.triplets import TripletDataset
from rectified_diffusers.training.distill import DistillTrainer, load_lpips
from tests.training.helpers import make_trainer, one_step_error, record_unet_calls


def test_the_unet_is_asked_at_the_noise_end_only(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("distill", dataset, output_dir)
    calls = record_unet_calls(trainer)
    for step in (1, 2):
        trainer.train_step(step)
        rows, _, dropped = trainer.draw(step)
        x_t, timestep, _ = calls[-1]
        assert torch.equal(timestep, torch.full((4,), 1000.0))
        assert torch.equal(x_t, dataset.rows(rows.tolist()).noise)
        assert not dropped.any()


def test_one_step_lands_near_the_data(dataset: TripletDataset, output_dir: Path) -> None:
    assert one_step_error("distill", dataset, output_dir, max_steps=120) < 0.2  # noise and data are 1.26 apart


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights under torchvision's names."""
    pytest.importorskip("lpips", reason="the lpips loss needs lpips and torchvision", exc_type=ImportError)
    from torchvision.models import alexnet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = alexnet(weights=None).features.state_dict(prefix="features.")
    path = tmp_path_factory.mktemp("lpips") / "alexnet.safetensors"
    save_file(weights, path)
    return path


def test_lpips_step(backbone: Path, dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("distill", dataset, output_dir, loss="lpips", lpips_weights=backbone)
    assert isinstance(trainer, DistillTrainer)
    before = [weight.detach().clone() for weight in trainer.parameters]
    loss, grad_norm = trainer.train_step(1)
    assert loss > 0
    assert grad_norm > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert all(weight.grad is None for weight in trainer.pipeline.vae.parameters())


def test_lpips_of_the_right_data_is_zero(
    backbone: Path, dataset: TripletDataset, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer("distill", dataset, output_dir, loss="lpips", lpips_weights=backbone)
    batch = dataset.rows(range(4))
    monkeypatch.setattr(trainer, "predict_velocity", lambda x_t, t, prompts: batch.data - batch.noise)
    torch.testing.assert_close(trainer.compute_loss(batch, torch.zeros(4)), torch.zeros(4), atol=1e-6, rtol=0)


def test_pictures_are_those_of_the_pipeline(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("distill", dataset, output_dir)
    assert isinstance(trainer, DistillTrainer)
    latents = dataset.rows([0]).data
    pixels = trainer.pipeline(
        "a cat", latents=latents, num_inference_steps=1, output_type="pt", guidance_scale=1.0,
        callback_on_step_end=lambda *_: {"latents": latents},
    ).images  # fmt: skip
    torch.testing.assert_close(trainer.decode(latents).clamp(-1, 1) / 2 + 0.5, pixels)


def test_backbone_is_loaded_by_its_torchvision_names(backbone: Path) -> None:
    metric = load_lpips("alex", backbone)
    weights = load_file(backbone)
    assert torch.equal(metric.get_parameter("net.slice2.3.weight"), weights["features.3.weight"])
    assert not any(weight.requires_grad for weight in metric.parameters())


def test_a_file_that_lacks_weights_is_refused(backbone: Path, tmp_path: Path) -> None:
    weights = load_file(backbone)
    del weights["features.3.bias"]
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 of the 10 weights .* first: 'features\.3\.bias'"):
        load_lpips("alex", tmp_path / "other.safetensors")


def test_missing_lpips_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r'pip install "rectified_diffusers\[lpips\]"'):
        load_lpips("alex", None)
