"""Compute Frechet and kernel distances between feature sets, diversity per caption, and intervals over seeds.

Features can be any callable on uint8 images. With Inception-v3, the Frechet distance is the FID (arXiv:1706.08500).
Values for different features or sample sizes are not comparable.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor
from torch.nn import functional as F


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Frechet (2-Wasserstein) distance of the Gaussians fitted to features `(N, D)` and `(M, D)`.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2), Eq. (6) of arXiv:1706.08500, in float64. The last trace is the
    sum of the singular values of C1^(1/2) C2^(1/2). This needs no root of a product that is not symmetric, and loses
    no precision with fewer images than dimensions (a singular covariance). Never negative: values below 0 from
    rounding are returned as 0.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"Expected features (N, D) and (M, D), got {tuple(first.shape)} and {tuple(second.shape)}.")
    (mean, covariance), (other_mean, other_covariance) = _moments(first), _moments(second)
    cross = torch.linalg.svdvals(_square_root(covariance) @ _square_root(other_covariance)).sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * cross
    return max(0.0, distance.item())


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean `(D,)` and unbiased covariance `(D, D)`, float64 on the CPU."""
    if len(features) < 2 or not torch.isfinite(features).all():
        raise ValueError(f"Expected finite features of at least 2 images, got {len(features)} images or NaN.")
    features = features.detach().to("cpu", torch.float64)
    mean = features.mean(dim=0)
    centered = features - mean
    return mean, centered.T @ centered / (len(features) - 1)


def _square_root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semidefinite matrix.

    Eigenvalues below 0 come from rounding and count as 0.
    """
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation of the squared maximum mean discrepancy over subsets."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def squared_discrepancy(first: Tensor, second: Tensor) -> float:
    """Return the unbiased squared MMD of features `(N, D)` and `(M, D)` with kernel k(x, y) = (x . y / D + 1)^3.

    It is the sum of the means of k within each set, excluding pairs of a feature with itself, minus twice the mean of
    k between the sets.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"Both sets need features (N, D) of one size, got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    if min(len(first), len(second)) < 2:
        raise ValueError(f"Each set needs at least 2 features, got {len(first)} and {len(second)}.")
    x, y = first.double(), second.double()
    within = _mean_of_pairs(x) + _mean_of_pairs(y)
    return (within - 2 * _kernel(x, y).mean()).item()


def kernel_distance(
    first: Tensor, second: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Estimate the squared MMD over random subsets, by default 100 subsets of 1,000 features as the KID is reported.

    If both sets have the same size of at most `subset_size`, the full sets are used once.
    """
    size = min(subset_size, len(first), len(second))
    if size == len(first) == len(second):
        return KernelDistance(squared_discrepancy(first, second), 0.0, 1, size)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        chosen = [features[torch.randperm(len(features), generator=generator)[:size]] for features in (first, second)]
        values.append(squared_discrepancy(*chosen))
    values = torch.tensor(values, dtype=torch.float64)
    return KernelDistance(values.mean().item(), values.std(correction=0).item(), subsets, size)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(x: Tensor) -> Tensor:
    kernel = _kernel(x, x)
    return (kernel.sum() - kernel.trace()) / (len(x) * (len(x) - 1))


def diversity(features: Tensor) -> float:
    """Return the mean cosine distance between images of one prompt, over all pairs and all prompts; in [0, 2].

    0 means identical images. Compare the value with that of real images, not with 1: a model can also be too diverse,
    as noise is.

    Args:
        features: features `(P, M, D)` of `M` images for each of `P` prompts.
    """
    if features.ndim != 3 or features.shape[1] < 2 or len(features) == 0:
        raise ValueError(f"Expected features (P, M, D) of at least 2 images per prompt, got {tuple(features.shape)}.")
    unit = F.normalize(features.double(), dim=-1)
    cosine = unit @ unit.transpose(1, 2)  # (P, M, M)
    first, second = torch.triu_indices(features.shape[1], features.shape[1], offset=1)
    return (1 - cosine[:, first, second]).mean().item()


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean of a metric over seeds, with the half width of its 95% confidence interval.

    Attributes:
        half_width: t * s / sqrt(n), with Student's t for n - 1 degrees of freedom. None for a single seed, which
            gives no information about the spread.
        values: the metric's value for each seed.
    """

    mean: float
    half_width: float | None
    values: tuple[float, ...]

    def __format__(self, spec: str) -> str:
        """Format mean and half width with the same spec: `f"{interval:.1f}"` is `21.4 ± 0.3`."""
        mean = format(self.mean, spec)
        return mean if self.half_width is None else f"{mean} ± {format(self.half_width, spec)}"


def interval_of(values: Sequence[float]) -> Interval:
    """Return the interval of a metric from its values, one per seed."""
    if not values:
        raise ValueError("An interval needs the value of at least one seed, got none.")
    if len(values) == 1:
        return Interval(values[0], None, tuple(values))
    from scipy.stats import t as student

    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(fmean(values), quantile * stdev(values) / math.sqrt(len(values)), tuple(values))
