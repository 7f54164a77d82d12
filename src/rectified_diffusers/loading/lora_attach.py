"""Attach every layer of a LoRA file by PEFT, or refuse the file and leave the pipeline exactly as it was.

A file is first rewritten in one spelling with settings of our own, because diffusers recognizes the layout of a file
by its first names, and leaves out or misreads what follows in another. After loading, the attached weights are
compared with the file's.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rectified_diffusers.loading.lora_file import LORA_PARTS, FileLayer, file_layers, layer_in

_MERGE = "Merge the file into the weights instead: apply_weight_delta(pipeline, file, scale), undone by take_back()"
_NO_HOTSWAP = "Delete the adapter and load the file without hotswap."


@dataclass(frozen=True)
class AttachedLayer:
    """A layer of a LoRA as PEFT computes it: W + scaling * up * down, with DoRA's row norms set to `magnitude`."""

    down: Tensor
    up: Tensor
    up_bias: Tensor | None
    magnitude: Tensor | None
    scaling: float

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors under PEFT's names."""
        named = {"lora_A.weight": self.down, "lora_B.weight": self.up}
        named |= {} if self.up_bias is None else {"lora_B.bias": self.up_bias}
        return named | ({} if self.magnitude is None else {"lora_magnitude_vector.weight": self.magnitude})


Attachment = dict[str, dict[str, AttachedLayer]]
"""By component and by the layer's name in its model."""


def plan_attachment(
    weights: Mapping[str, Tensor], metadata: Mapping[str, Any] | None, models: Mapping[str, nn.Module]
) -> Attachment:
    """Return what PEFT has to attach for a LoRA file in any spelling; nothing is changed yet.

    Raises:
        ValueError: a tensor does not fit the models, or PEFT cannot attach a layer of this kind.
    """
    layers = file_layers(weights, models)
    _require_attachable(layers)
    plan: Attachment = {}
    for layer in layers:
        settings = _settings_of(metadata or {}, layer.component)
        target = layer_in(models[layer.component], layer.name)
        parts = {part: weights[name] for part, name in layer.parts.items()}
        plan.setdefault(layer.component, {})[layer.name] = _attached(layer, parts, settings, target.weight.shape)
    for component, attached in plan.items():
        _complete(attached, component)
    return plan


def _require_attachable(layers: list[FileLayer]) -> None:
    for layer in layers:
        others = sorted(layer.parts.keys() - LORA_PARTS)
        if others:
            tensor = layer.parts[others[0]]
            raise ValueError(f"{tensor!r} is of a LyCORIS file, expected lora_down and lora_up. {_MERGE}.")
        for part in ("down", "up"):
            if part not in layer.parts:
                raise ValueError(f"{next(iter(layer.parts.values()))!r} has no lora_{part}, expected both factors.")


def _attached(
    layer: FileLayer, parts: Mapping[str, Tensor], settings: Mapping[str, Any], shape: torch.Size
) -> AttachedLayer:
    """Return a layer in the shapes of its model's weight, after checking that it fits them."""
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    rank, kernel = down.shape[0], shape[2:]
    if mid is not None:  # Tucker: down is 1x1 and mid has the kernel; PEFT wants their product
        if mid.shape != (rank, rank, *kernel) or down.numel() != rank * shape[1]:
            raise _unfit(layer, "mid", mid, shape)
        down = torch.einsum("rs...,si->ri...", mid.float(), down.float().flatten(1))
    for part, tensor, wanted in (
        ("down", down, (rank, *shape[1:])),
        ("up", up, (shape[0], rank, *(1 for _ in kernel))),
    ):
        if _without_ones(tensor) != _without_ones(wanted):
            raise _unfit(layer, part, parts[part], shape)
    down, up = down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank, *(1 for _ in kernel))
    magnitude = _row_norms(layer, parts, shape)
    return AttachedLayer(down, up, parts.get("up_bias"), magnitude, _scaling(layer, parts, settings, rank))


def _without_ones(shape: Any) -> list[int]:
    """Return rank, inputs and kernel without the ones at the end: a 1x1 convolution may be stored as a matrix."""
    sizes = list(shape.shape if isinstance(shape, Tensor) else shape)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes.pop()
    return sizes


def _unfit(layer: FileLayer, part: str, tensor: Tensor, shape: torch.Size) -> ValueError:
    return ValueError(
        f"{layer.parts[part]!r} has the shape {tuple(tensor.shape)}, but its layer's weight has {tuple(shape)}. "
        "It was made for another architecture: load it into a pipeline of that one."
    )


def _row_norms(layer: FileLayer, parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor | None:
    """Return DoRA's magnitudes as PEFT has them, one for each output; LyCORIS can have one for each input instead."""
    part = next((part for part in ("magnitude", "dora_scale") if part in parts), None)
    if part is None:
        return None
    magnitude = parts[part]
    by_output = magnitude.numel() == shape[0] and (part == "magnitude" or magnitude.shape[0] == shape[0])
    if not by_output:
        if part == "dora_scale" and magnitude.shape[1:2] == shape[1:2] and magnitude.numel() == shape[1]:
            raise ValueError(
                f"{layer.parts[part]!r} has one DoRA magnitude for each input, PEFT has one for each output. {_MERGE}."
            )
        raise _unfit(layer, part, magnitude, shape)
    return magnitude.reshape(1, -1, *(1 for _ in shape[2:])) if len(shape) > 2 else magnitude.flatten()


def _settings_of(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    start = f"{component}."
    return {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}


def _scaling(layer: FileLayer, parts: Mapping[str, Tensor], settings: Mapping[str, Any], rank: int) -> float:
    """Return alpha / rank, of the file's alpha or its settings; without either it is 1."""
    if "alpha" in parts:
        return float(parts["alpha"].item()) / rank
    if "lora_alpha" not in settings:
        return 1.0
    from peft.utils.other import get_pattern_key  # importing PEFT takes a second

    spelled = layer.parts["down"].split(".lora_")[0].removeprefix(f"{layer.component}.")

    def setting(patterns: str, default: Any) -> Any:
        pattern: dict[str, Any] = settings.get(patterns) or {}
        keys = (get_pattern_key(list(pattern), name) for name in (spelled, layer.name))
        return next((pattern[key] for key in keys if key in pattern), default)

    stated = setting("rank_pattern", settings.get("r"))
    if stated != rank:
        raise ValueError(
            f"{layer.parts['down']!r} is of rank {rank}, but the file's settings say {stated}. Download it again."
        )
    alpha = float(setting("alpha_pattern", settings["lora_alpha"]))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _complete(attached: dict[str, AttachedLayer], component: str) -> None:
    """Set one scaling for all layers, and biases for all if one has them; refuse DoRA in a part of the layers."""
    with_norms = sum(layer.magnitude is not None for layer in attached.values())
    if with_norms not in (0, len(attached)):
        count = f"{with_norms} of the {len(attached)} layers of the {component}"
        raise ValueError(f"{count} are DoRA, PEFT needs all or none. {_MERGE}.")
    scalings = Counter(layer.scaling for layer in attached.values() if layer.scaling)
    common = scalings.most_common(1)[0][0] if scalings else 0.0
    with_biases = any(layer.up_bias is not None for layer in attached.values())
    for name, layer in attached.items():
        up, bias = layer.up, layer.up_bias
        if with_biases and bias is None:
            bias = torch.zeros(len(up), dtype=up.dtype)
        if layer.scaling != common:  # PEFT's hotswap knows one scaling only
            factor = layer.scaling / common
            up, bias = up.float() * factor, None if bias is None else bias.float() * factor
        attached[name] = AttachedLayer(layer.down, up, bias, layer.magnitude, common)


def as_diffusers_reads_it(
    plan: Attachment, metadata: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights and the settings with which `load_lora_weights` of diffusers attaches the planned layers."""
    weights: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, layers in plan.items():
        ranks = {name: layer.down.shape[0] for name, layer in layers.items()}
        ((rank, _),) = Counter(ranks.values()).most_common(1)
        first = next(iter(layers.values()))
        others = {f"^{name}": other for name, other in ranks.items() if other != rank}
        given = _settings_of(metadata or {}, component)
        config = {
            **given,
            "r": rank,
            "lora_alpha": first.scaling * rank,
            "rank_pattern": others,
            "alpha_pattern": {name: first.scaling * other for name, other in others.items()},
            "target_modules": sorted(layers),
            "exclude_modules": None,
            "use_rslora": False,
            "use_dora": first.magnitude is not None,
            "lora_bias": first.up_bias is not None,
        }
        settings |= {f"{component}.{key}": value for key, value in config.items()}
        for name, layer in layers.items():
            for end, tensor in layer.tensors().items():
                if component != "unet":  # the only spelling that diffusers reads for every layer of a text encoder
                    end = end.replace("lora_A.", "lora_linear_layer.down.").replace("lora_B.", "lora_linear_layer.up.")
                weights[f"{component}.{name}.{end}"] = tensor.clone()  # PEFT's hotswap writes into the given tensors
    return weights, settings


def require_hotswap(plan: Attachment, adapter: str | None, models: Mapping[str, nn.Module]) -> None:
    """Refuse a hotswap for which the adapter of that name has no room, before PEFT deletes the adapter."""
    if plan.keys() != {"unet"}:
        raise ValueError(f"hotswapping is not supported for text encoders, expected only the U-Net. {_NO_HOTSWAP}")
    unet: Any = models["unet"]
    if adapter not in getattr(unet, "peft_config", {}):
        return  # diffusers says so
    if any(layer.magnitude is not None for layer in plan["unet"].values()):
        raise ValueError(f"DoRA cannot be hotswapped. {_NO_HOTSWAP}")
    for name in plan["unet"]:
        if adapter not in getattr(layer_in(unet, name), "lora_A", {}):
            raise ValueError(
                f"the adapter {adapter!r} has no layer {name!r}, expected a file for the same layers. {_NO_HOTSWAP}"
            )


@contextmanager
def hotswapping(plan: Attachment, adapter: str, models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Complete a hotswap: PEFT keeps the old alpha, and zeroes every adapter whose weights' names contain the name."""
    unet: Any = models["unet"]
    others = [
        (parameter, parameter.detach().clone())
        for name, parameter in unet.named_parameters()
        if ".lora_" in name and name.split(".")[-2] != adapter
    ]
    yield
    for parameter, value in others:
        parameter.data.copy_(value)
    for name, layer in plan["unet"].items():
        target = layer_in(unet, name)
        target.lora_alpha[adapter] = layer.scaling * target.r[adapter]  # what set_adapters multiplies


def require_attached(plan: Attachment, adapter_name: str | None, models: Mapping[str, nn.Module]) -> None:
    """Raise if an attached layer differs from the plan, whatever the libraries made of the file."""
    for component, layers in plan.items():
        loaded: Any = models[component]
        adapter = adapter_name or list(loaded.peft_config)[-1]
        for name, layer in layers.items():
            if not _is_attached(layer_in(loaded, name), adapter, layer):
                raise ValueError(
                    f"the layer {name!r} of the {component} was not attached as the file has it, by these versions of "
                    "diffusers and PEFT. Upgrade them"
                )


def _is_attached(target: Any, adapter: str, layer: AttachedLayer) -> bool:
    if any(adapter not in getattr(target, kind, {}) for kind in ("lora_A", "lora_B")):
        return False
    a, b, rank = target.lora_A[adapter], target.lora_B[adapter], len(layer.down)
    pairs = [(a.weight[:rank], layer.down), (b.weight[:, :rank], layer.up)]  # a hotswap pads with zeros
    if layer.magnitude is not None:
        pairs.append((target.lora_magnitude_vector[adapter].weight, layer.magnitude))
    if layer.up_bias is not None:
        pairs.append((b.bias, layer.up_bias))
    equal = (not x.is_meta and torch.equal(x.detach().cpu(), y.to("cpu", x.dtype)) for x, y in pairs)
    return all(equal) and math.isclose(float(target.scaling[adapter]), layer.scaling, rel_tol=1e-6)
