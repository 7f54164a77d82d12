"""Couplings: how noise and data are paired in a batch.

A coupling maps (noise, data, generator) to (noise, data). It keeps the order of the data, so that prompts and other
labels stay aligned.
"""

from __future__ import annotations

import torch
from torch import Tensor


def given(noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return the pairs unchanged: the coupling of reflow, where data is the teacher's flow of noise."""
    _check_same_shape(noise, data)
    return noise, data


def independent(noise: Tensor, data: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the data with freshly sampled noise: the coupling of a 1-rectified flow, independent of the given pairs.

    The noise is new rather than permuted. A permutation would keep some of the given pairs (in a batch of one, the
    pair itself).

    Args:
        noise: only its shape, dtype and device are used; it stands for N(0, 1).
        generator: on any device; a CPU generator gives the same noise on every device.
    """
    _check_same_shape(noise, data)
    fresh = torch.randn(noise.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return fresh.to(noise), data


def minibatch_optimal_transport(
    noise: Tensor, data: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Permute the noise to minimize the sum over the batch of ||data - noise||^2 (arXiv:2302.00482).

    The solution is exact (Hungarian method on the CPU): O(B^3), milliseconds at B = 256.
    """
    _check_same_shape(noise, data)
    from scipy.optimize import linear_sum_assignment  # imported here: the module needs only torch

    # The squared norms are the same for every pairing, so comparing inner products suffices. It also rounds less.
    products = data.detach().flatten(1).double().cpu() @ noise.detach().flatten(1).double().cpu().T
    _, partner = linear_sum_assignment(products.numpy(), maximize=True)
    return noise[torch.as_tensor(partner, device=noise.device)], data


def _check_same_shape(noise: Tensor, data: Tensor) -> None:
    if noise.shape != data.shape:
        raise ValueError(
            f"Expected noise and data of one shape, got {tuple(noise.shape)} and {tuple(data.shape)}. "
            "A pair is one row of each; encode the data to latents of the noise's shape first."
        )
