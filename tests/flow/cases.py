"""What the tests of flow/ share: every interpolation, random pairs, and Gaussian data, whose flow is known exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rectified_diffusers.flow import Cosine, Interpolation, Straight, VariancePreserving

# Stable Diffusion's schedule ("scaled_linear"), and the same rescaled to end in pure noise.
SD_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SD_ALPHAS_CUMPROD = (1 - SD_BETAS).cumprod(0)


def rescale_to_pure_noise(alphas_cumprod: Tensor) -> Tensor:
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


PURE_ENDS = torch.linspace(0, torch.pi / 2, 50, dtype=torch.float64).cos().square()  # exactly 1 ... 0 but for rounding
PURE_ENDS[-1] = 0


INTERPOLATIONS: tuple[Interpolation, ...] = (
    Straight(),
    Cosine(),
    VariancePreserving.from_betas(SD_BETAS),
    VariancePreserving(PURE_ENDS),
)
# The first has B == C == H == W: there a coefficient put on the wrong axis gives no error, only wrong numbers.
SHAPES = ((4, 4, 4, 4), (3, 4, 2, 5), (2, 7))


def draw_pair(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    noise, data = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise, data


def spread(t: float, count: int) -> Tensor:
    """Return a different time for each example, `(count,)` within 0.02 of t."""
    return t + torch.linspace(-0.02, 0.02, count, dtype=torch.float64)


@dataclass(frozen=True)
class Gaussian:
    """Data ~ N(mean, std^2), independent of the noise: x_t ~ N(alpha mean, alpha^2 std^2 + sigma^2)."""

    interpolation: Interpolation
    mean: float = 0.7
    std: float = 0.4

    def _moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        at = self.interpolation.coefficients(t.to(x.dtype))
        alpha, sigma, d_alpha, d_sigma = (
            c.reshape(-1, *[1] * (x.ndim - 1)) for c in (at.alpha, at.sigma, at.d_alpha, at.d_sigma)
        )
        return alpha, sigma, d_alpha, d_sigma, alpha**2 * self.std**2 + sigma**2

    def expected_pair(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E[noise | x_t = x] and E[data | x_t = x]."""
        alpha, sigma, _, _, variance = self._moments(t, x)
        centred = (x - alpha * self.mean) / variance
        return sigma * centred, self.mean + alpha * self.std**2 * centred

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[velocity | x_t = x], the field that a perfect network learns."""
        _, _, d_alpha, d_sigma, _ = self._moments(t, x)
        noise, data = self.expected_pair(x, t)
        return d_alpha * data + d_sigma * noise

    def flow(self, x: Tensor, start: float, end: float) -> Tensor:
        """Where dx/dt = velocity takes x: its distance from the mean in standard deviations is kept."""
        alpha, _, _, _, variance = self._moments(torch.full(x.shape[:1], start), x)
        end_alpha, _, _, _, end_variance = self._moments(torch.full(x.shape[:1], end), x)
        return end_alpha * self.mean + (end_variance / variance).sqrt() * (x - alpha * self.mean)
