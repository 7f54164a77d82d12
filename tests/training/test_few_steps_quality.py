"""Students of two and four steps on a Gaussian mixture, whose flow is known exactly: better than those of one step."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.evaluation.metrics import frechet_distance
from rectified_diffusers.flow.ode import euler
from rectified_diffusers.training.config import DistillConfig, DistributionMatchingConfig
from rectified_diffusers.training.distill import DistillTrainer
from rectified_diffusers.training.dmd import DistributionMatchingTrainer
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import SHORT, make_matching_teacher, write_dataset

MODES, STD = torch.randn(64, 8, generator=torch.Generator().manual_seed(4)), 0.1
DRAWN = {**SHORT, "warmup_steps": 0, "lr_schedule": "cosine", "weight_decay": 0.0, "ema_decay": 0.9}


def points(latents: Tensor) -> Tensor:
    """Return latents `(B, 4, 8, 8)` as points in eight dimensions, 32 each."""
    return latents.flatten(1).unflatten(1, (32, 8))


def draw(count: int, seed: int) -> Tensor:
    """Sample latents of `count` times 32 points of the mixture."""
    generator = torch.Generator().manual_seed(seed)
    modes = MODES[torch.randint(len(MODES), (count, 32), generator=generator)]
    return (modes + STD * torch.randn(modes.shape, generator=generator)).reshape(-1, 4, 8, 8)


class Exact(nn.Module):
    """The velocity of the flow from N(0, 1) to the mixture: the mean over the posterior of the modes."""

    def __init__(self) -> None:
        super().__init__()
        self.modes = nn.Parameter(MODES.clone())

    def forward(self, sample: Tensor, timestep: Tensor, **others: Any) -> tuple[Tensor]:
        x, t = points(sample), 1 - timestep.reshape(-1, 1, 1) / 1000
        variance = STD**2 * t**2 + (1 - t) ** 2
        posterior = ((t * (x @ self.modes.T) - t**2 * self.modes.square().sum(1) / 2) / variance).softmax(-1)
        mean = posterior @ self.modes
        return ((mean + (STD**2 * t - (1 - t)) / variance * (x - t * mean)).reshape(sample.shape),)


class Network(nn.Module):
    """A small network on single points, called as a U-Net is."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            widths = (15, 64, 64, 64, 8)
            layers = [nn.Linear(*pair) for pair in pairwise(widths)]
        self.layers = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2], nn.SiLU(), layers[3])

    def forward(self, sample: Tensor, timestep: Tensor, **others: Any) -> tuple[Tensor]:
        x, t = points(sample), 1 - timestep.reshape(-1, 1, 1) / 1000
        angles = torch.pi * t * torch.tensor([1.0, 2.0, 4.0])
        times = torch.cat([t, angles.sin(), angles.cos()], -1).expand(-1, 32, -1)
        return (self.layers(torch.cat([x, times], -1)).reshape(sample.shape),)


def velocity(network: nn.Module) -> Any:
    return lambda x, t: network(x, 1000 * (1 - t))[0]


@pytest.fixture(scope="module")
def flow() -> Network:
    """A network trained as the mixture's flow: the first student, and the first fake score."""
    network, generator = Network(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for step in range(1000):
        data = draw(16, step)
        noise, t = torch.randn(data.shape, generator=generator), torch.rand(len(data), generator=generator)
        column = t[:, None, None, None]
        x_t = column * data + (1 - column) * noise
        optimizer.zero_grad()
        (velocity(network)(x_t, t) - (data - noise)).square().mean().backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> TripletDataset:
    noise = torch.randn(512, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        data = euler(velocity(Exact()), noise, 50)
    return write_dataset(tmp_path_factory.mktemp("pairs"), noise, data, ["a point"] * len(noise))


def distance(network: nn.Module, steps: int) -> float:
    """Return the Frechet distance of the student's samples to the mixture."""
    noise = torch.randn(256, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        made = points(euler(velocity(network), noise, steps)).flatten(0, 1)
    return frechet_distance(made, points(draw(256, -1)).flatten(0, 1))


def distill(start: Network, pairs: TripletDataset, folder: Path, steps: int) -> Network:
    class Student(DistillTrainer):
        def make_network(self) -> Any:
            return copy.deepcopy(start).requires_grad_(True)

    options: dict[str, Any] = {"batch_size": 8, "learning_rate": 2e-3, "student_steps": steps, "max_steps": 150}
    trainer = Student(make_tiny_pipeline("flow"), pairs, DistillConfig(output_dir=folder, **{**DRAWN, **options}))
    for step in range(1, 151):
        trainer.train_step(step)
    return trainer.student.network


def match(start: Network, fake: Network, pairs: TripletDataset, folder: Path, steps: int) -> Network:
    class Student(DistributionMatchingTrainer):
        def make_network(self) -> Any:
            return copy.deepcopy(start).requires_grad_(True)

        def make_teacher(self) -> Any:
            return Exact()

        def make_fake(self) -> Any:
            return copy.deepcopy(fake).requires_grad_(True)

    options: dict[str, Any] = {"batch_size": 8, "learning_rate": 5e-4, "student_steps": steps, "max_steps": 80}
    options |= {"fake_updates": 4, "fake_learning_rate": 1e-3, "teacher_guidance_scale": 1.0}
    config = DistributionMatchingConfig(output_dir=folder, **{**DRAWN, **options})
    trainer = Student(make_tiny_pipeline("flow"), pairs, config, make_matching_teacher())
    for step in range(1, 81):
        trainer.train_step(step)
    return trainer.student.network


@pytest.mark.slow
def test_more_steps_are_better_with_the_same_budget(flow: Network, pairs: TripletDataset, tmp_path: Path) -> None:
    """Equal numbers of updates; for a mixture whose flow is sharper than one pass of the student."""
    distilled, matched = {}, {}
    for steps in (1, 2, 4):
        student = distill(flow, pairs, tmp_path / f"distilled-{steps}", steps)
        distilled[steps] = distance(student, steps)
        matched[steps] = distance(match(student, flow, pairs, tmp_path / f"matched-{steps}", steps), steps)
    for found in (distilled, matched):
        assert found[2] < 0.95 * found[1]
        assert found[4] < 0.85 * found[1]
