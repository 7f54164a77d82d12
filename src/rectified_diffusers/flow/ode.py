"""Fixed-step solvers of dx/dt = velocity(x, t), from noise to data or from data to noise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Maps x `(B, ...)` and t `(B,)` to dx/dt, which has the shape of x."""

_Step = Callable[[Velocity, Tensor, float, float, float], Tensor]


def euler(
    velocity: Velocity, x: Tensor, steps: int, start: float = 0.0, end: float = 1.0, *, return_trajectory: bool = False
) -> Tensor:
    """Integrate with x <- x + dt * v(x, t): first order, `steps` evaluations.

    The grid is uniform, dt = (end - start) / steps. With start > end it integrates backwards, from data to its noise
    (inversion).

    Args:
        velocity: called with t `(B,)` in float32, or in float64 if x is float64. Its result is cast to the dtype of x.
        x: the state at `start`, `(B, ...)`; its dtype is kept.
        return_trajectory: return all states `(steps + 1, B, ...)`, from the first to the last, instead of the last one
            only.
    """
    return _integrate(_euler_step, velocity, x, steps, start, end, return_trajectory)


def heun(
    velocity: Velocity, x: Tensor, steps: int, start: float = 0.0, end: float = 1.0, *, return_trajectory: bool = False
) -> Tensor:
    """Integrate with x <- x + dt * (v(x, t) + v(x + dt * v(x, t), t + dt)) / 2: second order, 2 * `steps` evaluations.

    The arguments are those of `euler`. The last evaluation is at `end` itself, so the velocity must be finite there.
    """
    return _integrate(_heun_step, velocity, x, steps, start, end, return_trajectory)


def _euler_step(velocity: Velocity, x: Tensor, t: float, next_t: float, dt: float) -> Tensor:
    return x + dt * _evaluate(velocity, x, t)


def _heun_step(velocity: Velocity, x: Tensor, t: float, next_t: float, dt: float) -> Tensor:
    first = _evaluate(velocity, x, t)
    second = _evaluate(velocity, x + dt * first, next_t)
    return x + dt / 2 * (first + second)


def _evaluate(velocity: Velocity, x: Tensor, t: float) -> Tensor:
    times = torch.full(x.shape[:1], t, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    value = velocity(x, times)
    if value.shape != x.shape:
        raise ValueError(
            f"Expected a velocity of the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}. "
            "Return the tensor itself: of a diffusers model, its `.sample`."
        )
    return value.to(x.dtype)


def _integrate(
    step: _Step, velocity: Velocity, x: Tensor, steps: int, start: float, end: float, return_trajectory: bool
) -> Tensor:
    if not hasattr(steps, "__index__"):
        raise TypeError(f"Expected a whole number of steps, got {steps!r}. Pass an int.")
    if steps < 1:
        raise ValueError(f"Expected steps >= 1, got {steps}.")
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise ValueError(
            f"Expected flow times start and end in [0, 1], got {start} and {end}. For a timestep, t = 1 - timestep / "
            "1000."
        )
    dt = (end - start) / steps
    grid = [start + i * dt for i in range(steps)] + [end]  # ends exactly at `end`: no overshoot from rounding
    states = [x]
    for t, next_t in pairwise(grid):
        x = step(velocity, x, t, next_t, dt)
        if return_trajectory:
            states.append(x)
    return torch.stack(states) if return_trajectory else x
