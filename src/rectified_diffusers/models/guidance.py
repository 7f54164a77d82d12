"""Classifier-free guidance (arXiv:2207.12598), of predictions and of velocities: here and nowhere else.

`stock_guidance.py` finds out how the call of a stock pipeline guides.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rectified_diffusers.models.conditioning import concat, repeat
from rectified_diffusers.models.denoiser import Conditioning


def guide(null: Tensor, text: Tensor, guidance_scale: float) -> Tensor:
    """Return null + w * (text - null), guidance by the scale w."""
    return null + guidance_scale * (text - null)


def guided(
    predict: Callable[[Tensor, Tensor, Conditioning], Tensor],
    x: Tensor,
    time: Tensor,
    conditioning: Conditioning,
    null: Conditioning | None,
    guidance_scale: float,
) -> Tensor:
    """Return a guided prediction; its two forward passes run as one of twice the batch size.

    Args:
        predict: returns a prediction or a velocity for x, its times, and B rows of conditioning.
        null: conditioning of the empty prompt, of B rows or one; None for a single pass without guidance.
    """
    if null is None:
        return predict(x, time, conditioning)
    both = concat([repeat(null, len(x)), conditioning])
    of_null, of_text = predict(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
    return guide(of_null, of_text, guidance_scale)
