"""Names of a U-Net's layers in the original Stable Diffusion checkpoints, which other programs and their LoRAs use."""

import re
from collections.abc import Iterable

# diffusers' names of the parts, and those of CompVis' latent-diffusion.
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(?:(resnets)\.([01])|(attentions)\.0)\.(.+)")
_UP_ATTENTION = re.compile(r"up_blocks\.(\d+)\.attentions\.")


def original_names(names: Iterable[str], layers_per_block: int) -> dict[str, str | None]:
    """Return the original name of each weight of a U-Net, None for one that has no place in the original layout.

    Args:
        names: of all weights of a UNet2DConditionModel of the layout of Stable Diffusion 1.x or 2.x.
        layers_per_block: resnets per resolution in the down blocks, from the U-Net's config.
    """
    names = list(names)
    attentive = {match[1] for name in names if (match := _UP_ATTENTION.match(name))}
    return {name: _original(name, layers_per_block, attentive) for name in names}


def _original(name: str, layers: int, attentive: set[str]) -> str | None:
    """Return the original name of one weight; `attentive` are the up blocks that have attention."""
    part, _, rest = name.rpartition(".")
    if part in _ENDS:
        return f"{_ENDS[part]}.{rest}"
    if match := _MIDDLE.fullmatch(name):
        resnets, layer, _, rest = match.groups()
        return _in_resnet(f"middle_block.{2 * int(layer)}", rest) if resnets else f"middle_block.1.{rest}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    way, block, kind, layer, rest = match.groups()
    first = int(block) * (layers + 1)
    place = f"input_blocks.{first + 1 + int(layer)}" if way == "down" else f"output_blocks.{first + int(layer)}"
    if kind == "resnets":
        return _in_resnet(f"{place}.0", rest)
    if kind == "attentions":
        return f"{place}.1.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{first + 1 + layers}.0.{rest.replace('conv.', 'op.', 1)}"
    return f"output_blocks.{first + layers}.{2 if block in attentive else 1}.{rest}"


def _in_resnet(place: str, rest: str) -> str | None:
    part, _, kind = rest.partition(".")
    return f"{place}.{_IN_RESNET[part]}.{kind}" if part in _IN_RESNET else None
