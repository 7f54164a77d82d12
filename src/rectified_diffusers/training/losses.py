"""The trainers' losses by name: of velocities, of the data they point at, and of the pictures that decodes to."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rectified_diffusers.flow.interpolation import per_example
from rectified_diffusers.flow.loss import pseudo_huber, velocity_loss
from rectified_diffusers.training.config import TrainerConfig
from rectified_diffusers.training.perceptual import DecodedDistance, load_lpips

TrainingLoss = Literal["l2", "pseudo_huber", "lpips", "lpips_huber"]


@dataclass(frozen=True)
class FlowLoss:
    """Compare a predicted velocity with the right one at x_t, one value per example.

    - l2, pseudo_huber: see `flow.loss.velocity_loss`.
    - lpips: LPIPS between the decoded data_hat = x_t + (1 - t) * velocity of the two, as InstaFlow's last stage.
    - lpips_huber: w * pseudo_huber(velocities) / d + lpips, d dimensions, of 2-RF++ (arXiv:2405.20320; the division is
      in its authors' code).

    In 2-RF++, which trains on all of [0, 1], w = t: near the data the pictures hardly depend on the velocity, at the
    noise they say it all. Losses of a few fixed times, t = 0 alone for a distillation, take w = 1 instead, without
    which the two losses would be one there.
    """

    kind: TrainingLoss
    decoded: DecodedDistance | None = None
    weigh_by_time: bool = False

    @classmethod
    def of(
        cls, kind: TrainingLoss, config: TrainerConfig, vae: Any, device: torch.device, weigh_by_time: bool = False
    ) -> "FlowLoss":
        """Make the loss, with LPIPS loaded to the device if it takes part."""
        if kind not in ("lpips", "lpips_huber"):
            return cls(kind)
        network = load_lpips(config.lpips_network, config.lpips_weights).to(device)
        return cls(kind, DecodedDistance(vae, network), weigh_by_time)

    def __call__(self, predicted: Tensor, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Give the loss of each example, `(B,)`.

        Args:
            predicted, velocity, x_t: `(B, C, H, W)`.
            t: `(B,)` in [0, 1].
        """
        if self.decoded is None:
            return velocity_loss(predicted, velocity, self.kind)  # pyright: ignore[reportArgumentType]
        remaining = per_example(1 - t, x_t)
        perceptual = self.decoded(x_t + remaining * predicted, x_t + remaining * velocity)
        if self.kind == "lpips":
            return perceptual
        huber = pseudo_huber(predicted - velocity) / x_t[0].numel()
        return (t * huber if self.weigh_by_time else huber) + perceptual
