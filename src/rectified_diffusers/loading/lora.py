"""LoRA fixes and checks for diffusers: models with a LoRA attached, and files in the layout of kohya and CivitAI."""

import copy
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

MAX_RANK = 4096  # no layer of Stable Diffusion or SDXL has a product of rank above 1280
_FACTOR = re.compile(
    r"(?P<layer>.+?)(?P<kind>[._]lora(?:_linear_layer)?[._])(?P<side>A|B|down|up)(?P<end>(?:\.\w+)?\.weight)"
)
_OTHER = {"A": "B", "B": "A", "down": "up", "up": "down"}
# What diffusers, PEFT and torch raise for a LoRA whose keys and shapes do not fit the model.
UNFIT = (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, SafetensorError)
_AGAIN = "The file is damaged or not a LoRA: download it again."
_OLD_ATTENTION = re.compile(r"self_attn\.to_(q|k|v|out)_lora\.")  # text encoder; the U-Net's are attn1 and attn2


def has_lora(model: nn.Module) -> bool:
    """Return whether a LoRA is attached to a model, active or not.

    `save_pretrained` of such a model writes files that cannot be loaded: the layers of a LoRA rename the weights, and
    transformers saves the LoRA with a path to its base model.
    """
    return any(name.endswith(".base_layer") for name, _ in model.named_modules())


def refuse_lora(names: Iterable[str], whose: str) -> None:
    """Refuse the weights of a model with a LoRA attached: they have other names, and the LoRA would be ignored."""
    renamed = next((name for name in names if ".base_layer." in name), None)
    if renamed is not None:
        raise ValueError(
            f"A LoRA is attached to {whose}: expected a model's plain weights, got {renamed!r}. Unload the LoRA "
            "first (pipeline.unload_lora_weights()); it can be loaded again afterwards."
        )


def mend_kohya(
    weights: Mapping[str, Tensor], alphas: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the same LoRA (up * down * alpha / rank in every layer) as diffusers 0.38 to 0.42 reads it correctly.

    - For attention layers and the text encoder, diffusers passes alphas that differ from the most common one to PEFT
      under names that PEFT does not know. These layers then get the most common alpha. Here all layers get that alpha,
      and `up` is multiplied by alpha / commonest, in float32. A layer without an alpha uses its rank as alpha.
    - diffusers recognizes the text encoder's attention layers in this naming only if a `to_out` is among them.

    Args:
        weights: as `lora_state_dict` converts a kohya file: `unet.<layer>.lora.down.weight` and so on.
        alphas: as `lora_state_dict` returns them: `unet.<layer>.alpha`.
    """
    downs = {f"{key.split('.lora.')[0]}.alpha": key for key in weights if key.endswith(".down.weight")}
    alpha_of = {name: float(alphas.get(name, weights[down].shape[0])) for name, down in downs.items()}
    if not alpha_of or not alphas.keys() <= alpha_of.keys():  # another layout: no known fix applies
        return dict(weights), dict(alphas)
    ((commonest, _),) = Counter(alpha_of.values()).most_common(1)
    ups = {downs[name].replace(".down.", ".up."): alpha for name, alpha in alpha_of.items() if alpha != commonest}
    mended = {**weights, **{up: weights[up].float() * (alpha / commonest) for up, alpha in ups.items()}}
    renamed = {_OLD_ATTENTION.sub(r"self_attn.\1_proj.lora_linear_layer.", key): mended[key] for key in mended}
    return renamed, dict.fromkeys(alpha_of, commonest)


def check_lora(
    weights: Mapping[str, Any], alphas: Mapping[str, Any] | None, metadata: Mapping[str, Any] | None
) -> None:
    """Refuse a LoRA that no training produces: NaN, unequal or huge ranks, half of a product, no weights.

    Args:
        weights: by name, in any layout; a pair of factors is recognized by the names that the layouts share.
        metadata: settings of PEFT, if the file has them: `unet.r` and so on.
    """
    if not weights:
        raise ValueError("A LoRA must hold pairs of lora_down and lora_up, or lora_A and lora_B, got no weights.")
    alphas = dict(alphas or {})
    for name, tensor in weights.items():
        if name.endswith(".alpha") and isinstance(tensor, Tensor):
            if tensor.numel() != 1:
                raise ValueError(f"{name!r} holds {tensor.numel()} elements, expected one number. {_AGAIN}")
            alphas[name] = tensor
            continue
        check_factor(name, tensor)
        found = _FACTOR.fullmatch(name)
        if found is None:
            continue
        other = f"{found['layer']}{found['kind']}{_OTHER[found['side']]}{found['end']}"
        if other not in weights:
            raise ValueError(f"{name!r} has no partner {other!r}: a LoRA has two factors per layer. {_AGAIN}")
        if found["side"] in ("A", "down") and tensor.shape[0] != weights[other].shape[1:2].numel():
            raise ValueError(
                f"{name!r} of shape {tuple(tensor.shape)} and {other!r} of shape {tuple(weights[other].shape)} have "
                f"different ranks. {_AGAIN}"
            )
    numbers = {**alphas, **dict(_numbers(metadata or {}))}
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            number = number.item() if number.numel() == 1 else math.nan
        if not -1e30 < number < 1e30 or (name.endswith(".r") and not 1 <= number <= MAX_RANK):
            raise ValueError(f"{name!r} must be finite, and a rank from 1 to {MAX_RANK}, got {number}. {_AGAIN}")


def check_factor(name: str, tensor: Tensor) -> None:
    """Refuse one tensor of a LoRA file if its values or its rank are invalid."""
    if not isinstance(tensor, Tensor) or (tensor.ndim and not tensor.is_floating_point()):
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"The LoRA holds {kind} in {name!r}, expected a tensor of floating point. {_AGAIN}")
    if not tensor.float().isfinite().all():
        raise ValueError(f"The LoRA holds NaN or infinity in {name!r}, expected finite numbers. {_AGAIN}")
    found = _FACTOR.fullmatch(name)
    if found is None:
        return
    rank = tensor.shape[0 if found["side"] in ("A", "down") else 1] if tensor.ndim >= 2 else None
    if rank is None or not 1 <= rank <= MAX_RANK:
        raise ValueError(
            f"{name!r} has the shape {tuple(tensor.shape)}, expected a matrix of rank 1 to {MAX_RANK}. {_AGAIN}"
        )


def check_fits(weights: Mapping[str, Tensor], prefix: str, model: nn.Module) -> None:
    """Refuse factors for layers that a model does not have or that have another size in it.

    Names of older layouts are left to PEFT, which checks them when it loads them.
    """
    layers = {name.removesuffix(".base_layer"): layer for name, layer in model.named_modules()}
    for name, tensor in weights.items():
        found = _FACTOR.fullmatch(name)
        if found is None or found["kind"][0] == "_" or not name.startswith(f"{prefix}."):
            continue
        wanted = found["layer"].removeprefix(f"{prefix}.")
        # Transformers 5 has no `text_model.` in a text encoder's layer names; a StackedUNet's conv_out is in `second`.
        known = (wanted, wanted.removeprefix("text_model."), f"text_model.{wanted}", f"second.{wanted}")
        layer: Any = next((layers[each] for each in known if each in layers), None)
        if layer is None:
            raise ValueError(
                f"The LoRA is for a layer {wanted!r} of the {prefix}, which {type(model).__name__} does not have. "
                "It was made for another architecture: load it into a pipeline of that one."
            )
        weight = getattr(layer, "weight", None)
        axis, place = (1, 1) if found["side"] in ("A", "down") else (0, 0)  # inputs of one, outputs of the other
        if isinstance(weight, Tensor) and weight.ndim >= 2 and tensor.shape[axis] != weight.shape[place]:
            raise ValueError(
                f"{name!r} has the shape {tuple(tensor.shape)}, but its layer's weight has {tuple(weight.shape)}. "
                "It was made for another architecture: load it into a pipeline of that one."
            )


@contextmanager
def attaching(pipeline: Any, hotswap: bool) -> Iterator[None]:
    """Leave the pipeline exactly as it was if the LoRA loaded inside is refused.

    Raises:
        ValueError: instead of whatever diffusers and PEFT raise for weights that do not fit.
    """
    try:
        with unchanged_if_refused(pipeline, hotswap):
            yield
    except UNFIT as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        is_key = isinstance(error, (KeyError, IndexError))  # whose text is only the key
        reason = repr(error) if is_key else " ".join(str(error).split())
        raise ValueError(f"The LoRA cannot be loaded into {type(pipeline).__name__}: {reason}") from error


@contextmanager
def unchanged_if_refused(pipeline: Any, hotswap: bool) -> Iterator[None]:
    """Restore every module, adapter, scale and hook of a pipeline if the block raises.

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
    try:
        yield
    except BaseException:
        for container, entries in before:
            container.clear()
            container.extend(entries) if isinstance(container, list) else container.update(entries)
        for tensor, value in values:
            tensor.data = value
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


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
    """Raise if a component carries a LoRA: neither kind of export can keep it separate from the weights."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            try:
                refuse_lora(part.state_dict(), f"the pipeline's {name}")
            except ValueError as error:
                raise ValueError(f"{error} To export the model with it, call pipeline.fuse_lora() before.") from None
