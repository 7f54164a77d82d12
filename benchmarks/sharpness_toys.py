"""Toy models of `sharpness.py`: Gaussian-mixture data, small networks, two teachers, one training loop."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from rectified_diffusers.flow import (
    DiffusionAsFlow,
    FixedTime,
    Straight,
    TimeDensity,
    VariancePreserving,
    Velocity,
    heun,
    velocity_loss,
)
from rectified_diffusers.seeds import generator_of


@dataclass(frozen=True)
class Size:
    """Sizes of the toys and trainings; `sharpness.py` describes what is counted.

    Attributes:
        examples_per_pair: training examples drawn for each pair, so that the number of pairs follows the budget.
        evaluations: of the velocity, for one pair. Heun takes two a step.
        samples: on which every metric is taken.
        chunk: of pairs that are drawn at once, with a generator of their own, so that more pairs begin with the same.
    """

    dimensions: int = 32
    modes: int = 600
    mode_std: float = 0.1
    width: int = 128
    batch_size: int = 128
    examples_per_pair: int = 16
    evaluations: int = 32
    teacher_steps: int = 8000
    samples: int = 8192
    projections: int = 128
    chunk: int = 2048

    def pairs(self, steps: int) -> int:
        """Return the number of pairs for a number of training steps."""
        return steps * self.batch_size // self.examples_per_pair


@dataclass(frozen=True)
class Mixture:
    """An equal mixture of narrow Gaussians, with the velocity of its flow from N(0, 1) in closed form.

    Given the mode k, x_t = t * data + (1 - t) * noise is Gaussian around t * m_k with variance
    s^2 t^2 + (1 - t)^2, so that E[data - noise | x_t = x, k] = m_k + (s^2 t - (1 - t)) / variance * (x - t m_k), and
    v(x, t) is the mean of that over the posterior of k.

    Args:
        means: `(K, D)`.
        std: s, of each mode.
    """

    means: Tensor
    std: float

    @classmethod
    def draw(cls, size: Size, seed: int) -> "Mixture":
        """Sample modes from a Gaussian whose i-th variance falls as 1 / i; the mean variance is 1."""
        variances = 1 / torch.arange(1, size.dimensions + 1)
        scales = (variances / variances.mean()).sqrt()
        return cls(
            scales * torch.randn(size.modes, size.dimensions, generator=generator_of(seed, "modes")), size.mode_std
        )

    @cached_property
    def _means_and_squares(self) -> Tensor:
        return torch.cat([self.means, self.means.square().sum(1, keepdim=True)], dim=1).T

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        means = self.means[torch.randint(len(self.means), (count,), generator=generator)]
        return means + self.std * torch.randn(means.shape, generator=generator)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        variance = self.std**2 * t**2 + (1 - t) ** 2
        # -|x - t m_k|^2 / (2 variance) but for |x|^2, which is the same for all k, as one product.
        logits = torch.cat([t / variance * x, -(t**2) / (2 * variance)], dim=1) @ self._means_and_squares
        mean = logits.softmax(dim=1) @ self.means
        return mean + (self.std**2 * t - (1 - t)) / variance * (x - t * mean)


class Network(nn.Module):
    """Three hidden layers on x `(B, D)` and a time `(B,)` in [0, 1], of which 1 is noise, as for diffusion models.

    A linear layer connects the input to the output directly, as the outermost skip connection of a U-Net does. At the
    noise end epsilon is nearly x, and only the remainder has to be learned.
    """

    def __init__(self, size: Size, generator: torch.Generator) -> None:
        super().__init__()
        widths = [size.dimensions + 8, size.width, size.width, size.width, size.dimensions]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.skip = nn.Linear(widths[0], widths[-1], bias=False)
        for weight in self.parameters():  # as nn.Linear does it, from our own generator
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound, generator=generator)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = torch.pi * time[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        x = torch.cat([x, angles.sin(), angles.cos()], dim=1)
        skipped = self.skip(x)
        for layer in self.layers[:-1]:
            x = nn.functional.silu(layer(x))
        return self.layers[-1](x) + skipped


class Flow(nn.Module):
    """A network whose output is the velocity, with new weights or a diffusion model's bare weights."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, 1 - t)


class MatchedFlow(Flow):
    """A network that predicts epsilon, converted to a velocity: the initialization of `snr_matching`."""

    def __init__(self, network: Network, schedule: VariancePreserving) -> None:
        super().__init__(network)
        self.as_flow = DiffusionAsFlow(schedule, "epsilon")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        last = self.as_flow.schedule.last_timestep
        return self.as_flow(lambda sample, timestep: self.network(sample, timestep / last), x, t)


def stable_diffusion_schedule() -> VariancePreserving:
    return VariancePreserving.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)


def optimize(flow: nn.Module, loss: Callable[[], Tensor], steps: int, learning_rate: float) -> None:
    """Train with Adam and a cosine learning rate that falls to 0."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class Pairs:
    """Noise and the data at the other end of its path, both `(N, D)`."""

    noise: Tensor
    data: Tensor

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, rows: slice) -> "Pairs":
        return Pairs(self.noise[rows], self.data[rows])

    @property
    def transport_cost(self) -> float:
        """E |data - noise|^2 / d."""
        return (self.data - self.noise).square().mean().item()


@dataclass(frozen=True)
class Stage:
    """One training on pairs: reflow with `Uniform()`, distillation to one step with `FixedTime(0)`."""

    density: TimeDensity
    pairs: Pairs
    steps: int
    learning_rate: float

    def evaluations(self, size: Size) -> int:
        """Network evaluations: those of the pairs, and 3 per example (one forward, two backward)."""
        return len(self.pairs) * size.evaluations + 3 * self.steps * size.batch_size

    def train(self, flow: Flow, size: Size, *names: object) -> Flow:
        """Train a copy of a flow."""
        flow, generator = copy.deepcopy(flow).requires_grad_(True), generator_of(*names)

        def loss() -> Tensor:
            rows = torch.randint(len(self.pairs), (size.batch_size,), generator=generator)
            noise, data = self.pairs.noise[rows], self.pairs.data[rows]
            t = self.density.sample(size.batch_size, generator)
            x_t, velocity = Straight().interpolate(noise, data, t)
            predicted = flow(x_t, t)
            if self.density == FixedTime(0):
                return velocity_loss(x_t + predicted, data).mean()
            return velocity_loss(predicted, velocity).mean()

        optimize(flow, loss, self.steps, self.learning_rate)
        return flow.requires_grad_(False)


def draw_pairs(velocity: Velocity, count: int, size: Size, *names: object) -> Pairs:
    """Sample from a flow with Heun's method, starting from new noise."""
    return join([draw_chunk(velocity, size, *names, first) for first in range(0, count, size.chunk)])[:count]


def draw_chunk(velocity: Velocity, size: Size, *names: object) -> Pairs:
    noise = torch.randn(size.chunk, size.dimensions, generator=generator_of(*names))
    with torch.no_grad():
        return Pairs(noise, heun(velocity, noise, size.evaluations // 2))


def join(parts: Sequence[Pairs]) -> Pairs:
    return Pairs(torch.cat([part.noise for part in parts]), torch.cat([part.data for part in parts]))


class Toys:
    """The data of one seed, its two teachers, and the initial students."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size, self.seed = size, seed
        self.mixture = Mixture.draw(size, seed)
        self.schedule = stable_diffusion_schedule()
        self._chunks: dict[tuple[str, str], list[Pairs]] = {}

    @cached_property
    def diffusion(self) -> Network:
        """The smooth teacher: a network of the student's size, trained on the data to predict epsilon."""
        size, generator = self.size, generator_of(self.seed, "diffusion")
        network = Network(size, generator)
        last = self.schedule.last_timestep
        signal = torch.tensor(self.schedule.alphas_cumprod, dtype=torch.float32)

        def loss() -> Tensor:
            data = self.mixture.sample(size.batch_size, generator)
            noise = torch.randn(data.shape, generator=generator)
            timestep = torch.randint(last + 1, (size.batch_size,), generator=generator)
            alpha, sigma = signal[timestep].sqrt()[:, None], (1 - signal[timestep]).sqrt()[:, None]
            return (network(alpha * data + sigma * noise, timestep / last) - noise).square().mean()

        optimize(network, loss, size.teacher_steps, 2e-3)
        return network.requires_grad_(False)

    def velocity(self, teacher: str) -> Velocity:
        return self.mixture.velocity if teacher == "sharp" else self.student("matched")

    def student(self, start: str) -> Flow:
        """Return the initial student: `new` weights, or those of the diffusion model, `matched` or `bare`."""
        if start == "new":
            return Flow(Network(self.size, generator_of(self.seed, "student")))
        network = copy.deepcopy(self.diffusion)
        return MatchedFlow(network, self.schedule) if start == "matched" else Flow(network)

    def pairs(self, teacher: str, count: int, use: str) -> Pairs:
        """Return the first pairs of a teacher for one use; a larger number starts with the same pairs."""
        chunks = self._chunks.setdefault((teacher, use), [])
        while len(chunks) * self.size.chunk < count:
            chunks.append(
                draw_chunk(self.velocity(teacher), self.size, self.seed, teacher, use, len(chunks) * self.size.chunk)
            )
        return join(chunks)[:count]
