"""Distances between sets of features: Frechet, kernel; diversity within a caption; intervals over seeds.

The features are any callable on uint8 images; Inception-v3 makes the Frechet distance the FID (arXiv:1706.08500).
Values of different features or sample sizes do not compare.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor
from torch.nn import functional as F

Features = Callable[[Tensor], Tensor]
"""Images `(B, 3, H, W)` uint8 to features `(B, D)`."""


class FeatureStatistics:
    """Mean and covariance of features that come batch by batch, accumulated in float64.

    Batches are merged as in Chan, Golub and LeVeque (1983): sums of squares about the running mean, so that a large
    mean costs no digits.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Take in features `(B, D)` of any device and floating dtype."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be (B, {len(self.mean)}), got {tuple(features.shape)}.")
        if not torch.isfinite(features).all():
            raise ValueError("features must be finite, got NaN or infinity: look at the images and the extractor.")
        if len(features) == 0:
            return
        features = features.detach().to("cpu", torch.float64)
        total = self.count + len(features)
        batch_mean = features.mean(dim=0)
        centred = features - batch_mean
        shift = batch_mean - self.mean
        self._scatter += centred.T @ centred + shift.outer(shift) * (self.count * len(features) / total)
        self.mean = self.mean + shift * (len(features) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance `(D, D)`, float64."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}.")
        return self._scatter / (self.count - 1)


def statistics_of(features: Iterable[Tensor]) -> FeatureStatistics:
    """Accumulate batches of features `(B, D)`."""
    statistics = None
    for batch in features:
        statistics = statistics or FeatureStatistics(batch.shape[-1])
        statistics.update(batch)
    if statistics is None:
        raise ValueError("statistics need at least one batch of features, got none.")
    return statistics


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians with these means and covariances.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2), Eq. (6) of arXiv:1706.08500. The last trace is the sum of the
    singular values of C1^(1/2) C2^(1/2): it needs no root of a product that is not symmetric, and fewer images than
    dimensions (a singular covariance) cost no digits. Never negative: what rounding leaves below 0 is returned as 0.
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(
            f"both sets need features of one size, got {len(first.mean)} and {len(second.mean)}: "
            "use the same extractor for both."
        )
    cross = torch.linalg.svdvals(_square_root(first.covariance) @ _square_root(second.covariance)).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * cross
    return max(0.0, distance.item())


def _square_root(covariance: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix; eigenvalues below 0 are rounding and count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@dataclass(frozen=True)
class KernelDistance:
    """Mean over subsets of the squared maximum mean discrepancy, and its standard deviation between them."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def squared_discrepancy(first: Tensor, second: Tensor) -> float:
    """Unbiased squared MMD of features `(N, D)` and `(M, D)` under k(x, y) = (x . y / D + 1)^3.

    Means of k within both sets, without the pairs of a feature with itself, less twice the mean between them.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"both sets need features (N, D) of one size, got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    if min(len(first), len(second)) < 2:
        raise ValueError(f"each set needs at least 2 features, got {len(first)} and {len(second)}.")
    x, y = first.double(), second.double()
    within = _mean_of_pairs(x) + _mean_of_pairs(y)
    return (within - 2 * _kernel(x, y).mean()).item()


def kernel_distance(
    first: Tensor, second: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Estimate the squared MMD over random subsets, as the KID is reported: 100 subsets of 1,000 features.

    Sets that are smaller than `subset_size` are taken whole, once.
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
    """Mean cosine distance between pictures of one prompt, over all pairs of them and all prompts; in [0, 2].

    0 is one picture over and over. Compare it with the figure of real pictures, not with 1: a model can be too
    diverse, too, and noise is.

    Args:
        features: of `M` pictures of each of `P` prompts, `(P, M, D)`.
    """
    if features.ndim != 3 or features.shape[1] < 2 or len(features) == 0:
        raise ValueError(f"features must be (P, M, D) with at least 2 pictures a prompt, got {tuple(features.shape)}.")
    unit = F.normalize(features.double(), dim=-1)
    cosine = unit @ unit.transpose(1, 2)  # (P, M, M)
    first, second = torch.triu_indices(features.shape[1], features.shape[1], offset=1)
    return (1 - cosine[:, first, second]).mean().item()


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean of a figure over seeds, with the half width of its 95% confidence interval.

    Attributes:
        half_width: t * s / sqrt(n), with Student's t of n - 1 degrees of freedom; None for a single seed, which says
            nothing about the spread.
        values: the figure of each seed.
    """

    mean: float
    half_width: float | None
    values: tuple[float, ...]

    def __format__(self, spec: str) -> str:
        """Format mean and half width with one spec: `f"{interval:.1f}"` is `21.4 ± 0.3`."""
        mean = format(self.mean, spec)
        return mean if self.half_width is None else f"{mean} ± {format(self.half_width, spec)}"


def interval_of(values: Sequence[float]) -> Interval:
    """Give the interval of a figure from its values, one per seed."""
    if not values:
        raise ValueError("an interval needs the figure of at least one seed, got none.")
    if len(values) == 1:
        return Interval(values[0], None, tuple(values))
    from scipy.stats import t as student

    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(fmean(values), quantile * stdev(values) / math.sqrt(len(values)), tuple(values))
