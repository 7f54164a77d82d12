"""LyCORIS files as weight deltas: LoCon, LoHa, LoKr, DoRA, full differences and norms (arXiv:2309.14859).

Every layer of such a file is a difference dW of a weight, given by factors. With s = alpha / rank:

- LoRA, LoCon: dW = s * up @ down, with Tucker up @ mid @ down (arXiv:2106.09685; LyCORIS, section 2)
- LoHa: dW = s * (w1_a @ w1_b) * (w2_a @ w2_b), an elementwise product
- LoKr: dW = s * kron(w1, w2), where w1 and w2 may be products themselves; s = 1 if neither is
- full and norm: dW = diff or w_norm, and diff_b or b_norm for the bias
- DoRA (arXiv:2402.09353): dW = m * (W + dW) / |W + dW| - W, with one norm for each output or each input
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rectified_diffusers.loading.lora_file import FileLayer, both_halves, file_layers, layer_in
from rectified_diffusers.weights.weight_files import StoredWeights

_WEIGHT = ({"down", "up"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"diff"}, {"w_norm"})
_LOKR = tuple(
    {*one, *two}
    for one in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
    for two in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
)
_BIAS = ("diff_b", "b_norm")
_OPTIONAL = {"up": {"mid"}, "hada_w1_a": {"hada_t1", "hada_t2"}, "lokr_w2_a": {"lokr_t2"}}


def open_lycoris(
    stored: StoredWeights, models: Mapping[str, nn.Module]
) -> tuple[Mapping[str, Any], Callable[[str, Tensor], Tensor]]:
    """Find the layers of a LyCORIS file in the models; no difference is computed yet.

    Args:
        models: by component: unet, text_encoder, text_encoder_2.

    Returns:
        a mapping whose keys are the names of the weights that the file changes, those of a text encoder with the
        prefix "text_encoder." or "text_encoder_2."; and a function that returns the difference for one of them, given
        its name and its values on the CPU.
    """
    changes: dict[str, FileLayer] = {}
    found = file_layers(stored.shapes, models, whose=f"file {stored.name}")
    unets = both_halves(models["unet"], [layer for layer in found if layer.component == "unet"])
    for layer in [*unets, *(layer for layer in found if layer.component != "unet")]:
        prefix = "" if layer.component == "unet" else f"{layer.component}."
        target = layer_in(models[layer.component], layer.name)
        for kind, parts in _split(layer).items():
            weight = getattr(target, kind, None)
            if not isinstance(weight, Tensor):
                raise ValueError(f"{next(iter(parts.values()))!r} is for a {kind} of {layer.name!r}, which has none.")
            changes[f"{prefix}{layer.name}.{kind}"] = FileLayer(layer.component, layer.name, parts)

    def difference(name: str, weight: Tensor) -> Tensor:
        layer = changes[name]
        parts = {part: stored.read(key).to(weight.dtype) for part, key in layer.parts.items()}
        try:
            return _difference(parts, weight)
        except RuntimeError as error:  # of torch, for shapes that do not fit
            raise ValueError(
                f"{stored.name}: the factors of {layer.name!r} do not give its weight's shape {tuple(weight.shape)} "
                f"({error}). The file was made for another architecture."
            ) from error

    return changes, difference


def _split(layer: FileLayer) -> dict[str, dict[str, str]]:
    """Return the parts of a layer's weight and of its bias, each a complete set."""
    biases = {part: name for part, name in layer.parts.items() if part in _BIAS}
    weights = {part: name for part, name in layer.parts.items() if part not in _BIAS}
    if len(biases) > 1 or (weights and not _is_complete(set(weights))):
        raise ValueError(
            f"{layer.name!r} has the parts {', '.join(sorted(layer.parts))}, expected those of one layer of LoRA, "
            "LoHa, LoKr, full difference or norm. Download the file again."
        )
    return {kind: parts for kind, parts in (("weight", weights), ("bias", biases)) if parts}


def _is_complete(parts: set[str]) -> bool:
    for required in (*_WEIGHT, *_LOKR):
        optional = set().union(*(more for part, more in _OPTIONAL.items() if part in required))
        if not required & {"diff", "w_norm"}:
            optional |= {"alpha", "dora_scale", "magnitude"}
        tucker = parts & optional & {"hada_t1", "hada_t2"}
        if required <= parts <= required | optional and len(tucker) != 1:
            return len(parts & {"dora_scale", "magnitude"}) < 2
    return False


def _difference(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """Return the difference of one weight in its shape, in the weight's dtype; the formulas are the module's."""
    for part in ("diff", "w_norm", *_BIAS):
        if part in parts:
            return _reshape(parts[part], weight)
    product = _reshape(_product(parts), weight)
    key = next((part for part in ("dora_scale", "magnitude") if part in parts), None)
    return product if key is None else _normed(weight + product, parts[key], key) - weight


def _product(parts: Mapping[str, Tensor]) -> Tensor:
    if "up" in parts:
        up, down, rank = parts["up"].flatten(1), parts["down"].flatten(1), len(parts["down"])
        product = _tucker(parts["mid"], up.T, down) if "mid" in parts else up @ down
    elif "hada_w1_a" in parts:
        pairs = [(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")) for i in (1, 2)]
        one, two = (a.flatten(1) @ b.flatten(1) if t is None else _tucker(t, a, b) for a, b, t in pairs)
        product, rank = one * two, len(parts["hada_w1_b"])
    else:
        one, two = (_kronecker_factor(parts, f"lokr_w{i}", parts.get(f"lokr_t{i}")) for i in (1, 2))
        product = torch.kron(one.reshape(*one.shape, *(1 for _ in two.shape[2:])), two)
        rank = next((len(parts[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in parts), None)
    return product if rank is None or "alpha" not in parts else product * (parts["alpha"].reshape(()) / rank)


def _kronecker_factor(parts: Mapping[str, Tensor], name: str, core: Tensor | None) -> Tensor:
    if name in parts:
        return parts[name]
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return a @ b.flatten(1) if core is None else _tucker(core, a, b)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the product of a core (r, r, *kernel) with a, (r, outputs), and b, (r, inputs)."""
    return torch.einsum("ij...,ip,jr->pr...", core, a, b).contiguous()


def _normed(weight: Tensor, magnitude: Tensor, part: str) -> Tensor:
    """Return the weight with DoRA's norms: LyCORIS' dora_scale is (out, 1, ...) or (1, in, ...), PEFT's by output."""
    flat = weight.flatten(1)
    if magnitude.numel() == len(weight) and (part == "magnitude" or len(magnitude) == len(weight)):
        norm, shape = flat.norm(dim=1), (-1, *(1 for _ in weight.shape[1:]))
    else:
        norm, shape = weight.transpose(0, 1).flatten(1).norm(dim=1), (1, -1, *(1 for _ in weight.shape[2:]))
    return weight * (magnitude.flatten() / (norm + torch.finfo(weight.dtype).eps)).reshape(shape)


def _reshape(product: Tensor, weight: Tensor) -> Tensor:
    if len(product) != len(weight) or product.numel() != weight.numel():
        raise RuntimeError(f"they give {tuple(product.shape)}")
    return product.reshape(weight.shape)
