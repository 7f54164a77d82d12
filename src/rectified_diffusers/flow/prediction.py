"""The view of a diffusion network as a straight flow.

With x = alpha * data + sigma * noise, a network predicts one of
    epsilon       noise
    v_prediction  alpha * noise - sigma * data    (the sign of diffusers and of arXiv:2202.00512: not the velocity)
    sample        data
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .interpolation import VariancePreserving, combine, per_example

PredictionType = Literal["epsilon", "v_prediction", "sample"]
DIFFUSION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)


def scale_of(t: Tensor) -> Tensor:
    """Return alpha + sigma = 1 / sqrt(t^2 + (1 - t)^2) of the sample that matches x_t: sample = scale * x_t."""
    return 1 / torch.hypot(t, 1 - t)


@dataclass(frozen=True)
class DiffusionAsFlow:
    """View of a diffusion network (epsilon, v_prediction or sample) as the velocity of a straight rectified flow.

    A point x_t of the straight path and a sample of the diffusion path carry the same information for the network when
    their signal-to-noise ratios are equal (cf. 2-RF++, arXiv:2405.20320, and Diff2Flow, arXiv:2506.02221):

        timestep = the real timestep with sigma / alpha = (1 - t) / t
        sample   = x_t * (alpha + sigma) = x_t / sqrt(t^2 + (1 - t)^2)

    Usage, for a U-Net `(sample, timestep) -> prediction`:

        velocity = as_flow(unet, x_t, t)

    A schedule does not reach pure noise or pure data: Stable Diffusion's covers 0.064 < t < 0.972. Outside this range,
    the network is evaluated at its last (or first) timestep, as if the sample were there. The velocity then points
    from x_t to the estimated data (or from the estimated noise to x_t). It is finite on [0, 1], continuous in t, and
    equal to data - noise inside the schedule. Sampling from t = 0 therefore has the same bias as diffusion sampling
    from pure noise at the last timestep: alpha of that timestep, 0.068 for Stable Diffusion.

    Args:
        schedule: the diffusion path.
        prediction_type: what the network predicts.
    """

    schedule: VariancePreserving
    prediction_type: PredictionType

    def __post_init__(self) -> None:
        if self.prediction_type not in DIFFUSION_TYPES:
            raise ValueError(
                f"Expected a prediction type out of {', '.join(DIFFUSION_TYPES)}, got {self.prediction_type!r}. A "
                "network that predicts the velocity needs no DiffusionAsFlow."
            )

    def __call__(self, predict: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity data - noise at x_t `(B, ...)` and t `(B,)`, with the shape and dtype of x_t.

        Args:
            predict: returns the network's prediction for its own sample `(B, ...)` and timesteps `(B,)`.
        """
        prediction = predict(*self.network_input(x_t, t))
        # Near the noise end, epsilon is divided by alpha, 0.068 at the end: not in half precision.
        precise = torch.promote_types(x_t.dtype, torch.float32)
        return self.velocity(prediction.to(precise), x_t.to(precise), t).to(x_t.dtype)

    def _sample(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Scale x_t to the diffusion path, in the dtype of x_t."""
        return (per_example(scale_of(t), x_t) * x_t).to(x_t.dtype)

    def _angle(self, t: Tensor) -> Tensor:
        """Return atan(sigma / alpha), clamped to the schedule: the signal-to-noise ratio that the network receives."""
        angles = self.schedule.angles.to(t)
        return torch.clamp(torch.atan2(1 - t, t), angles[0], angles[-1])

    def timestep_of(self, t: Tensor) -> Tensor:
        """Return the real diffusion timestep in [0, N - 1] that matches flow time t, `(B,)`, clamped to that range."""
        return self.schedule.timestep_at(self._angle(t))

    def time_of(self, timestep: Tensor) -> Tensor:
        """Return the flow time that matches a real diffusion timestep, `(B,)`: t = alpha / (alpha + sigma)."""
        angle, _ = self.schedule.angle(timestep)
        alpha, sigma = angle.cos(), angle.sin()
        return alpha / (alpha + sigma)

    @property
    def start(self) -> float:
        """Return the flow time at which the schedule starts, with its last timestep."""
        return self.time_of(torch.tensor([self.schedule.last_timestep], dtype=torch.float64)).item()

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sample and the timestep, `(B,)`, to pass to the diffusion network for x_t at t."""
        return self._sample(x_t, t), self.timestep_of(t)

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert the network's prediction for `network_input(x_t, t)` to the velocity data - noise at x_t."""
        sample = self._sample(x_t, t)
        noise, data = self._solve_pair(prediction, sample, self._angle(t))
        # (data - x_t) / (1 - t) in the noisy half, (x_t - noise) / t in the other: never divides by less than 1/2, and
        # never uses the end that the clamped timestep does not determine.
        weight, late = 1 / torch.maximum(t, 1 - t), t >= 0.5
        zero = torch.zeros_like(t)
        ends = combine(torch.where(late, zero, weight), data, torch.where(late, -weight, zero), noise)
        return combine(torch.ones_like(t), ends, torch.where(late, weight, -weight), x_t)

    def _solve_pair(self, prediction: Tensor, sample: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        """Solve sample = alpha * data + sigma * noise and the definition of the prediction for (noise, data)."""
        alpha, sigma = angle.cos(), angle.sin()
        if self.prediction_type == "epsilon":
            _check_divisor(alpha, "epsilon", "alpha", "data")
            return prediction, combine(1 / alpha, sample, -sigma / alpha, prediction)
        if self.prediction_type == "sample":
            _check_divisor(sigma, "sample", "sigma", "noise")
            return combine(1 / sigma, sample, -alpha / sigma, prediction), prediction
        power = alpha.square() + sigma.square()  # 1 up to rounding
        noise = combine(sigma / power, sample, alpha / power, prediction)
        return noise, combine(alpha / power, sample, -sigma / power, prediction)


def _check_divisor(divisor: Tensor, kind: str, name: str, absent: str) -> None:
    # Zero up to rounding: cos(pi / 2) is 6e-17 in float64.
    if bool((divisor.abs() <= 4 * torch.finfo(divisor.dtype).eps).any()):
        raise ValueError(
            f"A prediction of type {kind!r} does not determine (noise, data) where {name} = 0: x_t has no {absent} "
            "there. Use a network that predicts v_prediction, or keep t away from that end."
        )
