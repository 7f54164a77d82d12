"""Densities of the training time t (0 is noise, 1 is data)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class TimeDensity(ABC):
    """Base class of a distribution on [0, 1]. The generator is the only source of randomness of `sample`."""

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Sample `(count,)` times in [0, 1], float32, on the generator's device."""


@dataclass(frozen=True)
class Uniform(TimeDensity):
    """Uniform density p(t) = 1, used for InstaFlow's reflow (arXiv:2309.06380)."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        return _uniform(count, generator).float()


@dataclass(frozen=True)
class LogitNormal(TimeDensity):
    """Logit-normal density of Stable Diffusion 3 (arXiv:2403.03206): log(t / (1 - t)) ~ N(mean, std^2).

    p(t) = exp(-(logit(t) - mean)^2 / (2 std^2)) / (std sqrt(2 pi) t (1 - t)).

    Args:
        mean: values above 0 favor times near the data. The paper's time runs in the opposite direction: its mean m is
            mean = -m here.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"Expected a finite mean and a finite std > 0, got mean={self.mean}, std={self.std}.")

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        normal = torch.randn(count, generator=generator, device=generator.device, dtype=torch.float32)
        return torch.sigmoid(self.mean + self.std * normal)


@dataclass(frozen=True)
class UShaped(TimeDensity):
    """U-shaped density p(t) ~ exp(a t) + exp(a (1 - t)): most weight on both ends (2-RF++, arXiv:2405.20320).

    It is often quoted as exp(a t) + exp(-a t), which only increases on [0, 1]. The authors' code samples from the
    symmetric form used here. Normalized, p(t) = a cosh(a (t - 1/2)) / (2 sinh(a / 2)).

    Args:
        a: in (0, 100]; 4 in the paper, where p(0) / p(1/2) = cosh(2) = 3.8. The density approaches uniform as a goes
            to 0.
    """

    a: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.a <= 100:
            raise ValueError(f"Expected a in (0, 100], got {self.a}. For equal weight everywhere use Uniform().")

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        # Inverse of the distribution function F(t) = 1/2 + sinh(a (t - 1/2)) / (2 sinh(a / 2)).
        centred = 2 * _uniform(count, generator) - 1
        return (0.5 + torch.asinh(centred * math.sinh(self.a / 2)) / self.a).float().clamp(0, 1)


@dataclass(frozen=True)
class FixedTime(TimeDensity):
    """Constant t. Distillation to one step trains only at t = 0."""

    t: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise ValueError(f"Expected t in [0, 1], got {self.t}. For a diffusion timestep, t = 1 - timestep / 1000.")

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.full((count,), self.t, dtype=torch.float32, device=generator.device)


@dataclass(frozen=True)
class Grid(TimeDensity):
    """Uniform distribution on 0, 1/steps, ..., (steps - 1)/steps: the times of an Euler grid with `steps` steps."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Expected steps >= 1, got {self.steps}.")

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(self.steps, (count,), generator=generator, device=generator.device)
        return (index.double() / self.steps).float()


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
