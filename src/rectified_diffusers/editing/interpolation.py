"""Interpolate between images, from seed to seed and prompt to prompt, along great circles."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from rectified_diffusers.checks import require_count, require_finite, require_number, require_pipeline, require_texts
from rectified_diffusers.models.latents import latent_shape
from rectified_diffusers.pipelines.scheduler import student_steps

# What `encode_prompt` returns, in order: two for Stable Diffusion, four for SDXL.
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def slerp(start: Tensor, end: Tensor, weight: float, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Return the spherical interpolation of `start` and `end`: constant angular speed, linearly changing norm.

    With unit vectors a, b at angle w: (sin((1 - weight) w) a + sin(weight w) b) / sin w, times
    (1 - weight) |start| + weight |end|. Linear interpolation between two noise samples would reduce the norm to 0.7
    of theirs, where no model has been trained. Spherical interpolation of noise remains noise.

    Args:
        start, end: tensors of one shape. The result has their dtype and equals them bit for bit at weight 0 and 1.
        weight: in [0, 1].
        dim: the dimensions that make up one vector.
    """
    for name, x in (("start", start), ("end", end)):
        require_finite(name, x)
    require_number("weight", weight, 0, 1)
    if start.shape != end.shape:
        raise ValueError(f"slerp needs tensors of one shape, got {tuple(start.shape)} and {tuple(end.shape)}.")
    if weight in (0, 1):
        return end if weight else start
    wide = torch.promote_types(start.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(x.to(wide), dim=dim, keepdim=True) for x in (start, end)]
    a, b = (_unit(x.to(wide), norm) for x, norm in zip((start, end), norms, strict=True))
    apart, together = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (a - b, a + b))
    angle = 2 * torch.atan2(apart, together)  # equals acos(a b), and is exact for small angles too
    if bool((angle > math.pi - 1e-3).any()):
        raise ValueError("slerp between opposite vectors is not unique; interpolate via a third vector.")
    # For a small angle the chord equals the arc, and the sine is too small to divide by.
    turn = angle.clamp(min=1e-3)
    from_a = torch.where(angle > 1e-3, ((1 - weight) * turn).sin() / turn.sin(), 1 - weight)
    from_b = torch.where(angle > 1e-3, (weight * turn).sin() / turn.sin(), weight)
    direction = from_a * a + from_b * b
    direction = _unit(direction, torch.linalg.vector_norm(direction, dim=dim, keepdim=True))
    return (direction * ((1 - weight) * norms[0] + weight * norms[1])).to(start.dtype)


def _unit(x: Tensor, norm: Tensor) -> Tensor:
    return x / norm.clamp(min=torch.finfo(norm.dtype).tiny)  # a zero vector stays zero


def check_keys(prompts: str | Sequence[str], seeds: int | Sequence[int]) -> list[tuple[str, int]]:
    """Return the keyframes (prompt, seed) of an animation. A single prompt or seed is used for all of them."""
    if prompts:
        require_texts("prompts", prompts)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    numbers = [seeds] if isinstance(seeds, int) else list(seeds)
    count = max(len(texts), len(numbers))
    if count < 2 or {len(texts), len(numbers)} - {1, count}:
        raise ValueError(
            "an animation needs at least two prompts or two seeds, of the other as many or one, got "
            f"{len(texts)} prompts and {len(numbers)} seeds."
        )
    for seed in numbers:
        require_count("a seed", seed, at_least=0)
        if seed >= 2**63:
            raise ValueError(f"a seed must be below 2^63, got {seed}.")
    texts, numbers = (texts * (count // len(texts)), numbers * (count // len(numbers)))
    return list(zip(texts, numbers, strict=True))


@torch.no_grad()
def interpolate(
    pipeline: Any,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int] = 0,
    frames: int = 15,
    *,
    loop: bool = False,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """Generate the images between keyframes by `slerp` of the full noise tensor and of each token's embedding.

    Keyframe i is (prompts[i], seeds[i]). Its image equals, bit for bit, the one that the pipeline generates from them.

    Args:
        pipeline: a text-to-image pipeline of the Stable Diffusion or SDXL family.
        prompts, seeds: at least two of one; the other may be a single value, used for all keyframes.
        frames: images from one keyframe (included) to the next (excluded): K keyframes produce
            (K - 1) * frames + 1 images, or K * frames with `loop`.
        loop: return from the last keyframe to the first, for a seamless animation.
        num_inference_steps: those of a model distilled to a few steps by default, else 1.
        height, width: in pixels; the model's size by default.

    Example:
        ```python
        frames = interpolate(pipeline, ["dog face", "cat face"], [0, 1], frames=8, loop=True)
        save_animation(frames, "faces.gif")
        ```
    """
    keys = check_keys(prompts, seeds)
    require_pipeline("interpolate", pipeline, "unet", "vae", "encode_prompt")
    require_count("frames", frames)
    steps = student_steps(pipeline.scheduler) if num_inference_steps is None else num_inference_steps
    require_count("num_inference_steps", steps)
    require_number("guidance_scale", guidance_scale)
    channels, rows, columns = latent_shape(pipeline, height, width)
    quiet = copy.copy(pipeline)  # no progress bar per image; the models are shared
    quiet.set_progress_bar_config(disable=True)
    embeds = {prompt: _embed(pipeline, prompt, guidance_scale > 1, negative_prompt) for prompt, _ in keys}
    dtype = next(iter(embeds.values()))["prompt_embeds"].dtype
    noises = {seed: _noise(seed, (1, channels, rows, columns), dtype) for _, seed in keys}
    images = []
    for first, second, weight in tqdm(_frames(keys, frames, loop), unit="image", disable=not progress):
        latents = slerp(noises[first[1]], noises[second[1]], weight, dim=(1, 2, 3))
        between = {name: slerp(x, embeds[second[0]][name], weight) for name, x in embeds[first[0]].items()}
        result = quiet(
            latents=latents,
            **between,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=rows * pipeline.vae_scale_factor,
            width=columns * pipeline.vae_scale_factor,
        )
        images.append(result.images[0])
    return images


Key = tuple[str, int]


def _frames(keys: list[Key], frames: int, loop: bool) -> list[tuple[Key, Key, float]]:
    """Return for each image the two keyframes that it lies between and its weight, 0 at the first."""
    ends = [*keys[1:], keys[0]] if loop else keys[1:]
    between = [(a, b, i / frames) for a, b in zip(keys, ends, strict=False) for i in range(frames)]
    return between if loop else [*between, (keys[-1], keys[-1], 0.0)]


def _embed(pipeline: Any, prompt: str, guided: bool, negative_prompt: str | None) -> dict[str, Tensor]:
    """Return a prompt's embeddings as arguments of the pipeline call. There is no negative one without guidance."""
    embeds = pipeline.encode_prompt(
        prompt=prompt,
        device=pipeline.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=negative_prompt,
    )
    return {name: x for name, x in zip(_EMBEDS, embeds, strict=False) if x is not None}


def _noise(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the noise of a seed as a pipeline samples it with a CPU generator."""
    return randn_tensor(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
