"""LPIPS on decoded latents: the pictures are the pipeline's, the network is the one that was asked for."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.training.losses import DecodedDistance, load_lpips
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import make_trainer


def test_pictures_are_those_of_the_pipeline(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("distill", dataset, output_dir)
    decoded = DecodedDistance(trainer.denoiser.decode_pixels, torch.nn.Identity())
    latents = dataset.rows([0]).data
    pixels = trainer.pipeline(
        "a cat", latents=latents, num_inference_steps=1, output_type="pt", guidance_scale=1.0,
        callback_on_step_end=lambda *_: {"latents": latents},
    ).images  # fmt: skip
    torch.testing.assert_close(decoded.decode(latents).clamp(-1, 1) / 2 + 0.5, pixels)


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


@pytest.mark.parametrize(
    ("network", "model"), [("alex", "alexnet"), pytest.param("vgg", "vgg16", marks=pytest.mark.slow)]
)
def test_a_download_that_fails_says_what_to_do(no_network: None, network: str, model: str) -> None:
    with pytest.raises(OSError, match=rf"cannot be downloaded .* \(--lpips-weights {model}\.safetensors"):
        load_lpips(network, None)


def test_a_shift_is_undone_before_the_scaling() -> None:
    denoiser = Denoiser.of(make_tiny_pipeline())
    vae: Any = denoiser.pipeline.vae
    latents = torch.randn(1, 4, 8, 8)
    plain = denoiser.decode_pixels(latents)
    vae.register_to_config(scaling_factor=vae.config["scaling_factor"] * 2, shift_factor=0.1)
    scaled = (latents / vae.config["scaling_factor"] * 2 - 0.1) * vae.config["scaling_factor"]
    torch.testing.assert_close(denoiser.decode_pixels(scaled), plain)
