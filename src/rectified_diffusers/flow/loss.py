"""Losses with one value per example, `(B,)`, in float32 or wider. The caller averages or weights them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

LossKind = Literal["l2", "pseudo_huber"]
LOSS_KINDS: tuple[LossKind, ...] = get_args(LossKind)


def velocity_loss(predicted: Tensor, velocity: Tensor, kind: LossKind = "l2") -> Tensor:
    """Compute the loss between velocities, Eq. (1) of arXiv:2209.03003 with l2 and x_t on the straight path.

    l2 is the mean over the dimensions of one example. For pseudo_huber, see `pseudo_huber`: it grows with the norm,
    not with the mean, so the two kinds differ in scale.
    """
    return _loss(_error(predicted, velocity), kind)


def endpoint_loss(predicted_data: Tensor, data: Tensor, kind: LossKind = "l2") -> Tensor:
    """Compute the distillation loss between an estimate of the data, x_t + (1 - t) * velocity, and the data.

    On the straight path it is (1 - t)^2 times `velocity_loss` in l2. The two are equal at t = 0, where distillation
    trains.
    """
    return _loss(_error(predicted_data, data), kind)


def pseudo_huber(error: Tensor) -> Tensor:
    """Return sqrt(||error||^2 + c^2) - c, c = 0.00054 * d, per example of d dimensions (arXiv:2405.20320)."""
    c = 0.00054 * error[0].numel()
    squared = error.square().flatten(1).sum(1)
    return squared / ((squared + c * c).sqrt() + c)  # the same value without cancellation at small errors


def perceptual_loss(predicted_images: Tensor, images: Tensor, network: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Compute a perceptual distance between decoded images `(B, 3, H, W)` in [-1, 1].

    Args:
        network: maps the two batches to B distances, of shape `(B,)` or `(B, 1, 1, 1)`, such as
            `lpips.LPIPS(net="alex")`.
    """
    _check_same_shape(predicted_images, images)
    distance = network(predicted_images, images)
    if distance.numel() != len(images):
        raise ValueError(
            f"Expected one distance for each of {len(images)} examples, got shape {tuple(distance.shape)}. "
            "Disable the network's own reduction and spatial maps."
        )
    return distance.reshape(len(images))


def _error(predicted: Tensor, target: Tensor) -> Tensor:
    _check_same_shape(predicted, target)
    dtype = torch.promote_types(torch.promote_types(predicted.dtype, target.dtype), torch.float32)
    return predicted.to(dtype) - target.to(dtype)


def _loss(error: Tensor, kind: LossKind) -> Tensor:
    if kind == "l2":
        return error.square().flatten(1).mean(1)
    if kind == "pseudo_huber":
        return pseudo_huber(error)
    raise ValueError(f"Expected a kind of loss out of {', '.join(LOSS_KINDS)}, got {kind!r}.")


def _check_same_shape(predicted: Tensor, target: Tensor) -> None:
    if predicted.shape != target.shape:
        shapes = f"{tuple(predicted.shape)} and {tuple(target.shape)}"
        raise ValueError(f"Expected prediction and target of one shape, got {shapes}. Nothing is broadcast.")
