"""The losses of the trainers: what they compare, and how two of them are weighed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rectified_diffusers.flow.loss import pseudo_huber, velocity_loss
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.training.config import DistillConfig
from rectified_diffusers.training.losses import DecodedDistance, FlowLoss
from tests.tiny import make_tiny_pipeline

KINDS: list[Any] = ["l2", "pseudo_huber", "lpips", "lpips_huber"]


def make_loss(kind: Any, backbone: Path, weigh_by_time: bool = False) -> FlowLoss:
    config = DistillConfig(output_dir=Path("run"), lpips_weights=backbone)
    return FlowLoss.of(kind, config, Denoiser.of(make_tiny_pipeline()), torch.device("cpu"), weigh_by_time)


def make_velocities() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    predicted, velocity, x_t = torch.randn(3, 4, 4, 8, 8, generator=generator)
    return predicted, velocity, x_t, torch.tensor([0.0, 0.25, 0.5, 0.9])


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_velocity_has_no_loss(kind: Any, backbone: Path) -> None:
    predicted, velocity, x_t, t = make_velocities()
    loss = make_loss(kind, backbone)
    assert loss(velocity, velocity, x_t, t).abs().max() < 1e-6
    assert loss(predicted, velocity, x_t, t).min() > 0


@pytest.mark.parametrize("kind", ["l2", "pseudo_huber"])
def test_latent_losses_are_those_of_the_velocity(kind: Any, backbone: Path) -> None:
    predicted, velocity, x_t, t = make_velocities()
    loss = make_loss(kind, backbone)
    assert torch.equal(loss(predicted, velocity, x_t, t), velocity_loss(predicted, velocity, kind))
    start = torch.zeros(4)  # where a distillation trains, the error of the data is the same
    found = loss(predicted, velocity, x_t, start)
    torch.testing.assert_close(found, velocity_loss(x_t + predicted, x_t + velocity, kind))


def test_lpips_compares_the_pictures_at_the_end(backbone: Path) -> None:
    predicted, velocity, x_t, t = make_velocities()
    loss = make_loss("lpips", backbone)
    assert isinstance(loss.decoded, DecodedDistance)
    remaining = (1 - t)[:, None, None, None]
    expected = loss.decoded(x_t + remaining * predicted, x_t + remaining * velocity)
    torch.testing.assert_close(loss(predicted, velocity, x_t, t), expected)


@pytest.mark.parametrize("weigh_by_time", [True, False])
def test_lpips_huber_is_their_sum(weigh_by_time: bool, backbone: Path) -> None:
    predicted, velocity, x_t, t = make_velocities()
    both = make_loss("lpips_huber", backbone, weigh_by_time)
    lpips = FlowLoss("lpips", both.decoded)
    weight = t if weigh_by_time else torch.ones(4)
    expected = weight * pseudo_huber(predicted - velocity) / 256 + lpips(predicted, velocity, x_t, t)
    torch.testing.assert_close(both(predicted, velocity, x_t, t), expected)


def test_every_loss_gives_a_gradient_to_the_velocity_alone(backbone: Path) -> None:
    predicted, velocity, x_t, t = make_velocities()
    for kind in KINDS:
        predicted = predicted.detach().requires_grad_()
        make_loss(kind, backbone)(predicted, velocity, x_t, t).sum().backward()
        assert predicted.grad is not None
        assert (predicted.grad.flatten(1).abs().amax(1) > 0).all(), kind
