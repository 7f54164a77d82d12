"""Interpolation paths between noise (t = 0) and data (t = 1): x_t = alpha(t) * data + sigma(t) * noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    """Hold alpha, sigma and their derivatives with respect to t, each `(B,)`, in the dtype of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def per_example(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshape a coefficient `(B,)` to broadcast against x `(B, ...)`: to `(B, 1, 1, 1)` for a four-dimensional x."""
    if coefficient.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"Expected t in float32 or float64, got {coefficient.dtype}. Convert it with t.float().")
    if coefficient.shape != x.shape[:1]:
        raise ValueError(
            f"Expected t of shape {tuple(x.shape[:1])} for x of shape {tuple(x.shape)}, got "
            f"{tuple(coefficient.shape)}. Pass one time per example: t.expand(B) for a single time."
        )
    return coefficient.reshape((-1,) + (1,) * (x.ndim - 1))


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Return a * x + b * y for coefficients `(B,)` and x, y of the same shape `(B, ...)`.

    The sum is computed in the widest dtype present and returned in the dtype of x and y, so a float32 t works with
    bfloat16 latents.
    """
    if x.shape != y.shape:
        raise ValueError(f"Expected two tensors of one shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
    total = per_example(a, x) * x + per_example(b, y) * y
    return total.to(torch.promote_types(x.dtype, y.dtype))


class Interpolation(ABC):
    """Base class of a differentiable pair alpha(t), sigma(t). A subclass defines `coefficients`; the rest follows."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Return alpha, sigma and their derivatives at t, `(B,)` in [0, 1]."""

    def interpolate(self, noise: Tensor, data: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t = alpha * data + sigma * noise and velocity = d_alpha * data + d_sigma * noise."""
        at = self.coefficients(t)
        return combine(at.alpha, data, at.sigma, noise), combine(at.d_alpha, data, at.d_sigma, noise)


@dataclass(frozen=True)
class Straight(Interpolation):
    """Straight path of rectified flow: alpha = t, sigma = 1 - t, velocity = data - noise (arXiv:2209.03003)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(alpha=t, sigma=1 - t, d_alpha=one, d_sigma=-one)


@dataclass(frozen=True)
class Cosine(Interpolation):
    """Cosine path: alpha = sin(pi t / 2), sigma = cos(pi t / 2), so that alpha^2 + sigma^2 = 1."""

    def coefficients(self, t: Tensor) -> Coefficients:
        angle = torch.pi / 2 * t
        alpha, sigma = angle.sin(), angle.cos()
        return Coefficients(alpha, sigma, d_alpha=torch.pi / 2 * sigma, d_sigma=-torch.pi / 2 * alpha)


@dataclass(frozen=True, repr=False)
class VariancePreserving(Interpolation):
    """Path of a diffusion schedule, as in DDIM (arXiv:2010.02502): alpha = cos(angle), sigma = sin(angle).

    At timestep k, alpha^2 = alphas_cumprod[k] and sigma^2 = 1 - alphas_cumprod[k]. Between timesteps, the angle
    atan(sigma / alpha) is a monotone cubic of the timestep with a continuous slope. The timestep is (N - 1) * (1 - t):
    t = 0 is the last of the N timesteps and t = 1 the first. The ends are therefore as pure as the schedule makes
    them: for Stable Diffusion, alpha(0) = 0.068 and sigma(1) = 0.029.

    Args:
        alphas_cumprod: `(N,)`, strictly decreasing, in [0, 1]; the attribute of that name of a diffusers scheduler.
    """

    alphas_cumprod: Sequence[float] | Tensor

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.alphas_cumprod, dtype=torch.float64)
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(f"Expected alphas_cumprod of shape (N,) with N >= 2, got {tuple(values.shape)}.")
        if not (bool((values.diff() < 0).all()) and values[-1] >= 0 and values[0] <= 1):
            raise ValueError(
                "Expected alphas_cumprod strictly decreasing within [0, 1], from least to most noise, got "
                f"{values[0].item():g} ... {values[-1].item():g}. Is it betas? Then use VariancePreserving.from_betas."
            )
        # As tuples, equal schedules compare equal and are hashable.
        object.__setattr__(self, "alphas_cumprod", tuple(values.tolist()))

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> VariancePreserving:
        """Build the path from betas `(N,)`, each in (0, 1]: alphas_cumprod[k] is the product of 1 - beta up to k."""
        values = torch.as_tensor(betas, dtype=torch.float64)
        if not bool(((values > 0) & (values <= 1)).all()):
            raise ValueError(
                f"Expected betas in (0, 1], got {values.min().item():g} to {values.max().item():g}. "
                "For a cumulative product use VariancePreserving(alphas_cumprod)."
            )
        return cls((1 - values).cumprod(0))

    def with_pure_ends(self) -> VariancePreserving:
        """Return the path with its angles stretched to [0, pi / 2]: pure noise at t = 0 and pure data at t = 1."""
        first, last = self.angles[0], self.angles[-1]
        return VariancePreserving((torch.pi / 2 * (self.angles - first) / (last - first)).cos().square())

    def __repr__(self) -> str:
        first, *_, last = self.alphas_cumprod
        return f"VariancePreserving({len(self.alphas_cumprod)} timesteps, {first:g} ... {last:g})"

    @property
    def last_timestep(self) -> int:
        """Return N - 1, the timestep at t = 0."""
        return len(self.alphas_cumprod) - 1

    @cached_property
    def angles(self) -> Tensor:
        """Return atan(sigma / alpha) at the N timesteps, `(N,)` in float64, strictly increasing within [0, pi / 2]."""
        signal = torch.as_tensor(self.alphas_cumprod, dtype=torch.float64)
        return torch.atan2((1 - signal).sqrt(), signal.sqrt())

    @cached_property
    def _slopes(self) -> Tensor:
        """Compute the slopes of the cubic at the knots: harmonic means of the neighboring secants keep it monotone."""
        secants = self.angles.diff()
        inner = 2 / (1 / secants[1:] + 1 / secants[:-1])
        return torch.cat([secants[:1], inner, secants[-1:]])

    def angle(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the angle and its derivative with respect to the timestep, for any real timestep in [0, N - 1]."""
        index = timestep.detach().floor().clamp(0, self.last_timestep - 1).long()
        return self._cubic(index, timestep - index)

    def _cubic(self, index: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Hermite cubic and its derivative at index + r, r in [0, 1]."""
        angles, slopes = self.angles.to(r), self._slopes.to(r)
        start, rise = angles[index], angles[index + 1] - angles[index]
        before, after = slopes[index], slopes[index + 1]
        value = start + r * (before + r * (3 * rise - 2 * before - after + r * (before + after - 2 * rise)))
        slope = before + r * (2 * (3 * rise - 2 * before - after) + 3 * r * (before + after - 2 * rise))
        return value, slope

    def timestep_at(self, angle: Tensor) -> Tensor:
        """Return the real timestep of an angle; angles outside the schedule give its first or last timestep."""
        angles = self.angles.to(angle)
        angle = torch.clamp(angle, angles[0], angles[-1])
        index = (torch.searchsorted(angles, angle, right=True) - 1).clamp(0, self.last_timestep - 1)
        r = (angle - angles[index]) / (angles[index + 1] - angles[index])
        # Newton's method, starting from the secant's solution. The slope never vanishes; steps as uneven as 1 to 1e5
        # need ten iterations.
        for _ in range(10):
            value, slope = self._cubic(index, r)
            r = (r - (value - angle) / slope).clamp(0, 1)
        return index + r

    def coefficients(self, t: Tensor) -> Coefficients:
        angle, slope = self.angle(self.last_timestep * (1 - t))
        alpha, sigma, d_angle = angle.cos(), angle.sin(), -self.last_timestep * slope
        return Coefficients(alpha, sigma, d_alpha=-sigma * d_angle, d_sigma=alpha * d_angle)
