"""Conversion of a `DiffusionVelocityUNet` at the noise end to a plain U-Net, so that its distillation is plain too."""

import math
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.models.velocity_unet import DiffusionVelocityUNet
from rectified_diffusers.pipelines.scheduler import time_to_timestep


@torch.no_grad()
def plain_unet(unet: DiffusionVelocityUNet) -> UNet2DConditionModel:
    """Return a plain U-Net whose velocity at t = 0 is close to that of `unet`: the initialization of a distillation.

    At t = 0 that velocity is a * prediction + b * x, with constants of the schedule. The weights of the last
    convolution absorb a. A U-Net has no path for x around its layers, so some channels of the last block are reserved
    for it: the groups of `conv_norm_out` that contribute least to `conv_out`. `conv_shortcut` recovers x from the
    output of `conv_in` and writes it as x and -x, and silu(z) - silu(-z) = z carries it through the activation.
    Training must correct the remaining differences: the lost content of those channels, and that a norm divides x by
    its own root mean square instead of 1.

    Args:
        unet: of a diffusion model that predicts v or the sample, or of a flow that was trained from one.

    Returns:
        a new network of the same layout, dtype and device. At other times than t = 0 its velocity is wrong.

    Raises:
        TypeError: for another class of U-Net.
        ValueError: if it predicts epsilon, because the velocity is then a small difference of epsilon and x; or if its
            last block is not built like Stable Diffusion's, or its first layer is too narrow to recover x.
    """
    if type(unet) is not DiffusionVelocityUNet:
        raise UnsupportedPipelineError(
            f"Expected a DiffusionVelocityUNet, got {type(unet).__name__}. A UNet2DConditionModel is plain already."
        )
    if unet.as_flow.prediction_type == "epsilon":
        raise ValueError(
            "A U-Net that predicts epsilon cannot be made plain: its velocity at the noise end is a small difference "
            "of two large terms. Use a teacher that predicts v."
        )
    config = {name: value for name, value in unet.config.items() if name != "diffusion_schedule"}
    made: Any = UNet2DConditionModel.from_config(config)
    made.load_state_dict({name: weight.clone() for name, weight in unet.state_dict().items()}, assign=True)
    of_prediction, of_x, timestep = _at_the_noise_end(unet)
    for parameter in made.conv_out.parameters():
        parameter.mul_(of_prediction)
    _shift_time(made, time_to_timestep(0.0) - timestep)
    _lead_past(made, of_x)
    return made.train(unet.training)


def _at_the_noise_end(unet: DiffusionVelocityUNet) -> tuple[float, float, float]:
    """Return a and b of velocity = a * prediction + b * x at t = 0, and the diffusion's timestep there."""
    as_flow, zero, one = unet.as_flow, torch.zeros(1, 1), torch.ones(1, 1)
    of_prediction, of_x = as_flow.velocity(one, zero, zero[0]), as_flow.velocity(zero, one, zero[0])
    return of_prediction.item(), of_x.item(), as_flow.timestep_of(zero[0]).item()


def _shift_time(unet: Any, shift: float) -> None:
    """Shift the time that the U-Net sees down by `shift`: a rotation of the sines in its first layer's input."""
    weight, order = unet.time_embedding.linear_1.weight, -1 if unet.config["flip_sin_to_cos"] else 1
    sin, cos = unet.time_proj(torch.tensor([shift], device=weight.device))[0].to(weight).chunk(2)[::order]
    of_sin, of_cos = weight.chunk(2, dim=1)[::order]
    turned = of_sin * cos + of_cos * sin, of_cos * cos - of_sin * sin
    weight.copy_(torch.cat(turned[::order], dim=1))


def _lead_past(unet: Any, factor: float) -> None:
    """Add factor * x, for a standard normal x, to the output of the U-Net, using channels of its last block."""
    block, norm, latents = unet.up_blocks[-1], unet.conv_norm_out, unet.config["in_channels"]
    last = block.resnets[-1]
    if norm is None or not isinstance(unet.conv_act, nn.SiLU) or last.conv_shortcut is None:
        raise ValueError(
            "Expected a U-Net that ends as Stable Diffusion's, with a shortcut, GroupNorm and SiLU, got "
            f"{type(last.conv_shortcut).__name__}, {type(norm).__name__} and {type(unet.conv_act).__name__}."
        )
    channels, pairs = _freed(unet, latents)
    find, offset = _found_again(unet.conv_in)
    attention = list(getattr(block, "attentions", []))[-1:]  # what follows the last layer, if anything
    for layer in (last.conv2, last.conv_shortcut, *(one.proj_out for one in attention)):
        layer.weight[channels] = 0
        layer.bias[channels] = 0
    for one in attention:
        one.proj_in.weight[:, channels] = 0
    unet.conv_out.weight[:, channels] = 0
    center, width = unet.conv_out.kernel_size[0] // 2, find.shape[1]
    for sign, of_latents in zip((1, -1), pairs.T, strict=True):
        scale = sign * last.output_scale_factor
        last.conv_shortcut.weight[of_latents, -width:, 0, 0] = scale * find  # its input ends with conv_in's output
        last.conv_shortcut.bias[of_latents] = scale * offset
        unet.conv_out.weight[range(latents), of_latents, center, center] = sign * factor
    size = norm.num_channels // norm.num_groups
    filled = torch.isin(channels, pairs.flatten()).reshape(-1, size).float().mean(1)  # the mean square of a group
    norm.weight[channels] = filled.sqrt().repeat_interleave(size).to(norm.weight)
    norm.bias[channels] = 0


def _freed(unet: Any, count: int) -> tuple[Tensor, Tensor]:
    """Return the channels of the least important groups, and pairs `(count, 2)` of them, each within one group."""
    norm = unet.conv_norm_out
    size = norm.num_channels // norm.num_groups
    groups = math.ceil(count / (size // 2)) if size > 1 else norm.num_channels
    if groups > norm.num_groups // 2:
        raise ValueError(
            f"x needs {2 * count} channels of the last block, in complete groups, and at most half of them; got "
            f"{norm.num_channels} channels in {norm.num_groups} groups."
        )
    matters = (norm.weight.abs() * unet.conv_out.weight.abs().sum((0, 2, 3))).view(norm.num_groups, size).sum(1)
    channels = matters.argsort()[:groups].sort().values.cpu()[:, None] * size + torch.arange(size)
    return channels.flatten(), channels[:, : size // 2 * 2].reshape(-1, 2)[:count]


def _found_again(conv_in: Any) -> tuple[Tensor, Tensor]:
    """Return weights `(C, channels)` and offsets `(C,)` that recover x from the output of the first convolution."""
    seen = conv_in.weight.double().flatten(1)  # each channel is a sum of a window's values
    if torch.linalg.matrix_rank(seen) < seen.shape[1]:
        raise ValueError(f"Expected at least {seen.shape[1]} independent channels of conv_in, got {len(seen)}.")
    center = conv_in.kernel_size[0] // 2
    find = torch.linalg.pinv(seen).view(conv_in.in_channels, *conv_in.kernel_size, -1)[:, center, center]
    return find.to(conv_in.weight), -(find @ conv_in.bias.double()).to(conv_in.weight)
