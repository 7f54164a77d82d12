"""Export a U-Net with the weight names of the original Stable Diffusion checkpoints, for ComfyUI and others."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from diffusers import (
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor

from rectified_diffusers.checks import require_pipeline, require_plain_weights
from rectified_diffusers.export.stock import fold_sign
from rectified_diffusers.files import write_atomically
from rectified_diffusers.loading.lora import refuse_lora
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler, require_straight

PREFIX = "model.diffusion_model."

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


def original_unet_layout(weights: Mapping[str, Tensor], layers_per_block: int) -> dict[str, Tensor]:
    """Return a U-Net's weights renamed from diffusers' names to the original ones; the tensors are shared.

    The original numbers its blocks consecutively, one for each feature map that a skip connection carries: `conv_in`
    is input block 0, and every resolution adds `layers_per_block` blocks and one for its downsampling. The output
    blocks mirror them, with the upsampling inside the last block of a resolution.

    Args:
        weights: `unet.state_dict()`, of the layout of Stable Diffusion 1.x or 2.x; other names are an error.
        layers_per_block: resnets per resolution in the down blocks, from the U-Net's config; the up blocks have one
            more.
    """
    attentive = {match[1] for name in weights if (match := _UP_ATTENTION.match(name))}
    return {PREFIX + _original(name, layers_per_block, attentive): tensor for name, tensor in weights.items()}


def _original(name: str, layers: int, attentive: set[str]) -> str:
    """Return the original name of one weight; `attentive` are the up blocks that have attention."""
    part, _, rest = name.rpartition(".")
    if part in _ENDS:
        return f"{_ENDS[part]}.{rest}"
    if match := _MIDDLE.fullmatch(name):
        resnets, layer, _, rest = match.groups()
        return f"middle_block.{2 * int(layer)}.{_in_resnet(name, rest)}" if resnets else f"middle_block.1.{rest}"
    if match := _BLOCK.fullmatch(name):
        way, block, kind, layer, rest = match.groups()
        first = int(block) * (layers + 1)
        place = f"input_blocks.{first + 1 + int(layer)}" if way == "down" else f"output_blocks.{first + int(layer)}"
        if kind == "resnets":
            return f"{place}.0.{_in_resnet(name, rest)}"
        if kind == "attentions":
            return f"{place}.1.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{first + 1 + layers}.0.{rest.replace('conv.', 'op.', 1)}"
        return f"output_blocks.{first + layers}.{2 if block in attentive else 1}.{rest}"
    raise _no_place(name)


def _in_resnet(name: str, rest: str) -> str:
    part, _, kind = rest.partition(".")
    if part not in _IN_RESNET:
        raise _no_place(name)
    return f"{_IN_RESNET[part]}.{kind}"


def _no_place(name: str) -> ValueError:
    return ValueError(
        f"Expected the U-Net of a Stable Diffusion 1.x or 2.x, got one with a weight {name!r}, which has no place in "
        "the original layout. Save it for diffusers instead, with export_diffusers or save_pretrained."
    )


UNetFormat = Literal["comfyui", "ldm"]


def export_unet(pipeline: Any, path: str | Path, unet_format: UNetFormat = "comfyui") -> None:
    """Save a pipeline's U-Net to one file, with the names of the original Stable Diffusion checkpoints.

    The names are those of `v1-5-pruned-emaonly.safetensors`, with the prefix `model.diffusion_model.`, and the values
    keep their dtype; `UNet2DConditionModel.from_single_file` reads the file back. There are two formats:

    - `comfyui` predicts noise - data, as flow models do there: the weight and bias of the last convolution are
      negated, which is exact. Its node ModelSamplingSD3 with shift 1 then takes the same steps as our scheduler.
    - `ldm` is the unchanged U-Net: it predicts data - noise, which other programs' samplers do not expect.

    Args:
        pipeline: with a UNet2DConditionModel of the layout of Stable Diffusion 1.x or 2.x. `comfyui` needs our
            scheduler, which defines the sign.
        path: a file that ends in .safetensors; it is replaced.
    """
    require_pipeline("export_unet", pipeline, "unet", "scheduler")
    path, unet = Path(path), pipeline.unet
    if unet_format not in get_args(UNetFormat):
        raise ValueError(f"unet_format must be one of {', '.join(get_args(UNetFormat))}, got {unet_format!r}.")
    if path.suffix != ".safetensors":
        raise ValueError(f"a U-Net is exported to one file, whose name ends in .safetensors; got {str(path)!r}.")
    if type(unet) is not UNet2DConditionModel:
        raise ValueError(f"the original layout is of a UNet2DConditionModel, and this is a {type(unet).__name__}.")
    refuse_lora(unet.state_dict(), "the pipeline's unet")
    require_plain_weights("export_unet", {"unet": unet})
    if unet_format == "comfyui":
        if not isinstance(pipeline.scheduler, RectifiedFlowEulerScheduler):
            raise ValueError(
                "the export for ComfyUI is of a rectified flow, with a RectifiedFlowEulerScheduler; got "
                f"{type(pipeline.scheduler).__name__}. The U-Net of a diffusion model needs no other sign: use 'ldm'."
            )
        require_straight(pipeline.scheduler, "export_unet for ComfyUI")
        if pipeline.scheduler.config["velocity_direction"] == "data":
            unet = fold_sign(unet)
    weights = original_unet_layout(unet.state_dict(), unet.config["layers_per_block"])
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))
