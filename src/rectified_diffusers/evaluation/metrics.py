"""Compute Frechet and kernel distances between feature sets, and diversity per caption.

Features can be any callable on uint8 images. With Inception-v3, the Frechet distance is the FID (arXiv:1706.08500).
Values for different features or sample sizes are not comparable.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rectified_diffusers.evaluation.intervals import GROUPS, Interval, jackknife, ratio_of


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Frechet (2-Wasserstein) distance of the Gaussians fitted to features `(N, D)` and `(M, D)`.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2), Eq. (6) of arXiv:1706.08500, in float64. The last trace is the
    sum of the singular values of C1^(1/2) C2^(1/2), or of X1 X2^T for centered features X over the root of their
    number less 1, whichever matrix is smaller. This needs no root of a product that is not symmetric, and loses no
    precision with fewer images than dimensions (a singular covariance). Never negative: values below 0 from rounding
    are returned as 0.
    """
    (mean, x), (other_mean, y) = _centered(first), _centered(second)
    if max(len(x), len(y)) <= x.shape[1]:
        cross = torch.linalg.svdvals(x @ y.T).sum()
    else:
        cross = torch.linalg.svdvals(_square_root(x.T @ x) @ _square_root(y.T @ y)).sum()
    distance = (mean - other_mean).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    return max(0.0, distance.item())


def _centered(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean `(D,)` and X `(N, D)` with the unbiased covariance X^T X, float64 on the CPU."""
    if len(features) < 2 or not torch.isfinite(features).all():
        raise ValueError(f"Expected finite features of at least 2 images, got {len(features)} images or NaN.")
    features = features.detach().to("cpu", torch.float64)
    mean = features.mean(dim=0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5


def _square_root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semidefinite matrix.

    Eigenvalues below 0 come from rounding and count as 0.
    """
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def squared_discrepancy(first: Tensor, second: Tensor) -> float:
    """Return the unbiased squared MMD of features `(N, D)` and `(M, D)` with kernel k(x, y) = (x . y / D + 1)^3.

    It is the sum of the means of k within each set, excluding pairs of a feature with itself, minus twice the mean of
    k between the sets.
    """
    x, y = first.double(), second.double()
    within = _mean_of_pairs(x) + _mean_of_pairs(y)
    return (within - 2 * _kernel(x, y).mean()).item()


def kernel_distance(first: Tensor, second: Tensor, subsets: int = 100, subset_size: int = 1000) -> float:
    """Estimate the squared MMD as the mean over random subsets, by default as the KID is reported.

    If both sets have the same size of at most `subset_size`, the full sets are used once.
    """
    size = min(subset_size, len(first), len(second))
    if size == len(first) == len(second):
        return squared_discrepancy(first, second)
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(subsets):
        chosen = [features[torch.randperm(len(features), generator=generator)[:size]] for features in (first, second)]
        values.append(squared_discrepancy(*chosen))
    return torch.tensor(values, dtype=torch.float64).mean().item()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(x: Tensor) -> Tensor:
    kernel = _kernel(x, x)
    return (kernel.sum() - kernel.trace()) / (len(x) * (len(x) - 1))


def frechet_interval(first: Tensor, second: Tensor, groups: Tensor) -> Interval:
    """Return the Frechet distance with its interval over images; image i of both sets belongs to group `groups[i]`."""
    return jackknife(lambda kept: frechet_distance(first[kept], second[kept]), groups)


def kernel_interval(first: Tensor, second: Tensor, groups: Tensor) -> Interval:
    """Return the kernel distance with its interval over images; image i of both sets belongs to group `groups[i]`.

    The mean is that of `kernel_distance`. The interval is that of `squared_discrepancy` of the full sets, computed
    from the sums of the kernel over pairs of groups.
    """
    x, y = first.double(), second.double()
    x_x, y_y, x_y = (_sums_over_groups(*pair, groups) for pair in ((x, x), (y, y), (x, y)))

    def discrepancy(kept: Tensor) -> float:
        count, present = int(kept.sum()), groups[kept].unique()
        within, between = (x_x + y_y)[present][:, present].sum(), x_y[present][:, present].sum()
        return (within / (count * (count - 1)) - 2 * between / count**2).item()

    mean = kernel_distance(first, second)
    return replace(jackknife(discrepancy, groups), mean=mean, values=(mean,))


def _sums_over_groups(x: Tensor, y: Tensor, groups: Tensor, chunk: int = 1024) -> Tensor:
    """Return the sums of the kernel over pairs of groups `(GROUPS, GROUPS)`, without pairs of one feature."""
    members = F.one_hot(groups, GROUPS).double()
    sums = torch.zeros(GROUPS, GROUPS, dtype=torch.float64)
    for first in range(0, len(x), chunk):
        kernel = _kernel(x[first : first + chunk], y)
        if x is y:
            kernel.diagonal(first).zero_()
        sums += members[first : first + chunk].T @ kernel @ members
    return sums


def diversity(features: Tensor) -> float:
    """Return the mean cosine distance between images of one prompt, over all pairs and all prompts; in [0, 2].

    0 means identical images. Compare the value with that of real images, not with 1: a model can also be too diverse,
    as noise is.

    Args:
        features: `(P, M, D)` of M images, at least 2, for each of P prompts.
    """
    unit = F.normalize(features.double(), dim=-1)
    cosine = unit @ unit.transpose(1, 2)  # (P, M, M)
    first, second = torch.triu_indices(features.shape[1], features.shape[1], offset=1)
    return (1 - cosine[:, first, second]).mean().item()


def diversity_interval(features: Tensor, groups: Tensor) -> Interval:
    """Return the diversity of features `(P, M, D)` with its interval over prompts, of groups `(P,)`."""
    return jackknife(lambda kept: diversity(features[kept]), groups)


def mean_interval(values: Tensor, groups: Tensor) -> Interval:
    """Return the mean of one value per image `(N,)` with its interval over images."""
    return jackknife(lambda kept: values[kept].double().mean().item(), groups)


def transport_cost(noise: Tensor, data: Tensor) -> dict[str, Interval]:
    """Return the transport cost of a coupling, with intervals over its pairs.

    - `coupled`: C = E |data - noise|^2 over the pairs, per dimension;
    - `independent`: the same for the independent coupling: each noise with the data of all other pairs;
    - `ratio`: the first divided by the second. 1 is the independent coupling.

    An exact reflow never increases the cost (arXiv:2209.03003). A low cost alone does not mean a good reflow: an
    undertrained one, whose data are blurred, lowers the cost as well.

    Args:
        noise, data: the pairs `(N, ...)`, at least 3.
    """
    if noise.shape != data.shape or len(noise) < 3:
        raise ValueError(
            f"Expected noise and data of at least 3 pairs, got {tuple(noise.shape)} and {tuple(data.shape)}."
        )
    noise, data = noise.flatten(1).double(), data.flatten(1).double()
    groups, size = torch.arange(len(noise)) % GROUPS, noise.shape[1]
    norms, inner = (data.square() + noise.square()).sum(dim=1), (data * noise).sum(dim=1)  # (N,)
    of_group = F.one_hot(groups, GROUPS).double().T
    noise_sums, data_sums = of_group @ noise, of_group @ data  # (GROUPS, D)

    def independent(kept: Tensor) -> float:
        present, count = groups[kept].unique(), int(kept.sum())
        products = noise_sums[present].sum(dim=0) @ data_sums[present].sum(dim=0) - inner[kept].sum()
        return ((norms[kept].mean() - 2 * products / (count * (count - 1))) / size).item()

    cost, other = mean_interval((norms - 2 * inner) / size, groups), jackknife(independent, groups)
    ratio = ratio_of(cost, other)
    return {"coupled": cost, "independent": other} | ({"ratio": ratio} if ratio else {})
