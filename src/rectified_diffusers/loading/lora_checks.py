"""Checks around LoRAs: models that have one attached, values of a file, and refusal without traces.

`lora_file.py` reads the format of the files, `lora_attach.py` attaches them.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rectified_diffusers.loading.lora_file import part_of

MAX_RANK = 4096  # no layer of Stable Diffusion or SDXL has a product of rank above 1280
# What diffusers, PEFT and torch raise for a LoRA whose keys and shapes do not fit the model.
UNFIT = (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, SafetensorError)
_AGAIN = "The file is damaged or not a LoRA: download it again."


def has_lora(model: nn.Module) -> bool:
    """Return whether a LoRA is attached to a model, active or not; what `save_pretrained` writes of it is unusable."""
    return any(name.endswith(".base_layer") for name, _ in model.named_modules())


def refuse_lora(names: Iterable[str], whose: str) -> None:
    """Refuse the weights of a model with a LoRA attached: they have other names, and the LoRA would be ignored."""
    renamed = next((name for name in names if ".base_layer." in name), None)
    if renamed is not None:
        raise ValueError(
            f"A LoRA is attached to {whose}: expected a model's plain weights, got {renamed!r}. Call "
            "pipeline.unload_lora_weights() first; the LoRA can be loaded again afterwards."
        )


def check_lora(weights: Mapping[str, Any], settings: Mapping[str, Any] | None) -> None:
    """Refuse a LoRA whose values no training produces: NaN, huge ranks, no weights.

    Args:
        weights: by name, in any layout.
        settings: alphas by name, or those of PEFT, if the file has them: `unet.r` and so on.
    """
    if not weights:
        raise ValueError("A LoRA must hold pairs of lora_down and lora_up, or lora_A and lora_B, got no weights.")
    numbers = dict(_numbers(settings or {}))
    for name, tensor in weights.items():
        if not name.endswith(".alpha") or not isinstance(tensor, Tensor):
            check_factor(name, tensor)
        elif tensor.numel() != 1:
            raise ValueError(f"{name!r} holds {tensor.numel()} elements, expected one number. {_AGAIN}")
        else:
            numbers[name] = tensor.item()
    for name, number in numbers.items():
        if not -1e30 < number < 1e30 or (name.endswith(".r") and not 1 <= number <= MAX_RANK):
            raise ValueError(f"{name!r} must be finite, and a rank from 1 to {MAX_RANK}, got {number}. {_AGAIN}")


def check_factor(name: str, tensor: Tensor) -> None:
    """Refuse one tensor of a LoRA file if its values or its rank are invalid."""
    if not isinstance(tensor, Tensor) or (tensor.ndim and not tensor.is_floating_point()):
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"The LoRA holds {kind} in {name!r}, expected a tensor of floating point. {_AGAIN}")
    if not tensor.float().isfinite().all():
        raise ValueError(f"The LoRA holds NaN or infinity in {name!r}, expected finite numbers. {_AGAIN}")
    part = (part_of(name) or ("", ""))[1]
    if part not in ("down", "up"):
        return
    shape = tuple(tensor.shape)
    if len(shape) < 2 or not 1 <= shape[0 if part == "down" else 1] <= MAX_RANK:
        raise ValueError(f"{name!r} has the shape {shape}, expected a matrix of rank 1 to {MAX_RANK}. {_AGAIN}")


@contextmanager
def attaching(pipeline: Any, hotswap: bool) -> Iterator[None]:
    """Leave the pipeline exactly as it was if the LoRA loaded inside is refused.

    Raises:
        ValueError: instead of whatever diffusers and PEFT raise for weights that do not fit.
    """
    restore = _snapshot(pipeline, hotswap)
    try:
        yield
    except BaseException as error:
        restore()
        if not isinstance(error, UNFIT) or isinstance(error, torch.OutOfMemoryError):
            raise
        is_key = isinstance(error, (KeyError, IndexError))  # whose text is only the key
        reason = repr(error) if is_key else " ".join(str(error).split())
        raise ValueError(f"The LoRA cannot be loaded into {type(pipeline).__name__}: {reason}") from error


def _snapshot(pipeline: Any, hotswap: bool) -> Callable[[], None]:
    """Return a function that restores every module, adapter, scale and hook of a pipeline.

    The dictionaries, lists and sets of all modules are copied, but no weights. Only a hotswap writes into tensors: for
    one, those of the adapters are copied too.
    """
    models = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    owners = [pipeline, *(module for model in models for module in model.modules())]
    containers: list[Any] = [vars(owner) for owner in owners]
    kinds = (dict, list, set, OrderedDict)  # no subclasses: a diffusers config refuses changes
    containers += [value for holder in list(containers) for value in holder.values() if type(value) in kinds]
    before = [(container, copy.copy(container)) for container in containers]
    parameters = [item for model in models for item in model.named_parameters()]
    trained = [(parameter, parameter.requires_grad) for _, parameter in parameters]
    written = [parameter for name, parameter in parameters if hotswap and "lora_" in name]
    scalings = [vars(owner).get("scaling") for owner in owners]
    written += [scale for each in scalings if type(each) is dict for scale in each.values() if torch.is_tensor(scale)]
    values = [(tensor, tensor.detach().clone()) for tensor in written]

    def restore() -> None:
        for container, entries in before:
            container.clear()
            container.extend(entries) if isinstance(container, list) else container.update(entries)
        for tensor, value in values:
            tensor.data = value
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    return restore


def refuse_fused_lora(pipeline: Any) -> None:
    """Refuse to weight adapters while one is fused: no image would change, but unfusing would no longer be exact."""
    for name, part in pipeline.components.items():
        modules = part.modules() if isinstance(part, nn.Module) else ()
        if any(getattr(module, "merged_adapters", None) for module in modules):
            raise ValueError(f"A LoRA is fused into the pipeline's {name}. Call unfuse_lora() before set_adapters().")


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in a JSON value with their paths; paths of a rank_pattern end in `.r` too."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            ranks = key == "rank_pattern" or key.endswith(".rank_pattern")
            if ranks and isinstance(inner, Mapping):
                inner = {f"{layer}.r": rank for layer, rank in inner.items()}
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def refuse_any_lora(pipeline: Any) -> None:
    """Raise if a component carries a LoRA: saved or exported, its weights would have names that cannot be loaded."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and has_lora(part):
            raise ValueError(
                f"A LoRA is attached to the pipeline's {name}, expected plain weights. To keep it in them, call "
                f"fuse_lora(components=[{name!r}]) and unload_lora_weights(); save_lora_weights() saves it by itself."
            )
