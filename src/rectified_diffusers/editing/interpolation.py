"""Pictures between pictures: from seed to seed and prompt to prompt along great circles."""

import copy
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, SupportsIndex

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from rectified_diffusers.checks import require_count, require_number, require_pipeline, require_texts, require_type

# What `encode_prompt` returns, in order: two for Stable Diffusion, four for SDXL.
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def slerp(start: Tensor, end: Tensor, weight: float, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Go from `start` to `end` on a great circle: the direction turns evenly, the norm changes linearly.

    With unit vectors a, b at the angle w: (sin((1 - weight) w) a + sin(weight w) b) / sin w, times
    (1 - weight) |start| + weight |end|. A straight line between two noises would dip to 0.7 of their norm, where no
    model has been trained; here noise stays noise.

    Args:
        start, end: of one shape; the result has their dtype, and equals them bit for bit at weight 0 and 1.
        weight: in [0, 1].
        dim: the dimensions that make up one vector.
    """
    for name, x in (("start", start), ("end", end)):
        require_type(name, x, Tensor, "slerp turns tensors; make one with torch.as_tensor.")
        if not x.is_floating_point() or not bool(x.isfinite().all()):
            raise ValueError(f"{name} must be finite numbers in floating point, got {x.dtype} with NaN or whole ones.")
    require_type("weight", weight, Real, "It is the share of the way, in [0, 1].")
    if start.shape != end.shape:
        raise ValueError(f"slerp needs tensors of one shape, got {tuple(start.shape)} and {tuple(end.shape)}.")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is the share of the way, in [0, 1], got {weight}.")
    if weight in (0, 1):
        return end if weight else start
    wide = torch.promote_types(start.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(x.to(wide), dim=dim, keepdim=True) for x in (start, end)]
    a, b = (_unit(x.to(wide), norm) for x, norm in zip((start, end), norms, strict=True))
    apart, together = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (a - b, a + b))
    angle = 2 * torch.atan2(apart, together)  # as acos(a b), but exact for small angles too
    if bool((angle > math.pi - 1e-3).any()):
        raise ValueError("slerp between opposite vectors has no direction to turn to; go by way of a third one.")
    # A small angle has its chord for its arc, and a sine too small to divide by.
    turn = angle.clamp(min=1e-3)
    from_a = torch.where(angle > 1e-3, ((1 - weight) * turn).sin() / turn.sin(), 1 - weight)
    from_b = torch.where(angle > 1e-3, (weight * turn).sin() / turn.sin(), weight)
    direction = from_a * a + from_b * b
    direction = _unit(direction, torch.linalg.vector_norm(direction, dim=dim, keepdim=True))
    return (direction * ((1 - weight) * norms[0] + weight * norms[1])).to(start.dtype)


def _unit(x: Tensor, norm: Tensor) -> Tensor:
    return x / norm.clamp(min=torch.finfo(norm.dtype).tiny)  # a zero vector stays one


def check_keys(prompts: str | Sequence[str], seeds: int | Sequence[int]) -> list[tuple[str, int]]:
    """Give the keys (prompt, seed) of an animation; one prompt or one seed is held while the other changes."""
    if prompts:
        require_texts("prompts", prompts)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    numbers = [seeds] if isinstance(seeds, int) else list(seeds)
    count = max(len(texts), len(numbers))
    if count < 2 or {len(texts), len(numbers)} - {1, count}:
        raise ValueError(
            "an animation needs two prompts or seeds at least, and as many seeds as prompts or one of either; "
            f"got {len(texts)} prompts and {len(numbers)} seeds."
        )
    for seed in numbers:
        require_type("a seed", seed, SupportsIndex, "Pass whole numbers.")
        if not 0 <= seed < 2**63:
            raise ValueError(f"a seed must be in [0, 2^63), got {seed}.")
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
    num_inference_steps: int = 1,
    guidance_scale: float = 1.0,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """Draw the way from picture to picture: `slerp` of the noise as a whole, and of each token's embedding.

    Key i is (prompts[i], seeds[i]), and its picture is the one that the pipeline draws from them, bit for bit.

    Args:
        pipeline: text to image, of the Stable Diffusion or SDXL family.
        prompts, seeds: at least two of one; the other may be single, and is held.
        frames: pictures from one key to the next, the key included and the next not: K keys make
            (K - 1) * frames + 1 pictures, or K * frames with `loop`.
        loop: go back from the last key to the first, so that the animation has no seam.
        height, width: in pixels; the model's by default.
    """
    keys = check_keys(prompts, seeds)
    require_pipeline("interpolate", pipeline, "unet", "vae", "encode_prompt")
    require_count("frames", frames)
    require_count("num_inference_steps", num_inference_steps)
    require_number("guidance_scale", guidance_scale)
    size = _picture_size(pipeline, height, width)
    quiet = copy.copy(pipeline)  # its progress bar is per picture; the models are shared
    quiet.set_progress_bar_config(disable=True)
    guided = guidance_scale > 1
    embeds = {prompt: _embed(pipeline, prompt, guided, negative_prompt) for prompt, _ in keys}
    dtype = next(iter(embeds.values()))["prompt_embeds"].dtype
    noises = {seed: _noise(pipeline, seed, size, dtype) for _, seed in keys}
    images = []
    for first, second, weight in tqdm(_way(keys, frames, loop), unit="picture", disable=not progress):
        latents = slerp(noises[first[1]], noises[second[1]], weight, dim=(1, 2, 3))
        between = {name: slerp(x, embeds[second[0]][name], weight) for name, x in embeds[first[0]].items()}
        result = quiet(
            latents=latents,
            **between,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=size[0],
            width=size[1],
        )
        images.append(result.images[0])
    return images


Key = tuple[str, int]


def _way(keys: list[Key], frames: int, loop: bool) -> list[tuple[Key, Key, float]]:
    """List, picture by picture, the two keys that it lies between and how far it is from the first."""
    ends = [*keys[1:], keys[0]] if loop else keys[1:]
    way = [(a, b, i / frames) for a, b in zip(keys, ends, strict=False) for i in range(frames)]
    return way if loop else [*way, (keys[-1], keys[-1], 0.0)]


def _embed(pipeline: Any, prompt: str, guided: bool, negative_prompt: str | None) -> dict[str, Tensor]:
    """Encode a prompt, as arguments for the pipeline's call; without guidance there is no negative embedding."""
    embeds = pipeline.encode_prompt(
        prompt=prompt,
        device=pipeline.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=negative_prompt,
    )
    return {name: x for name, x in zip(_EMBEDS, embeds, strict=False) if x is not None}


def _picture_size(pipeline: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Return height and width in pixels; what the caller leaves open is the model's."""
    size, factor = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
    own = size if isinstance(size, (list, tuple)) else (size, size)
    given = tuple(pixels or latent * factor for pixels, latent in zip((height, width), own, strict=True))
    for name, pixels in zip(("height", "width"), given, strict=True):
        if pixels < 0 or pixels % factor:
            raise ValueError(f"{name} must be a multiple of {factor}, got {pixels}.")
    return given[0], given[1]


def _noise(pipeline: Any, seed: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Draw the noise of a seed as the pipeline does from a generator on the CPU, `(1, C, H, W)`."""
    latent = [pixels // pipeline.vae_scale_factor for pixels in size]
    shape = (1, pipeline.unet.config.in_channels, *latent)
    return randn_tensor(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
