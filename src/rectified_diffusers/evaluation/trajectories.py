"""Record how single values of an image change over t: straight lines for a straight flow, curves for a curved one."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.flow.ode import euler
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.models.velocity import PipelineVelocity


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
