"""What surrounds each call of a pipeline: its defaults, checks, conversion of images, and threads."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from rectified_diffusers.checks import (
    require_count,
    require_finite,
    require_latents,
    require_number,
    require_texts,
    require_unicode,
)
from rectified_diffusers.images import (
    as_images,
    as_masks,
    as_pil,
    batched,
    require_finite_images,
    require_size,
)
from rectified_diffusers.pipelines.scheduler import student_steps

P = ParamSpec("P")
R = TypeVar("R")


def one_step_by_default(call: Callable[P, R]) -> Callable[P, R]:
    """Return a pipeline's `__call__` with one step and no guidance as defaults; the rest is diffusers' own.

    Stable Diffusion's defaults, 50 steps and guidance 7.5, waste time on a rectified flow and oversaturate colors. The
    explicit signature is kept, with the new defaults, because diffusers and its tests inspect it. A model that was
    distilled to N steps takes these N by default, see `student_steps`.
    """
    signature = inspect.signature(call)
    defaults = {"num_inference_steps": 1, "guidance_scale": 1.0}
    parameters = [
        parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in signature.parameters.items()
    ]
    signature = signature.replace(parameters=parameters)

    @functools.wraps(call)
    def call_with_defaults(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = signature.bind(*args, **kwargs)
        decides = "num_inference_steps" in arguments.arguments
        arguments.apply_defaults()
        _check_call(arguments.arguments)
        _convert_images(arguments.arguments)
        pipeline = arguments.arguments["self"]
        if not decides:
            arguments.arguments["num_inference_steps"] = student_steps(pipeline.scheduler)
        with _one_call_at_a_time(pipeline):
            return call(*arguments.args, **arguments.kwargs)

    call_with_defaults.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return call_with_defaults


_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # of the denoising networks
_ENCODING = threading.RLock()
_RUNNING: WeakSet[SchedulerMixin] = WeakSet()


def only_thread(network: nn.Module) -> threading.RLock:
    """Return the lock of a network, for calls of it and for functions that run it themselves."""
    return _LOCKS.setdefault(network, threading.RLock())


def one_encoding_at_a_time(encode_prompt: Callable[P, R]) -> Callable[P, R]:
    """Return `encode_prompt` with a lock: tokenizers hold the padding, text encoders hooks and the scale of a LoRA.

    Pipelines with other networks can share both, so there is one lock for all.
    """

    @functools.wraps(encode_prompt)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with _ENCODING:
            return encode_prompt(*args, **kwargs)

    return locked


@contextmanager
def _one_call_at_a_time(pipeline: Any) -> Iterator[None]:
    """Let calls from other threads wait: a call sets the scheduler's grid, LoRA scales and caches of the network.

    Pipelines that share a network share its lock. A call from within a call, in a callback, needs another scheduler.
    """
    with only_thread(pipeline.unet):
        scheduler = pipeline.scheduler
        if scheduler in _RUNNING:
            raise RuntimeError(
                "This pipeline is generating already. In a callback, call another pipeline with the same weights: "
                f"{type(pipeline).__name__}.from_pipe(pipeline)."
            )
        _RUNNING.add(scheduler)
        try:
            yield
        finally:
            _RUNNING.discard(scheduler)


def _check_call(given: dict[str, Any]) -> None:
    """Check arguments that diffusers would silently accept, or refuse with an error from torch."""
    prompt, embeds, latents = (given.get(name) for name in ("prompt", "prompt_embeds", "latents"))
    unknown = given.get("kwargs", {}).keys() - {"callback", "callback_steps"}
    if unknown:
        known = ", ".join(name for name in given if name not in ("self", "kwargs"))
        raise TypeError(f"There is no argument {min(unknown)!r}, expected one of {known}. Check the spelling.")
    copies = given.get("num_images_per_prompt")
    require_number("guidance_scale", given["guidance_scale"])
    if copies is not None:
        require_count("num_images_per_prompt", copies)
    for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
        require_unicode(name, given.get(name))
    if isinstance(prompt, list):  # diffusers checks anything else
        require_texts("prompt", prompt)
    if embeds is not None:
        require_finite("prompt_embeds", embeds)
    if latents is not None:
        pipeline = given["self"]
        require_latents("latents", latents, pipeline.vae.config["latent_channels"])
        if len(latents) != _rows(given):
            raise ValueError(f"latents must hold one noise for each of {_rows(given)} images, got {len(latents)}.")
        # An optimized pipeline keeps them in float32, and rounds only what the network reads.
        keeps_float32 = "prepare_latents" in vars(pipeline) and latents.dtype == torch.float32
        given["latents"] = latents if keeps_float32 else latents.to(pipeline.unet.dtype)


def _convert_images(given: dict[str, Any]) -> None:
    """Convert images and masks, in place, to forms that diffusers reads correctly."""
    pipeline = given["self"]
    starts = hasattr(pipeline, "get_timesteps")  # from `image`, which can be latents
    conditions = "control_image" if "control_image" in given else "image"
    for name in ("image", "control_image", "ip_adapter_image"):
        if name not in given or (name == "ip_adapter_image" and given[name] is None):
            continue
        if name == conditions and not (starts and name == "image"):
            given[name] = _conditioning_images(pipeline, name, given[name])
        elif name == "image":
            given[name] = _start_images(pipeline, given)
        else:
            images = as_images(name, given[name])
            given[name] = batched(name, images) if isinstance(images, Tensor) else images
    if "mask_image" in given:
        given["mask_image"] = batched("mask_image", as_masks("mask_image", given["mask_image"]))
        _require_divisor("mask_image", given)
    if given.get("padding_mask_crop") is not None:
        if not np.any(np.asarray(given["mask_image"])):
            raise ValueError("mask_image: expected masked pixels, got none. Leave out padding_mask_crop.")
        given |= {name: as_pil(given[name]) for name in ("image", "mask_image")}


def _start_images(pipeline: Any, given: dict[str, Any]) -> Any:
    """Convert the images to start from, which can be latents."""
    latent_channels = pipeline.vae.config["latent_channels"]
    images = batched("image", as_images("image", given["image"], latent_channels=latent_channels))
    if not (isinstance(images, Tensor) and images.shape[1] == latent_channels) and given.get("height") is None:
        require_size("image", images, pipeline.vae_scale_factor)
    given["image"] = images
    _require_divisor("image", given)
    return images


def _rows(given: dict[str, Any]) -> int:
    """Return the number of images that a call generates."""
    prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
    rows = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
    return rows * (given.get("num_images_per_prompt") or 1)


def _require_divisor(name: str, given: dict[str, Any]) -> None:
    """Raise a ValueError for images of which some would be used more often than others, or not at all."""
    images, rows = given[name], _rows(given)
    count = 1 if not isinstance(images, (list, Tensor)) else len(images)
    if rows % count:
        raise ValueError(
            f"{name}: expected one image for each of {rows} to generate, or one for all, got {count}. Pass a prompt "
            "for each image."
        )


def _conditioning_images(pipeline: Any, name: str, images: Any) -> Any:
    """Convert the images for a pipeline's ControlNets or T2I-Adapters, with the channels that each network takes."""
    network = getattr(pipeline, "controlnet", None) or pipeline.adapter
    networks = list(getattr(network, "nets", getattr(network, "adapters", [network])))
    channels = [net.config.get("conditioning_channels", net.config.get("in_channels")) for net in networks]
    if len(networks) > 1 and isinstance(images, (list, tuple)) and len(images) == len(networks):
        return [batched(name, as_images(name, *pair)) for pair in zip(images, channels, strict=True)]
    return batched(name, as_images(name, images, channels[0]))


class FiniteImageProcessor(VaeImageProcessor):
    """diffusers' image processor, which refuses NaN instead of making it black."""

    def postprocess(self, image: Any, output_type: str = "pil", *args: Any, **kwargs: Any) -> Any:
        if output_type in ("pil", "np") and isinstance(image, Tensor):
            require_finite_images(image)
        return super().postprocess(image, output_type, *args, **kwargs)
