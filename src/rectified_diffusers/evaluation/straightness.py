"""How straight a flow is: S(Z), and the velocity of a pipeline to measure it with.

    S(Z) = integral over t in [0, 1] of E |(Z_1 - Z_0) - v(Z_t, t)|^2 dt        (arXiv:2209.03003, arXiv:2309.06380)

Zero if and only if every path is a straight line travelled at constant speed: then one Euler step is exact. Here
|.|^2 is the mean over the dimensions of a latent, not the sum, so that sizes of latents can be compared; multiply by
C * H * W for the formula as printed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rectified_diffusers.flow.ode import Velocity, euler
from rectified_diffusers.flow.prediction import DiffusionAsFlow, PredictionType
from rectified_diffusers.models.denoiser import Conditioning, Denoiser, latent_shape
from rectified_diffusers.pipelines.scheduler import time_to_timestep


@dataclass(frozen=True)
class Straightness:
    """S(Z) per dimension, an estimate over `count` paths.

    Attributes:
        total: the integral over [edges[0], edges[-1]].
        per_bin: mean of the integrand in each bin of t. `total` is the sum of these times the widths of the bins.
        edges: bounds of the bins, one more than bins. The first is above 0 for a diffusion model, whose schedule
            begins there: the part before it is left out, which is to the diffusion model's advantage.
        count: number of paths.
    """

    total: float
    per_bin: tuple[float, ...]
    edges: tuple[float, ...]
    count: int


@torch.no_grad()
def straightness(
    velocity: Velocity, noise: Tensor, steps: int = 100, bins: int = 10, start: float = 0.0, end: float = 1.0
) -> Straightness:
    """Estimate S(Z) over the Euler trajectories of `velocity` from `noise`, with `steps` evaluations.

    On part of the time, the displacement is divided by its duration: (Z_end - Z_start) / (end - start).

    Args:
        velocity: v(x, t) of x `(B, ...)` and t `(B,)`.
        noise: the state at `start`, `(B, ...)`.
        steps: Euler steps, a multiple of `bins`. One step is straight by construction: use many.
        start, end: flow times, start < end.
    """
    if bins < 1 or steps < 2 or steps % bins:
        raise ValueError(f"steps must be a multiple of bins and at least 2, got {steps} steps and {bins} bins.")
    if not 0 <= start < end <= 1:
        raise ValueError(f"expected 0 <= start < end <= 1, got start {start} and end {end}.")
    if noise.ndim < 2 or len(noise) == 0:
        raise ValueError(f"noise must be (B, ...) with B at least 1, got {tuple(noise.shape)}.")
    duration = end - start
    trajectory = euler(velocity, noise, steps, start, end, return_trajectory=True).double()  # (steps + 1, B, ...)
    velocities = trajectory.diff(dim=0) * (steps / duration)  # an Euler step is dt * v: no need to ask v again
    deviation = velocities - (trajectory[-1] - trajectory[0]) / duration
    integrand = deviation.square().flatten(1).mean(dim=1)  # (steps,), mean over paths and dimensions
    per_bin = integrand.view(bins, -1).mean(dim=1)
    edges = torch.linspace(start, end, bins + 1, dtype=torch.float64)
    return Straightness(duration * integrand.mean().item(), tuple(per_bin.tolist()), tuple(edges.tolist()), len(noise))


def pool(parts: Sequence[Straightness]) -> Straightness:
    """Merge estimates over several batches of paths into one over all of them."""
    if not parts or any(part.edges != parts[0].edges for part in parts):
        raise ValueError(f"pool needs estimates over the same bins, got edges {sorted({p.edges for p in parts})}.")
    count = sum(part.count for part in parts)
    total = sum(part.total * part.count for part in parts) / count
    columns = zip(*(part.per_bin for part in parts), strict=True)
    per_bin = tuple(sum(v * p.count for v, p in zip(column, parts, strict=True)) / count for column in columns)
    return Straightness(total, per_bin, parts[0].edges, count)


@dataclass(frozen=True)
class PipelineVelocity:
    """The velocity v(x, t) of a pipeline's network for given prompts and guidance. Make it with `PipelineVelocity.of`.

    Guidance is v_null + w * (v_text - v_null) when w > 1, otherwise one forward pass. Flux' network is given w as an
    input, or has no use for it. A diffusion network is viewed as a straight flow through equal signal-to-noise
    ratios (`DiffusionAsFlow`); its schedule stops short of pure noise, so that its flow begins at `start` > 0, with
    what its sampler begins with: noise as sample of the last timestep.

    Attributes:
        denoiser: knows how the pipeline's network is asked.
        conditioning: of the prompts, B rows; 2B with those of the empty prompt first, for guidance.
        guidance_scale: w, 1 where it takes no second pass.
        as_flow: the view of a diffusion model; None for a model that predicts the velocity.
        prediction_type: of a diffusion model.
    """

    denoiser: Denoiser
    conditioning: Conditioning
    guidance_scale: float = 1.0
    as_flow: DiffusionAsFlow | None = None
    prediction_type: PredictionType = "velocity"

    @classmethod
    def of(cls, pipeline: Any, prompts: Sequence[str], guidance_scale: float = 1.0) -> "PipelineVelocity":
        """Bind a text-to-image pipeline of a family that `Denoiser.of` knows, flow or diffusion, to prompts."""
        denoiser = Denoiser.of(pipeline, guidance_scale)
        as_flow, prediction_type = denoiser.diffusion() or (None, "velocity")
        guided = guidance_scale > 1 and denoiser.guides_by_two_passes
        with torch.no_grad():
            conditioning = denoiser.encode(list(prompts), pipeline.device)
            if guided:
                null = denoiser.encode([""] * len(prompts), pipeline.device)
                conditioning = {name: torch.cat([null[name], part]) for name, part in conditioning.items()}
        return cls(denoiser, conditioning, guidance_scale if guided else 1.0, as_flow, prediction_type)

    @property
    def start(self) -> float:
        """Flow time at which the model's own range begins; 0 for a flow model."""
        if self.as_flow is None:
            return 0.0
        last_timestep = torch.tensor([len(self.as_flow.alphas_cumprod) - 1.0], dtype=torch.float64)
        return self.as_flow.time_of(last_timestep).item()

    def state_at_start(self, noise: Tensor) -> Tensor:
        """Turn noise of unit variance `(B, ...)` into the state of the straight flow at `start`."""
        if self.as_flow is None:
            return noise
        return noise / self.as_flow.scale_of(torch.tensor(self.start)).to(noise)

    def noise_at_start(self, state: Tensor) -> Tensor:
        """Turn the state of the straight flow at `start` into noise of unit variance: `state_at_start` undone."""
        if self.as_flow is None:
            return state
        return state * self.as_flow.scale_of(torch.tensor(self.start)).to(state)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity data - noise at x `(B, C, H, W)` and t `(B,)`, after guidance."""
        if self.as_flow is None:
            answer = self._predict(x, time_to_timestep(t, self.denoiser.num_train_timesteps))
            return answer if self.denoiser.direction == "data" else -answer
        prediction = self._predict(*self.as_flow.network_input(x, t))
        return self.as_flow.velocity(prediction, x, t, self.prediction_type)

    def _predict(self, sample: Tensor, timestep: Tensor) -> Tensor:
        network = self.denoiser.network
        sample, timestep = sample.to(network.dtype), timestep.to(torch.float32)
        if self.guidance_scale <= 1:
            return self.denoiser.predict(network, sample, timestep, self.conditioning)
        twice = torch.cat([sample, sample]), torch.cat([timestep, timestep])
        null, text = self.denoiser.predict(network, *twice, self.conditioning).chunk(2)
        return null + self.guidance_scale * (text - null)


def pipeline_straightness(
    pipeline: Any,
    prompts: Sequence[str],
    guidance_scale: float = 1.0,
    steps: int = 100,
    bins: int = 10,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    height: int | None = None,
    width: int | None = None,
) -> Straightness:
    """Estimate S(Z) of a text-to-image pipeline, flow or diffusion, over one path per prompt.

    The pipeline is of a family that `Denoiser.of` knows, at its default size or at one given in pixels. Noise comes
    from `seed` on the CPU, the same for any pipeline with latents of this shape. A diffusion pipeline is measured from
    where its schedule begins, see `Straightness.edges`.
    """
    shape = latent_shape(pipeline, height, width)
    noise = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(seed))
    parts = []
    batches = range(0, len(prompts), batch_size)
    for first in tqdm(batches, desc="straightness", leave=False, disable=not progress):
        velocity = PipelineVelocity.of(pipeline, prompts[first : first + batch_size], guidance_scale)
        state = velocity.state_at_start(noise[first : first + batch_size]).to(pipeline.device)
        parts.append(straightness(velocity, state, steps, bins, start=velocity.start))
    return pool(parts)
