"""Kernel distance between two sets of features: the KID (arXiv:1801.01401) where these are Inception-v3's.

Unlike the Frechet distance it is unbiased: few pictures do not raise it, and between equal sets it falls below zero as
often as above.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
