"""Weights of the tiny pipelines under the names of CompVis' Stable Diffusion, for tests of `from_single_file`."""

from typing import Any

from torch import Tensor

# Names inside a block: diffusers' to the left, the original ones to the right.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ENDS = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_layout(pipeline: Any) -> dict[str, Tensor]:
    """Return a pipeline's weights as they lie in one file such as `v1-5-pruned-emaonly.safetensors`."""
    layers = pipeline.unet.config.layers_per_block
    weights = {}
    for name, tensor in pipeline.unet.state_dict().items():
        weights[f"model.diffusion_model.{unet_name(name, layers)}"] = tensor
    blocks = len(pipeline.vae.config.block_out_channels)
    for name, tensor in pipeline.vae.state_dict().items():
        is_convolution = "attentions" in name and tensor.ndim == 2  # of one pixel, where diffusers has a matrix
        weights[f"first_stage_model.{vae_name(name, blocks)}"] = tensor[..., None, None] if is_convolution else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():  # the prefix came and went with transformers 5
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in weights.items()}


def unet_name(name: str, layers: int) -> str:
    """Name a U-Net's weight: blocks are numbered through, one for each feature map that a skip connection carries."""
    if not name.startswith(("down_blocks.", "mid_block.", "up_blocks.")):
        return _rename(name, UNET_ENDS)
    if name.startswith("mid_block."):
        _, part, i, tail = name.split(".", 3)
        return f"middle_block.{2 * int(i)}.{_rename(tail, RESNET)}" if part == "resnets" else f"middle_block.1.{tail}"
    side, block, part, i, tail = name.split(".", 4)
    first = int(block) * (layers + 1)
    if part == "downsamplers":
        return f"input_blocks.{1 + first + layers}.0.{tail.replace('conv', 'op')}"
    if part == "upsamplers":  # behind resnet and attention: of the tiny U-Nets only the block with attention has one
        return f"output_blocks.{first + layers}.2.{tail}"
    tail = f"0.{_rename(tail, RESNET)}" if part == "resnets" else f"1.{tail}"
    return (
        f"input_blocks.{1 + first + int(i)}.{tail}"
        if side == "down_blocks"
        else f"output_blocks.{first + int(i)}.{tail}"
    )


def vae_name(name: str, blocks: int) -> str:
    """Name a VAE's weight: the decoder's blocks are numbered from the finest one on."""
    name = _rename(name, VAE_ENDS)
    for i in range(blocks):
        name = name.replace(f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample.")
        name = name.replace(f"down_blocks.{i}.resnets.", f"down.{i}.block.")
        name = name.replace(f"up_blocks.{i}.upsamplers.0.", f"up.{blocks - 1 - i}.upsample.")
        name = name.replace(f"up_blocks.{i}.resnets.", f"up.{blocks - 1 - i}.block.")
    for i in range(2):
        name = name.replace(f"mid_block.resnets.{i}.", f"mid.block_{i + 1}.")
    if "mid_block.attentions.0." in name:
        name = _rename(name.replace("mid_block.attentions.0.", "mid.attn_1."), VAE_ATTENTION)
    return name


def _rename(name: str, parts: dict[str, str]) -> str:
    """Replace the first of `parts` that is a whole part of a dotted name."""
    for new, old in parts.items():
        if f".{new}." in f".{name}":
            return f".{name}".replace(f".{new}.", f".{old}.", 1)[1:]
    return name
