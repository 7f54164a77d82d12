"""Compute Frechet and kernel distances between feature sets, diversity per caption, and intervals over seeds.

Features can be any callable on uint8 images. With Inception-v3, the Frechet distance is the FID (arXiv:1706.08500).
Values for different features or sample sizes are not comparable.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor
from torch.nn import functional as F

Features = Callable[[Tensor], Tensor]
"""Maps images `(B, 3, H, W)` uint8 to features `(B, D)`."""


class FeatureStatistics:
    """Accumulate mean and covariance of features batch by batch, in float64.

    Batches are merged as in Chan, Golub and LeVeque (1983): sums of squares about the running mean, so that a large
    mean costs no precision.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features `(B, D)`, on any device and of any floating-point dtype."""
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
        """Return the unbiased covariance `(D, D)`, float64."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}.")
        return self._scatter / (self.count - 1)


def statistics_of(features: Iterable[Tensor]) -> FeatureStatistics:
    """Return the statistics of batches of features `(B, D)`."""
    statistics = None
    for batch in features:
        statistics = statistics or FeatureStatistics(batch.shape[-1])
        statistics.update(batch)
    if statistics is None:
        raise ValueError("statistics need at least one batch of features, got none.")
    return statistics


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Return the squared Frechet (2-Wasserstein) distance of the Gaussians with these means and covariances.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2), Eq. (6) of arXiv:1706.08500. The last trace is the sum of the
    singular values of C1^(1/2) C2^(1/2). This needs no root of a product that is not symmetric, and loses no precision
    with fewer images than dimensions (a singular covariance). Never negative: values below 0 from rounding are
    returned as 0.
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
        raise ValueError(f"features must be (P, M, D) with at least 2 pictures a prompt, got {tuple(features.shape)}.")
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
        raise ValueError("an interval needs the figure of at least one seed, got none.")
    if len(values) == 1:
        return Interval(values[0], None, tuple(values))
    from scipy.stats import t as student

    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(fmean(values), quantile * stdev(values) / math.sqrt(len(values)), tuple(values))
