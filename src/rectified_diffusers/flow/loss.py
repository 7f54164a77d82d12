"""Losses with one value per example, `(B,)`, in float32 or wider. The caller averages or weights them."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

LossKind = Literal["l2", "pseudo_huber"]
LOSS_KINDS: tuple[LossKind, ...] = get_args(LossKind)


def velocity_loss(predicted: Tensor, velocity: Tensor, kind: LossKind = "l2") -> Tensor:
    """Compute the loss between velocities, Eq. (1) of arXiv:2209.03003 with l2 and x_t on the straight path.

    l2 is the mean over the dimensions of one example. For pseudo_huber, see `pseudo_huber`: it grows with the norm,
    not with the mean, so the two kinds differ in scale. Between estimates of the data, x_t + (1 - t) * velocity, l2 is
    (1 - t)^2 times as large; at t = 0, where distillation to one step trains, the two are equal.
    """
    if predicted.shape != velocity.shape:
        shapes = f"{tuple(predicted.shape)} and {tuple(velocity.shape)}"
        raise ValueError(f"Expected prediction and target of one shape, got {shapes}. Nothing is broadcast.")
    dtype = torch.promote_types(torch.promote_types(predicted.dtype, velocity.dtype), torch.float32)
    error = predicted.to(dtype) - velocity.to(dtype)
    if kind == "l2":
        return error.square().flatten(1).mean(1)
    if kind == "pseudo_huber":
        return pseudo_huber(error)
    raise ValueError(f"Expected a kind of loss out of {', '.join(LOSS_KINDS)}, got {kind!r}.")


def pseudo_huber(error: Tensor) -> Tensor:
    """Return sqrt(||error||^2 + c^2) - c, c = 0.00054 * d, per example of d dimensions (arXiv:2405.20320)."""
    c = 0.00054 * error[0].numel()
    squared = error.square().flatten(1).sum(1)
    return squared / ((squared + c * c).sqrt() + c)  # the same value without cancellation at small errors
