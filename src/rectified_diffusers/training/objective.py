"""The objective of rectified flow as one object for third-party training loops, such as the scripts of diffusers."""

from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from rectified_diffusers.checks import require_one_of, require_type
from rectified_diffusers.flow.interpolation import Straight
from rectified_diffusers.flow.loss import LOSS_KINDS, LossKind, velocity_loss
from rectified_diffusers.flow.time_density import TimeDensity, Uniform
from rectified_diffusers.pipelines.scheduler import time_to_timestep


@dataclass(frozen=True)
class FlowBatch:
    """Inputs of a U-Net, x_t `(B, C, H, W)` and timesteps `(B,)` in [0, 1000], and its velocity target.

    Example:
        ```python
        noise, data = torch.randn(2, 8, 4, 64, 64)
        flow = FlowObjective().prepare(noise=noise, data=data)
        flow.x_t.shape, flow.timesteps.shape, flow.velocity.shape  # (8, 4, 64, 64), (8,), (8, 4, 64, 64)
        ```
    """

    x_t: Tensor
    timesteps: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class FlowObjective:
    """Replaces the noise scheduler, random timesteps, target and loss of a diffusion training loop.

    x_t = t * data + (1 - t) * noise, timesteps = 1000 * (1 - t), target = data - noise, Eq. (1) of arXiv:2209.03003.
    There is no prediction type to choose, so epsilon cannot be trained by mistake. Times are real numbers: diffusion's
    `randint(0, 1000)` never returns timestep 1000, the first timestep of every flow sampler and the only one of a
    one-step sampler.

    Args:
        time_density: density of t.
        at_noise: share of examples, in [0, 1], at exactly t = 0 instead, which a density never samples.
        loss_kind: l2, the loss of diffusers' scripts, or pseudo_huber.

    Example:
        ```python
        batch, objective = triplets.rows([0, 1]), FlowObjective()
        prompt_embeds, _ = pipeline.encode_prompt(batch.prompts, "cpu", 1, False)
        flow = objective.prepare(noise=batch.noise, data=batch.data)
        prediction = pipeline.unet(flow.x_t, flow.timesteps, prompt_embeds).sample
        loss = objective.loss(prediction, flow)
        ```
    """

    time_density: TimeDensity = field(default_factory=Uniform)
    at_noise: float = 0.1
    loss_kind: LossKind = "l2"

    def __post_init__(self) -> None:
        require_type("at_noise", self.at_noise, Real, "It is a share of the examples, in [0, 1].")
        if not 0 <= self.at_noise <= 1:
            raise ValueError(f"at_noise is a share of the examples, in [0, 1], got {self.at_noise}.")
        require_type(
            "time_density", self.time_density, TimeDensity, "Give one of rectified_diffusers.flow, Uniform()."
        )
        require_one_of("loss_kind", self.loss_kind, LOSS_KINDS)

    def prepare(self, *, noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> FlowBatch:
        """Sample a time for each example and return the point of the path at that time, with its target velocity.

        Args:
            noise: standard normal, `(B, C, H, W)`: sampled for this batch, or coupled with the data by a teacher.
            data: VAE-scaled latents, of the same shape; their dtype is kept.
            generator: generator of the times, on any device; torch's global CPU generator if not given.
        """
        for name, x in (("noise", noise), ("data", data)):
            require_type(name, x, Tensor, "Give latents (B, C, H, W).")
            if not x.is_floating_point() or x.numel() == 0:
                raise ValueError(f"{name} must be latents in floating point, got {x.dtype} {tuple(x.shape)}.")
        generator = torch.default_generator if generator is None else generator
        t = self.time_density.sample(len(data), generator)
        from_noise = torch.rand(len(data), generator=generator, device=generator.device) < self.at_noise
        t = torch.where(from_noise, 0.0, t).to(data.device)
        x_t, velocity = Straight().interpolate(noise, data, t)
        return FlowBatch(x_t, time_to_timestep(t), velocity)

    def loss(self, prediction: Tensor, batch: FlowBatch) -> Tensor:
        """Return the mean loss over the batch, a scalar in float32 or wider."""
        return velocity_loss(prediction, batch.velocity, self.loss_kind).mean()
