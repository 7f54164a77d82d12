"""Who pairs with whom in a batch. A coupling maps (noise, data, generator) to (noise, data) and leaves data in place,
so that prompts and other labels of the data stay in step."""

from __future__ import annotations

import torch
from torch import Tensor


def given(noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Keep the pairs as they come: reflow's coupling, in which data is the teacher's flow of noise."""
    _check_same_shape(noise, data)
    return noise, data


def independent(noise: Tensor, data: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the noise anew, so that nothing of the given pairing is left: the coupling of a 1-rectified flow.

    Fresh noise rather than a permutation, which would return some given pairs (in a batch of one, the pair itself).

    Args:
        noise: only its shape, dtype and device are used; it stands for N(0, 1).
        generator: of any device; a CPU generator gives the same noise on every device.
    """
    _check_same_shape(noise, data)
    fresh = torch.randn(noise.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return fresh.to(noise), data


def minibatch_optimal_transport(
    noise: Tensor, data: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Permute the noise so that the sum over the batch of ||data - noise||^2 is least (arXiv:2302.00482).

    Exact, by the Hungarian method on the CPU: O(B^3), milliseconds at B = 256.
    """
    _check_same_shape(noise, data)
    from scipy.optimize import linear_sum_assignment  # here, because the module itself needs torch alone

    # The squared norms are the same in every pairing, so the inner products decide; they also round less.
    products = data.detach().flatten(1).double().cpu() @ noise.detach().flatten(1).double().cpu().T
    _, partner = linear_sum_assignment(products.numpy(), maximize=True)
    return noise[torch.as_tensor(partner, device=noise.device)], data


def _check_same_shape(noise: Tensor, data: Tensor) -> None:
    if noise.shape != data.shape:
        raise ValueError(
            f"Expected noise and data of one shape, got {tuple(noise.shape)} and {tuple(data.shape)}. "
            "A pair is one row of each; encode the data to latents of the noise's shape first."
        )
