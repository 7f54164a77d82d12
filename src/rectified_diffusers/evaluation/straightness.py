"""Measure the straightness S(Z) of a flow or of a pipeline, and record single values along its paths.

    S(Z) = integral over t in [0, 1] of E |(Z_1 - Z_0) - v(Z_t, t)|^2 dt        (arXiv:2209.03003, arXiv:2309.06380)

It is zero if and only if every path is a straight line traversed at constant speed; one Euler step is then exact. Here
|.|^2 is the mean over the dimensions of a latent, not the sum, so that values for different latent sizes are
comparable. Multiply by C * H * W for the formula as printed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rectified_diffusers.flow.ode import Velocity, euler
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.models.velocity import PipelineVelocity


@dataclass(frozen=True)
class Straightness:
    """S(Z) per dimension, estimated over `count` paths.

    Attributes:
        total: the integral over [edges[0], 1].
        per_bin: mean of the integrand in each bin of t. `total` is the sum of these times the bin widths.
        edges: bin edges, one more than bins. For a diffusion model, the first edge is above 0, where its schedule
            starts. The part before it is excluded, which favors the diffusion model.
        count: number of paths.
    """

    total: float
    per_bin: tuple[float, ...]
    edges: tuple[float, ...]
    count: int


@torch.no_grad()
def straightness(
    velocity: Velocity, noise: Tensor, steps: int = 100, bins: int = 10, start: float = 0.0
) -> Straightness:
    """Estimate S(Z) over the Euler trajectories of `velocity` from `noise`, with `steps` evaluations.

    From a later start, the displacement is divided by its duration: (Z_1 - Z_start) / (1 - start).

    Args:
        velocity: v(x, t) for x `(B, ...)` and t `(B,)`.
        noise: the state at `start`, `(B, ...)`.
        steps: number of Euler steps, a multiple of `bins`. Use many: a single step is straight by construction.
    """
    if bins < 1 or steps < 2 or steps % bins:
        raise ValueError(f"steps must be a multiple of bins and at least 2, got {steps} steps and {bins} bins.")
    duration = 1 - start
    trajectory = euler(velocity, noise, steps, start, return_trajectory=True).double()  # (steps + 1, B, ...)
    velocities = trajectory.diff(dim=0) * (steps / duration)  # an Euler step is dt * v: no need to evaluate v again
    deviation = velocities - (trajectory[-1] - trajectory[0]) / duration
    integrand = deviation.square().flatten(1).mean(dim=1)  # (steps,), mean over paths and dimensions
    per_bin = integrand.view(bins, -1).mean(dim=1)
    edges = torch.linspace(start, 1, bins + 1, dtype=torch.float64)
    return Straightness(duration * integrand.mean().item(), tuple(per_bin.tolist()), tuple(edges.tolist()), len(noise))


def pool(parts: Sequence[Straightness]) -> Straightness:
    """Return one estimate over all paths from estimates over several batches, with the same bins."""
    count = sum(part.count for part in parts)
    total = sum(part.total * part.count for part in parts) / count
    columns = zip(*(part.per_bin for part in parts), strict=True)
    per_bin = tuple(sum(v * p.count for v, p in zip(column, parts, strict=True)) / count for column in columns)
    return Straightness(total, per_bin, parts[0].edges, count)


def pipeline_straightness(
    pipeline: Any,
    prompts: Sequence[str],
    guidance_scale: float | None = None,
    steps: int = 100,
    bins: int = 10,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    height: int | None = None,
    width: int | None = None,
    call_options: Mapping[str, Any] | None = None,
    run: Callable[[Sequence[Callable[[], Straightness]]], list[Straightness]] | None = None,
) -> Straightness:
    """Estimate S(Z) of a text-to-image pipeline, flow or diffusion, over one path per prompt.

    The pipeline must be one that `Denoiser.of` supports, which also explains `guidance_scale`; `call_options` are
    further arguments of its call. Images have its default size unless `height` and `width` are given in pixels. Noise
    is sampled from `seed` on the CPU, the same for all pipelines with latents of this shape.
    A diffusion pipeline is measured from the start of its schedule, see `Straightness.edges`.

    Args:
        run: returns the results of the calls that measure one batch each, for example divided among processes; by
            default, one call after the other.
    """
    sizes = {name: size for name, size in (("height", height), ("width", width)) if size is not None}
    denoiser = Denoiser.of(pipeline, guidance_scale, {**(call_options or {}), **sizes})
    noise = torch.randn(len(prompts), *denoiser.latent_shape, generator=torch.Generator().manual_seed(seed))

    def measure(first: int) -> Straightness:
        velocity = PipelineVelocity.bind(denoiser, prompts[first : first + batch_size])
        state = velocity.state_at_start(noise[first : first + batch_size]).to(pipeline.device)
        return straightness(velocity, state, steps, bins, start=velocity.start)

    calls = [partial(measure, first) for first in range(0, len(prompts), batch_size)]
    if run is not None:
        return pool(run(calls))
    return pool([call() for call in tqdm(calls, desc="straightness", leave=False, disable=not progress)])


@dataclass(frozen=True)
class Trajectories:
    """Selected values along one path from noise to data.

    Attributes:
        t: flow times `(T,)`.
        latents: values at selected positions of the latent `(T, K)`.
        pixels: values in [0, 1] at selected positions of the image that the VAE decodes from the state `(T, K)`.
    """

    t: Tensor
    latents: Tensor
    pixels: Tensor


@torch.no_grad()
def trajectories(
    pipeline: Any, prompt: str, guidance_scale: float | None = None, steps: int = 25, values: int = 20, seed: int = 0
) -> Trajectories:
    """Record selected values along the Euler path of a text-to-image pipeline, flow or diffusion.

    Noise and positions are sampled from the seed on the CPU: they are the same for pipelines with latents and images
    of the same size. A diffusion pipeline is recorded from the start of its schedule.

    Args:
        values: number of values to record, of the latent and of the image each.
    """
    denoiser = Denoiser.of(pipeline, guidance_scale)
    noise = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(seed))
    velocity = PipelineVelocity.bind(denoiser, [prompt])
    state = velocity.state_at_start(noise.to(pipeline.device))
    states = euler(velocity, state, steps, velocity.start, return_trajectory=True)[:, 0]  # (T, ...)
    pictures = torch.cat([(denoiser.decode_pixels(part) / 2 + 0.5).clamp(0, 1) for part in states.split(8)])
    t = torch.linspace(velocity.start, 1, steps + 1)
    return Trajectories(t, _follow(states, values, seed), _follow(pictures, values, seed))


def _follow(states: Tensor, values: int, seed: int) -> Tensor:
    """Return `(T, K)` float32 values on the CPU: K positions, sampled from the seed, of every state `(T, ...)`."""
    flat = states.flatten(1).float().cpu()
    generator = torch.Generator().manual_seed(seed)
    return flat[:, torch.randperm(flat.shape[1], generator=generator)[:values]]
