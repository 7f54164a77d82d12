"""The format of LoRA and LyCORIS files: which layers a file changes, in any spelling of their names.

The layers are found in the models themselves. `mixin.py` opens the files, `lora_attach.py` reads alphas and settings.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rectified_diffusers.loading.original_names import original_names

# What a tensor is to its layer. LyCORIS' own names are kept; LoRA's spellings become down, up, mid and magnitude.
_PART = re.compile(
    r"(?P<layer>.+?)(?:"
    r"[._]lora(?:_linear_layer)?[._](?P<factor>A|B|down|up|mid)(?:\.\w+)?\.(?P<kind>weight|bias)"
    r"|[._]lora_(?P<magnitude>magnitude_vector)(?:\.\w+)*"
    r"|\.(?P<own>alpha|dora_scale|diff|diff_b|w_norm|b_norm|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))"
    r")"
)
_FACTORS = {"A": "down", "B": "up"}
LORA_PARTS = {"down", "up", "up_bias", "mid", "alpha", "dora_scale", "magnitude"}

_PREFIXES = {
    "lora_unet": "unet",
    "lora_te2": "text_encoder_2",
    "lora_te1": "text_encoder",
    "lora_te": "text_encoder",
    "lycoris": "unet",
    "unet": "unet",
    "text_encoder_2": "text_encoder_2",
    "text_encoder": "text_encoder",
    "model_diffusion_model": "unet",
    "diffusion_model": "unet",
}
_SECOND = "second."  # half of a StackedUNet


@dataclass(frozen=True)
class FileLayer:
    """One layer of a file: `parts` are the names in the file of its down, up, alpha, hada_w1_a and so on."""

    component: str
    name: str
    parts: dict[str, str]


def part_of(name: str) -> tuple[str, str] | None:
    """Return the layer of a tensor, as the file spells it, and what the tensor is to it, or None."""
    found = _PART.fullmatch(name)
    if found is None:
        return None
    factor = found["factor"]
    if factor is None:
        return found["layer"], found["own"] or "magnitude"
    part = _FACTORS.get(factor, factor)
    return found["layer"], part if found["kind"] == "weight" else f"{part}_bias"


def is_lycoris(names: Any) -> bool:
    """Return whether a file has LoHa, LoKr, full-difference or norm layers, which are merged, not attached."""
    parts = [part_of(name) for name in names]
    return any(part is not None and part[1] not in LORA_PARTS for part in parts)


def file_layers(names: Any, models: Mapping[str, nn.Module], whose: str = "LoRA") -> list[FileLayer]:
    """Return the layers of a file, each with the name that it has in the model.

    Args:
        names: of all tensors of the file.
        models: by component: unet, text_encoder, text_encoder_2.
        whose: what the file is, for errors.

    Raises:
        ValueError: a tensor is unknown, or is for a layer or a component that is not among the models.
    """
    spellings = {component: _spellings(model, component) for component, model in models.items()}
    layers: dict[tuple[str, str], dict[str, str]] = {}
    unknown: list[str] = []
    for name in names:
        found = part_of(name)
        if found is None:
            raise ValueError(
                f"The {whose} holds an unexpected tensor {name!r}, expected those of LoRA, LoHa, LoKr, "
                "full-difference or norm layers."
            )
        spelled, part = found
        component, layer = _split(spelled, spellings)
        if component is None:
            unknown.append(name)
            continue
        if component not in models:
            raise ValueError(
                f"The {whose} has layers of the {component}, first {name!r}, expected only those of the "
                f"{' and '.join(models)}. Give a pipeline that has it."
            )
        if layer not in spellings[component]:
            raise ValueError(
                f"The {whose} is for a layer {layer!r} of the {component}, which {type(models[component]).__name__} "
                "does not have. It was made for another architecture: load it into a pipeline of that one."
            )
        parts = layers.setdefault((component, spellings[component][layer]), {})
        if part in parts:
            raise ValueError(f"{parts[part]!r} and {name!r} are the same part of one layer, expected one of them.")
        parts[part] = name
    if unknown and unknown[0].startswith("base_model."):
        raise ValueError(
            f"{unknown[0]!r} is of a file by PEFT, whose alpha is in adapter_config.json. Save it with "
            "pipeline.save_lora_weights(folder, get_peft_model_state_dict(unet), unet_lora_adapter_metadata="
            "unet.peft_config['default'].to_dict())."
        )
    if unknown:
        which = "none of its layers" if not layers else f"the layer of {unknown[0]!r}"
        raise ValueError(f"{which} is in this model; it was made for another architecture")
    return [FileLayer(component, name, parts) for (component, name), parts in layers.items()]


def layer_in(model: nn.Module, name: str) -> Any:
    """Return a model's layer; conv_out of a StackedUNet is in its second half."""
    modules = dict(model.named_modules())
    return modules.get(name, modules.get(_SECOND + name))


def both_halves(model: nn.Module, layers: list[FileLayer]) -> list[FileLayer]:
    """Return the layers of a StackedUNet by their own names: those of a plain U-Net's file are in both halves."""
    modules = dict(model.named_modules())
    if "second" not in modules or any(layer.name.startswith(_SECOND) for layer in layers):
        return layers
    names = [(layer, start + layer.name) for layer in layers for start in ("", _SECOND)]
    return [FileLayer(layer.component, name, layer.parts) for layer, name in names if name in modules]


def _split(spelled: str, spellings: Mapping[str, Mapping[str, str]]) -> tuple[str | None, str]:
    """Return the component of a layer and its name with underscores; without a prefix, it is of the U-Net."""
    plain = spelled.replace(".processor", "").replace(".", "_")
    for prefix, component in _PREFIXES.items():
        if plain.startswith(f"{prefix}_"):
            return component, plain.removeprefix(f"{prefix}_")
    return ("unet" if plain in spellings.get("unet", {}) else None), plain


def _spellings(model: nn.Module, component: str) -> dict[str, str]:
    """Return the name in the model of each layer with a weight, by every spelling, with underscores for points."""
    weighted = [name for name, module in model.named_modules() if isinstance(getattr(module, "weight", None), Tensor)]
    layers = [name for name in weighted if ".lora_" not in name and not name.endswith(".base_layer")]
    spelled = {name: name for name in layers}
    if component == "unet":
        for name in [name for name in layers if name.startswith(_SECOND)]:
            spelled.setdefault(name.removeprefix(_SECOND), name.removeprefix(_SECOND))
        spelled |= {name.removesuffix(".0"): name for name in layers if name.endswith(".to_out.0")}
        spelled |= _original_spellings(model, list(spelled.values()))
    else:  # with or without text_model., which transformers 5 does not have; and as old attention processors
        short = {name: name.removeprefix("text_model.") for name in layers}
        spelled |= {other: name for name, base in short.items() for other in (base, f"text_model.{base}")}
        spelled |= {
            re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", other): name for other, name in spelled.items()
        }
    return {other.replace(".", "_"): name for other, name in spelled.items()}


def _original_spellings(unet: Any, layers: list[str]) -> dict[str, str]:
    """Return the layers of a U-Net by their names in the original checkpoints, as the trainers of SDXL write them."""
    per_block = getattr(unet, "config", {}).get("layers_per_block")
    if not isinstance(per_block, int):
        return {}
    weights = {f"{name}.weight": name for name in layers if not name.startswith(_SECOND)}
    originals = {weights[weight]: original for weight, original in original_names(weights, per_block).items()}
    for name, original in (("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2")):
        if name in originals:
            originals[name] = f"{original}.weight"
    return {original.removesuffix(".weight"): name for name, original in originals.items() if original}
