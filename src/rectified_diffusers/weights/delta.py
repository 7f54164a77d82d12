"""Weight deltas: compute, save, apply and undo the difference between a fine-tuned U-Net and its base.

InstaFlow's authors give their model the style of a fine-tune of Stable Diffusion. They add the weight difference dW =
U-Net(fine-tune) - U-Net(SD 1.5) and replace the VAE and the text encoder with those of the fine-tune (their scripts;
arXiv:2309.06380). PeRFlow (arXiv:2405.07510) is published as such differences.

Weights are read one tensor at a time, subtracted and added in float32 on the CPU, and then cast. Besides the U-Net,
memory holds a few copies of one tensor, and results are bit-identical everywhere.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, cast, get_args

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from rectified_diffusers.checks import require_one_of, require_plain_weights, require_type
from rectified_diffusers.loading.lora_checks import refuse_lora
from rectified_diffusers.loading.lora_file import part_of
from rectified_diffusers.weights.lycoris import open_lycoris
from rectified_diffusers.weights.weight_files import (
    StorageDtype,
    StoredWeights,
    WeightSource,
    check_same_shapes,
    open_weights,
    write_weights,
)

FORMAT_VERSION = 1
_LYCORIS = "lycoris"
_METADATA_KEY = "rectified_diffusers"  # one JSON text, as in triplet shards
_MODEL_COSINE = 0.5  # cosine of a U-Net and a file's tensors: about 0 for a difference, about 1 for a related model


@dataclass(frozen=True)
class WeightDelta:
    """A weight difference to apply. Its tensors stay in their file until they are read.

    Args:
        weights: the differences, under the names of the U-Net's weights, or the factors of a LyCORIS file.
        metadata: what `compute_weight_delta` recorded: kind, format_version, fine_tune, base and dtype. Empty for a
            plain file such as PeRFlow's; {"kind": "lycoris"} for a LyCORIS file.

    Example:
        ```python
        delta = load_weight_delta("loha.safetensors")
        print(delta.metadata)
        apply_weight_delta(pipeline, [delta, delta], [0.7, 0.3]).take_back()
        ```
    """

    weights: StoredWeights
    metadata: dict[str, Any]


AnyDelta = WeightDelta | WeightSource


def compute_weight_delta(
    fine_tune: WeightSource, base: WeightSource, output: str | Path, *, dtype: StorageDtype = "float32"
) -> WeightDelta:
    """Compute the difference fine_tune - base in float32, cast it to `dtype`, and save it as one safetensors file.

    Neither model is loaded: memory holds a few copies of one tensor. Equal inputs give equal files.

    Args:
        fine_tune: Hub id or folder of a pipeline or of its U-Net, a safetensors file, or a state dict.
        base: the model that `fine_tune` was made from, in the same forms; for most fine-tunes, Stable Diffusion 1.5.
        output: file to write, `*.safetensors`; written atomically, never partially.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"A delta is saved as *.safetensors, got {output.name!r}. Change the suffix.")
    require_one_of("dtype", dtype, get_args(StorageDtype))
    tuned, origin = open_weights(fine_tune), open_weights(base)
    check_same_shapes(tuned.shapes, origin.shapes, f"the fine-tune ({tuned.name})", f"the base ({origin.name})")
    stored = getattr(torch, dtype)

    def difference(name: str) -> Tensor:
        delta = (tuned.read(name).float() - origin.read(name).float()).to(stored)
        if not delta.isfinite().all():
            raise ValueError(
                f"The difference of {name!r} is not finite in {dtype}, got {tuned.name} and {origin.name}. Check the "
                "models, or use dtype='float32'."
            )
        return delta

    names = {"fine_tune": tuned.name, "base": origin.name}
    header = {"kind": "weight_delta", "format_version": FORMAT_VERSION, "dtype": dtype, **names}
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(header, sort_keys=True)}
    write_weights(output, dict(sorted(origin.shapes.items())), dtype, metadata, difference)
    return load_weight_delta(output)


def load_weight_delta(source: WeightSource, *, variant: str | None = None) -> WeightDelta:
    """Open a weight delta: a file from `compute_weight_delta`, a plain one such as PeRFlow's, or a LyCORIS file.

    Args:
        source: safetensors file, folder or Hub id of a U-Net whose weights are differences, or a dict of tensors.
            A LyCORIS file has layers of LoRA, LoCon, LoHa, LoKr, full differences or norms, with or without DoRA.
        variant: part of the file name in a folder or on the Hub; PeRFlow's are "v0-0" and "v0-1".
    """
    weights = open_weights(source, variant)
    text = weights.metadata.get(_METADATA_KEY)
    if text is None:
        foreign = sorted(weights.metadata.keys() - {"format"})
        # The alphas of a LoRA that diffusers wrote are in its metadata: only load_lora_weights reads those.
        if "lora_adapter_metadata" not in foreign and any(part_of(name) for name in weights.shapes):
            return WeightDelta(weights, {"kind": _LYCORIS})
        if foreign:
            raise ValueError(
                f"{weights.name} is no weight delta: expected our metadata or none, got {foreign[0]!r}. Load a LoRA "
                "with pipeline.load_lora_weights(); make a delta with compute_weight_delta(fine_tune, base, output)."
            )
        return WeightDelta(weights, {})
    header: dict[str, Any] = {}
    try:
        header = json.loads(text)
        found = header["kind"], header["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError):
        found = "something else", None
    if found != ("weight_delta", FORMAT_VERSION):
        raise ValueError(
            f"{weights.name}: expected a weight_delta of format version {FORMAT_VERSION}, got {found[0]} of version "
            f"{found[1]}. Upgrade rectified_diffusers, or make it with compute_weight_delta(fine_tune, base, output)."
        )
    return WeightDelta(weights, header)


@dataclass(frozen=True)
class _Term:
    """A delta at a scale: `names` has the weights that it changes, `difference` its values for one of them."""

    delta: WeightDelta
    scale: float
    names: Mapping[str, Any]
    difference: Callable[[str, Tensor], Tensor]


@dataclass(eq=False, repr=False)
class AppliedDelta:
    """Record of what `apply_weight_delta` did to a U-Net or a pipeline, used to undo it.

    Example:
        ```python
        applied = apply_weight_delta(pipeline, "loha.safetensors")
        image = pipeline("a red apple").images[0]
        applied.take_back()
        ```
    """

    _models: Mapping[str, nn.Module]
    _terms: Sequence[_Term]
    _undo: dict[str, Tensor] | None

    @torch.no_grad()
    def take_back(self) -> None:
        """Restore the previous weights, bit for bit, and free their copy.

        The weights must be exactly as the delta left them. Undo later changes (another delta, training, a change of
        dtype) first. The check adds the delta to the copy once more and compares.
        """
        if self._undo is None:
            raise ValueError(
                "The delta was taken back already, or applied with keep_undo=False. Load the model again."
            )
        weights = _weights_of(self._models, self._undo)
        for name, before in self._undo.items():
            now = weights[name].to("cpu")
            if now.dtype != before.dtype or not torch.equal(now, _sum(before, self._terms, name)):
                raise ValueError(
                    f"{name!r} changed after this delta was applied: expected its values in {before.dtype}, got "
                    f"others in {now.dtype}. Undo later changes first, in reverse order."
                )
        for name, before in self._undo.items():
            weights[name].copy_(before)
        self._undo = None


@torch.no_grad()
def apply_weight_delta(
    unet: nn.Module | DiffusionPipeline,
    delta: AnyDelta | Sequence[AnyDelta],
    scale: float | Sequence[float] = 1.0,
    *,
    keep_undo: bool = True,
) -> AppliedDelta:
    """Add scale * delta (for several deltas, the sum) to a model's weights in place, in float32, cast once at the end.

    Before any change, it checks that keys and shapes match and that the deltas and the results are finite.

    Args:
        unet: without a LoRA attached and not offloaded; it stays on its device and in its dtype. Give the pipeline
            instead for a LyCORIS file that has layers of the text encoders too.
        delta: what `load_weight_delta` returns or accepts, or a list of them.
        scale: one for all deltas, or one for each.
        keep_undo: keep a copy of the changed weights on the CPU for `take_back()`, which for a full delta needs as
            much memory as the U-Net. Without it, a delta costs a few copies of one tensor, and the only way to undo it
            is to load the model again.

    Example:
        ```python
        fine_tune, base = "Lykon/dreamshaper-7", "stable-diffusion-v1-5/stable-diffusion-v1-5"
        delta = compute_weight_delta(fine_tune, base, "delta.safetensors")
        applied = apply_weight_delta(pipeline.unet, delta, 0.7)
        image = pipeline("a red apple").images[0]
        applied.take_back()
        ```
    """
    models = _models_of(unet)
    opened = _scaled(delta, scale)
    _weights_of(models)  # refuses a LoRA, whose layers rename the weights
    terms = [_term(delta, scale, models) for delta, scale in opened]
    weights = _weights_of(models, {name: None for term in terms for name in term.names})
    _check_values(weights, terms)
    undo: dict[str, Tensor] | None = {} if keep_undo else None
    for name, weight in weights.items():
        if undo is not None:
            undo[name] = weight.to("cpu", copy=True)
        weight.copy_(_sum(weight, terms, name))
    return AppliedDelta(models, terms, undo)


def _models_of(target: Any) -> dict[str, nn.Module]:
    """Return the U-Net, and for a pipeline its text encoders, by component."""
    if isinstance(target, DiffusionPipeline):
        components = target.components
        names = ("unet", "text_encoder", "text_encoder_2")
        return {name: components[name] for name in names if isinstance(components.get(name), nn.Module)}
    require_type("unet", target, nn.Module, "Give the model itself: pipeline.unet.")
    return {"unet": target}


def _term(delta: WeightDelta, scale: float, models: Mapping[str, nn.Module]) -> _Term:
    """Find what a delta changes in the models; a delta of complete weights must have all those of the U-Net."""
    if delta.metadata.get("kind") == _LYCORIS:
        return _Term(delta, scale, *open_lycoris(delta.weights, models))
    unet = models["unet"]
    shapes = {name: tuple(weight.shape) for name, weight in unet.state_dict().items()}
    check_same_shapes(delta.weights.shapes, shapes, f"the delta ({delta.weights.name})", type(unet).__name__)
    return _Term(delta, scale, shapes, lambda name, weight: delta.weights.read(name).to(weight.dtype))


def _scaled(delta: AnyDelta | Sequence[AnyDelta], scale: float | Sequence[float]) -> list[tuple[WeightDelta, float]]:
    many = (str, Path, Mapping, WeightDelta, Sequence)
    require_type("delta", delta, many, "Give what load_weight_delta gives or takes, or a list of them.")
    for value in scale if isinstance(scale, Sequence) else [scale]:
        require_type("scale", value, Real, "It is a number for all deltas, or a list of one for each.")
    single = isinstance(delta, (str, Path, Mapping, WeightDelta))
    deltas = [cast(AnyDelta, delta)] if single else list(cast("Sequence[AnyDelta]", delta))
    scales = [float(value) for value in scale] if isinstance(scale, Sequence) else [float(scale)] * len(deltas)
    if not deltas or len(scales) != len(deltas):
        counts = f"{len(deltas)} deltas and {len(scales)} scales"
        raise ValueError(f"Expected at least one delta, and one scale for all or one for each, got {counts}.")
    for value in scales:
        if not math.isfinite(value):
            raise ValueError(f"The scale of a delta must be finite, got {value}; 1 is the full difference.")
    opened = [item if isinstance(item, WeightDelta) else load_weight_delta(item) for item in deltas]
    return list(zip(opened, scales, strict=True))


def _weights_of(models: Mapping[str, nn.Module], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return weights themselves, not copies: those of these names, or all of the U-Net.

    A LoRA is refused, because it renames weights, and so are weights that are not in memory or not in floating point.
    """
    weights: dict[str, Tensor] = {}
    for component, model in models.items():
        prefix = "" if component == "unet" else f"{component}."
        if not prefix or any(name.startswith(prefix) for name in names or ()):
            require_plain_weights("a weight delta", {type(model).__name__: model})
            own = model.state_dict(prefix=prefix)
            refuse_lora(own, type(model).__name__)
            weights |= own
    wanted = weights if names is None else names
    for name in wanted:
        weight = weights[name]
        if weight.is_meta or not weight.is_floating_point():
            raise ValueError(
                f"Expected weights in memory and in floating point, got {name!r} on {weight.device} in "
                f"{weight.dtype}. Apply deltas before offloading or quantizing the model."
            )
    return {name: weights[name] for name in wanted}


def _sum(weight: Tensor, terms: Sequence[_Term], name: str) -> Tensor:
    """Return weight + sum of scale * delta, in the weight's dtype, on the CPU."""
    total = before = weight.to("cpu", torch.promote_types(weight.dtype, torch.float32))
    for term in terms:
        if name in term.names:
            total = (term.difference(name, before) * term.scale).add_(total)
    return total.to(weight.dtype)


def _check_values(weights: Mapping[str, Tensor], terms: Sequence[_Term]) -> None:
    for term in terms:
        # A file without metadata may hold a complete model, which would silently be added to the other one.
        inner = mine = theirs = 0.0
        whose = term.delta.weights.name
        for name in term.names:
            weight = weights[name].to("cpu", torch.float32)
            values = term.difference(name, weight).float()
            if not values.isfinite().all():
                raise ValueError(
                    f"The delta {whose} holds NaN or infinity in {name!r}, expected finite numbers. Download it "
                    "again, or make it with compute_weight_delta(fine_tune, base, output)."
                )
            if not term.delta.metadata:
                flat, other = weight.flatten(), values.flatten()
                inner += float(flat @ other)
                mine += float(flat @ flat)
                theirs += float(other @ other)
        if inner > _MODEL_COSINE * math.sqrt(mine * theirs) > 0:
            raise ValueError(
                f"{whose} holds the weights of a model, expected a difference of two: their cosine with the model's "
                f"is {inner / math.sqrt(mine * theirs):.2f}. Use compute_weight_delta(fine_tune, base, output)."
            )
    for name, weight in weights.items():
        if not _sum(weight, terms, name).isfinite().all():
            raise ValueError(
                f"{name!r} would not be finite in {weight.dtype}. Use a smaller scale, or a model in float32."
            )
