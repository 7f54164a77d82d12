"""Conversions between prediction types, and the view of a diffusion network as a straight flow.

Conversions go through the pair (noise, data). With x_t = alpha * data + sigma * noise, the four prediction types are
    velocity      d_alpha * data + d_sigma * noise
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

from .interpolation import Coefficients, Interpolation, VariancePreserving, combine, per_example

PredictionType = Literal["velocity", "epsilon", "v_prediction", "sample"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
DIFFUSION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")


def to_pair(
    prediction: Tensor, x_t: Tensor, t: Tensor, prediction_type: PredictionType, interpolation: Interpolation
) -> tuple[Tensor, Tensor]:
    """Return the pair (noise, data) that x_t and the prediction determine.

    The pair is well defined everywhere for `v_prediction`, and for `velocity` on the straight, cosine and variance
    preserving paths. `epsilon` divides by alpha and `sample` by sigma. This multiplies the network's error by 1 /
    alpha near the noise end and by 1 / sigma near the data end.

    Args:
        prediction: `(B, ...)`, the shape of x_t.
        t: `(B,)` in [0, 1].

    Raises:
        ValueError: the divisor is zero, so the pair is undetermined.
    """
    return _solve_pair(prediction, x_t, interpolation.coefficients(t), prediction_type)


def from_pair(
    noise: Tensor, data: Tensor, t: Tensor, prediction_type: PredictionType, interpolation: Interpolation
) -> Tensor:
    """Return what a network of this prediction type should predict for the pair at t, `(B,)`."""
    at = interpolation.coefficients(t)
    if prediction_type == "velocity":
        return combine(at.d_alpha, data, at.d_sigma, noise)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return combine(at.alpha, noise, -at.sigma, data)
    if prediction_type == "sample":
        return data
    raise _unknown(prediction_type)


def match_signal_to_noise(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the time of the straight path with the same signal-to-noise ratio: t = alpha / (alpha + sigma).

    At that time, x_t of the straight path is x / (alpha + sigma), for x = alpha * data + sigma * noise.
    """
    return alpha / (alpha + sigma)


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

    A schedule does not reach pure noise or pure data: Stable Diffusion's covers 0.064 < t < 0.972 (sigma = 1 - t up to
    0.936). Outside this range, the network is evaluated at its last (or first) timestep, and its prediction is
    interpreted as if the sample were at that timestep: the sample is treated as slightly less (more) noisy than it is.
    The velocity then points straight from x_t to the data estimated this way (towards the noise end), or straight from
    the noise estimated this way to x_t (towards the data end). It is finite on all of [0, 1], continuous in t, and
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
                "Expected a diffusion network's prediction, 'epsilon', 'v_prediction' or 'sample', got "
                f"{self.prediction_type!r}. A network that predicts the velocity needs no DiffusionAsFlow; use it as "
                "it is."
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
        return match_signal_to_noise(angle.cos(), angle.sin())

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
        angle = self._angle(t)
        alpha, sigma = angle.cos(), angle.sin()
        at = Coefficients(alpha, sigma, d_alpha=-sigma, d_sigma=alpha)  # by the angle; no prediction type uses d_*
        noise, data = _solve_pair(prediction, sample, at, self.prediction_type)
        # (data - x_t) / (1 - t) in the noisy half, (x_t - noise) / t in the other: never divides by less than 1/2, and
        # never uses the end that the clamped timestep does not determine.
        weight, late = 1 / torch.maximum(t, 1 - t), t >= 0.5
        zero = torch.zeros_like(t)
        ends = combine(torch.where(late, zero, weight), data, torch.where(late, -weight, zero), noise)
        return combine(torch.ones_like(t), ends, torch.where(late, weight, -weight), x_t)


def _solve_pair(prediction: Tensor, x: Tensor, at: Coefficients, kind: PredictionType) -> tuple[Tensor, Tensor]:
    """Solve x = alpha * data + sigma * noise and the definition of the prediction for (noise, data)."""
    alpha, sigma = at.alpha, at.sigma
    if kind == "velocity":
        determinant = alpha * at.d_sigma - sigma * at.d_alpha
        _check_divisor(determinant, kind, "alpha * d_sigma - sigma * d_alpha", "the two equations coincide")
        noise = combine(alpha / determinant, prediction, -at.d_alpha / determinant, x)
        return noise, combine(at.d_sigma / determinant, x, -sigma / determinant, prediction)
    if kind == "epsilon":
        _check_divisor(alpha, kind, "alpha", "x_t holds no data")
        return prediction, combine(1 / alpha, x, -sigma / alpha, prediction)
    if kind == "v_prediction":
        power = alpha.square() + sigma.square()
        _check_divisor(power, kind, "alpha^2 + sigma^2", "x_t holds nothing")
        noise = combine(sigma / power, x, alpha / power, prediction)
        return noise, combine(alpha / power, x, -sigma / power, prediction)
    if kind == "sample":
        _check_divisor(sigma, kind, "sigma", "x_t holds no noise")
        return combine(1 / sigma, x, -alpha / sigma, prediction), prediction
    raise _unknown(kind)


def _check_divisor(divisor: Tensor, kind: str, formula: str, meaning: str) -> None:
    # Zero up to rounding: cos(pi / 2) is 6e-17 in float64.
    singular = divisor.abs() <= 4 * torch.finfo(divisor.dtype).eps
    if bool(singular.any()):
        raise ValueError(
            f"A prediction of type {kind!r} does not determine (noise, data) where {formula} = 0, because {meaning}; "
            f"that is so for {int(singular.sum())} of the {singular.numel()} times given. Keep t away from that end, "
            "use a network that predicts velocity or v_prediction, or, for a diffusion network on the straight path, "
            "DiffusionAsFlow."
        )


def _unknown(kind: str) -> ValueError:
    return ValueError(f"Expected a prediction type out of {', '.join(PREDICTION_TYPES)}, got {kind!r}.")
