"""Caches of the embeddings of prompts and of timesteps."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rectified_diffusers.speed.patching import replaced

PROMPTS, TIMES = 64, 256  # entries kept; a prompt of Stable Diffusion 1.5 is 0.2 MB in float32, a time 5 kB

Forget = Callable[[], None]


def weights_state(model: nn.Module) -> tuple[Any, ...]:
    """Return a value that changes when a model's weights are replaced or written to, or its adapters are switched.

    It does not detect writes through `parameter.data`, which is how peft fuses a LoRA: see `watched`.
    """
    parameters = list(model.parameters())
    versions = sum(0 if parameter.is_inference() else parameter._version for parameter in parameters)
    adapters = [
        (layer.disable_adapters, *layer.active_adapters, *layer.scaling.items())
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
    ]
    return len(parameters), versions, sum(parameter.data_ptr() for parameter in parameters), tuple(adapters)


@contextmanager
def cached_prompts(pipeline: Any) -> Iterator[Forget]:
    """Cache the results of `encode_prompt` for identical arguments, and yield a function that clears the cache.

    The key is every argument: prompt, negative prompt, clip_skip, lora_scale, device, the number of images. Calls with
    tensors among the arguments are passed on. The cache is cleared when a tokenizer, a text encoder or its weights
    change.
    """
    stock = pipeline.encode_prompt
    signature = inspect.signature(stock)
    results: OrderedDict[Any, Any] = OrderedDict()
    made_by: list[Any] = [None]

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        key = _frozen(arguments.arguments)
        if key is None or torch.is_grad_enabled():
            return stock(*args, **kwargs)
        if (now := _encoders_of(pipeline)) != made_by[0]:
            results.clear()
            made_by[0] = now
        if key not in results:
            results[key] = stock(*args, **kwargs)
            if len(results) > PROMPTS:
                results.popitem(last=False)
        results.move_to_end(key)
        return tree_map_only(Tensor, torch.clone, results[key])  # so that no caller can modify the cache

    with replaced(pipeline, "encode_prompt", encode_prompt):
        yield results.clear


def _encoders_of(pipeline: Any) -> tuple[Any, ...]:
    state: list[Any] = []
    for name, component in pipeline.components.items():
        if name.startswith("tokenizer") and component is not None:
            state += [id(component), len(component)]
        elif name.startswith("text_encoder") and component is not None:
            state += [id(component), weights_state(component)]
    return tuple(state)


def _frozen(value: Any) -> Any:
    """Return a hashable copy of an argument, or None if it holds a tensor or anything else that may change."""
    if isinstance(value, dict):
        parts = [(name, _frozen(part)) for name, part in value.items()]
        return None if any(part is None for _, part in parts) else ("dict", *parts)
    if isinstance(value, (list, tuple)):
        items = [_frozen(part) for part in value]
        return None if None in items else (type(value).__name__, *items)
    if value is None or isinstance(value, (str, int, float, bool, torch.device, torch.dtype)):
        return type(value).__name__, value
    return None


@contextmanager
def cached_times(unet: Any) -> Iterator[Forget]:
    """Cache the embeddings of the times at which a U-Net is evaluated: a single one in a one-step pipeline.

    This applies only where the timestep can be read without waiting for a device, that is, on the CPU.
    """
    embed_time, embed = unet.get_time_embed, unet.time_embedding.forward
    embeddings: OrderedDict[Any, Tensor] = OrderedDict()
    current: list[Any] = [None]

    def get_time_embed(sample: Tensor, timestep: Any) -> Any:
        readable = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
        values = tuple(torch.as_tensor(timestep).reshape(-1).tolist()) if readable else None
        current[0] = None if values is None else (values, len(sample), sample.dtype, sample.device)
        return embed_time(sample=sample, timestep=timestep)

    def forward(sample: Tensor, condition: Tensor | None = None) -> Tensor:
        if current[0] is None or condition is not None or torch.is_grad_enabled():
            return embed(sample, condition)
        key = (*current[0], weights_state(unet.time_embedding))
        if key not in embeddings:
            embeddings[key] = embed(sample)
            if len(embeddings) > TIMES:
                embeddings.popitem(last=False)
        return embeddings[key]

    with replaced(unet, "get_time_embed", get_time_embed), replaced(unet.time_embedding, "forward", forward):
        yield embeddings.clear


_CHANGES_WEIGHTS = (
    "load_lora_weights",
    "unload_lora_weights",
    "fuse_lora",
    "unfuse_lora",
    "set_adapters",
    "delete_adapters",
    "enable_lora",
    "disable_lora",
    "load_textual_inversion",
    "unload_textual_inversion",
    "load_ip_adapter",
    "unload_ip_adapter",
    "set_ip_adapter_scale",
)


@contextmanager
def watched(pipeline: Any, changed: Forget) -> Iterator[None]:
    """Call `changed` after each method of the pipeline that replaces or scales weights."""

    def notifying(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            finally:
                changed()

        return call

    with ExitStack() as stack:
        for name in _CHANGES_WEIGHTS:
            if hasattr(pipeline, name):
                stack.enter_context(replaced(pipeline, name, notifying(getattr(pipeline, name))))
        yield
