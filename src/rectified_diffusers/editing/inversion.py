"""Invert images to noise by running the flow backward, and edit images by changing their prompt.

Both directions integrate dx/dt = v(x, t) of the pipeline under a prompt, with a solver of `flow.ode`. With
h = 1 / steps, the round-trip error is of order h for Euler and h^3 for Heun: the leading error of a step of order p is
c h^(p+1), which a step back cancels when p is even. The error of the noise itself is of order h^p, h^2 for Heun.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rectified_diffusers.checks import (
    require_latents,
    require_number,
    require_one_of,
    require_pipeline,
    require_texts,
    require_type,
)
from rectified_diffusers.flow.ode import euler, heun
from rectified_diffusers.images import as_images, batched, require_size
from rectified_diffusers.models.latents import decode_to_images, encode_pixels
from rectified_diffusers.models.velocity import PipelineVelocity
from rectified_diffusers.pipelines.calls import only_thread
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler

Solver = Literal["euler", "heun"]
Images = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]
_SOLVERS = {"euler": (euler, 1), "heun": (heun, 2)}  # with the number of evaluations per step


@torch.no_grad()
def invert(
    pipeline: Any,
    pictures: Images,
    prompts: str | Sequence[str],
    steps: int = 50,
    *,
    solver: Solver = "heun",
    guidance_scale: float = 1.0,
    strength: float = 1.0,
) -> Tensor:
    """Integrate the flow from data at t = 1 back to t = 1 - strength.

    Use a rectified flow for many steps, such as 2-Rectified Flow. A one-step model predicts velocity only at t = 0.

    Args:
        pipeline: a text-to-image pipeline of the Stable Diffusion family with a RectifiedFlowEulerScheduler.
        pictures: images of one size as PIL images, arrays or tensors, or data as VAE-scaled latents `(B, C, H, W)`.
        prompts: descriptions of the images, one for all or one for each.
        guidance_scale: 1 inverts best. Above 1 the backward flow can leave the vicinity of the images.

    Returns:
        The state `(B, C, H, W)` in float32 or wider; at strength 1 this is noise.

    Example:
        ```python
        noise = invert(pipeline, image, "a red apple", steps=16)
        returned = pipeline("a red apple", latents=noise, num_inference_steps=16).images[0]
        ```
    """
    return _solve(pipeline, _data(pipeline, pictures), prompts, guidance_scale, solver, steps, 1.0, _time(strength))


@torch.no_grad()
def edit(
    pipeline: Any,
    pictures: Images,
    source_prompts: str | Sequence[str],
    target_prompts: str | Sequence[str],
    steps: int = 50,
    *,
    solver: Solver = "heun",
    source_guidance_scale: float = 1.0,
    guidance_scale: float = 1.0,
    strength: float = 1.0,
) -> list[Image.Image]:
    """Edit images by prompt: `invert` under the source prompt, then run the flow under the target prompt.

    Args:
        pipeline, pictures, steps, solver: as for `invert`.
        source_prompts, target_prompts: descriptions of the given and the edited images, one for all or one for each.
        source_guidance_scale, guidance_scale: guidance of the backward and of the forward flow.
        strength: share of the flow that is run backward and forward, in (0, 1]. Smaller values preserve more of the
            image.

    Example:
        ```python
        edited = edit(pipeline, image, "a red apple", "a green apple", steps=16, strength=0.6)[0]
        edited.save("green.png")
        ```
    """
    start, data = _time(strength), _data(pipeline, pictures)
    state = _solve(pipeline, data, source_prompts, source_guidance_scale, solver, steps, 1.0, start)
    edited = _solve(pipeline, state, target_prompts, guidance_scale, solver, steps, start, 1.0)
    return decode_to_images(pipeline, edited)


@torch.no_grad()
def round_trip_error(
    pipeline: Any,
    pictures: Images,
    prompts: str | Sequence[str],
    steps: int = 50,
    *,
    solver: Solver = "heun",
    guidance_scale: float = 1.0,
    strength: float = 1.0,
) -> Tensor:
    """Return the error |returned - data| / |data| of each image's latents, `(B,)`, after inversion and regeneration.

    Both directions use the same prompt. Arguments as for `invert`. The error decreases with the first power of `steps`
    for Euler and the third for Heun, down to the precision of the pipeline's dtype. It excludes the loss of the VAE.
    """
    start, data = _time(strength), _data(pipeline, pictures)
    state = _solve(pipeline, data, prompts, guidance_scale, solver, steps, 1.0, start)
    returned = _solve(pipeline, state, prompts, guidance_scale, solver, steps, start, 1.0)
    return (returned - data).flatten(1).norm(dim=1) / data.flatten(1).norm(dim=1)


def _time(strength: float) -> float:
    """Return the flow time t = 1 - strength, at which that share of the flow starts."""
    require_type("strength", strength, Real, "Pass a number in (0, 1].")
    if not 0 < strength <= 1:
        raise ValueError(f"strength, the share of the flow that is run, must be in (0, 1], got {strength}.")
    return 1 - strength


def _solve(
    pipeline: Any,
    state: Tensor,
    prompts: str | Sequence[str],
    guidance_scale: float,
    solver: Solver,
    steps: int,
    start: float,
    end: float,
) -> Tensor:
    """Integrate the pipeline's velocity under prompts from `start` to `end`, with the pipeline's progress bar."""
    require_one_of("solver", solver, _SOLVERS)
    require_number("guidance_scale", guidance_scale)
    require_texts("prompts", prompts)
    prompts = [prompts] * len(state) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(state):
        raise ValueError(f"pass one prompt, or one per image: got {len(prompts)} for {len(state)} images.")
    solve, evaluations = _SOLVERS[solver]
    with only_thread(pipeline.unet), pipeline.progress_bar(total=steps * evaluations) as bar:
        velocity = PipelineVelocity.of(pipeline, prompts, guidance_scale)

        def counted(x: Tensor, t: Tensor) -> Tensor:
            bar.update()
            return velocity(x, t)

        return solve(counted, state, steps, start, end)


def _data(pipeline: Any, pictures: Images) -> Tensor:
    """Check the pipeline and return the images as VAE-scaled latents `(B, C, H, W)` in float32 or wider."""
    require_pipeline("inversion", pipeline, "unet", "vae", "scheduler")
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, RectifiedFlowEulerScheduler) or hasattr(pipeline, "text_encoder_2"):
        got = f"{type(pipeline).__name__} with {type(scheduler).__name__}"
        raise TypeError(f"inversion needs a RectifiedFlowPipeline with a RectifiedFlowEulerScheduler, got {got}.")
    channels = pipeline.vae.config.latent_channels
    images = batched("pictures", as_images("pictures", pictures, latent_channels=channels))
    if isinstance(images, Tensor) and images.shape[1] == channels:
        require_latents("latents", images)
        latents = images
    else:
        require_size("pictures", images, pipeline.vae_scale_factor)
        sizes = [image.size for image in images] if isinstance(images, list) else []
        if len(set(sizes)) > 1:
            raise ValueError(f"pass images of one size, got sizes {sizes}.")
        latents = encode_pixels(pipeline.vae, pipeline.image_processor.preprocess(images))
    # Half precision would limit every error from below. Only the U-Net's input is cast to it.
    return latents.to(pipeline.device, torch.promote_types(latents.dtype, torch.float32))
