"""Change dtype and memory layout of a model's weights, in place, and restore the original tensors afterwards."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rectified_diffusers.speed.cpu import SWITCHES, cpu_kind
from rectified_diffusers.speed.patching import replaced


def fast_dtype(device: torch.device, wide_range: bool = False) -> torch.dtype:
    """Return the 16-bit dtype in which a device multiplies faster than in float32; float32 if there is none.

    Args:
        device: that the models are on.
        wide_range: prefer bfloat16 to float16, which is more exact but ends at 65,504. SDXL's VAE exceeds that.
    """
    if device.type == "cuda":
        return torch.bfloat16 if wide_range and torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.float16
    return SWITCHES[cpu_kind()]["dtype"] if device.type == "cpu" else torch.float32


@contextmanager
def converted(model: nn.Module, dtype: torch.dtype | None = None, channels_last: bool = False) -> Iterator[None]:
    """Convert a model's floating-point weights to `dtype`; with `channels_last`, also the layout of convolutions.

    A dtype of None keeps each dtype. The parameter objects stay the same, so that anything that references them (a
    LoRA, a device move) keeps working. Their tensors are exchanged; the original ones, kept here, are restored bit for
    bit.
    """
    kept_wide = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    stored: list[tuple[nn.Parameter, Tensor]] = []
    buffers: list[tuple[nn.Module, str, Tensor]] = []

    def convert(name: str, tensor: Tensor) -> Tensor:
        keep = not tensor.is_floating_point() or any(part in name.split(".") for part in kept_wide)
        layout = torch.channels_last if channels_last and tensor.ndim == 4 else torch.preserve_format
        return tensor.to(dtype=tensor.dtype if keep or dtype is None else dtype, memory_format=layout)

    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            changed = convert(f"{prefix}.{name}", parameter.data)
            if changed is not parameter.data and changed.data_ptr() != parameter.data_ptr():
                stored.append((parameter, parameter.data))
                parameter.data = changed
        for name, buffer in module.named_buffers(recurse=False):
            changed = convert(f"{prefix}.{name}", buffer)
            if changed is not buffer:
                buffers.append((module, name, buffer))
                module._buffers[name] = changed
    try:
        yield
    finally:  # on the model's current device, which may have changed
        for parameter, tensor in reversed(stored):
            parameter.data = tensor.to(parameter.device)
        for module, name, tensor in reversed(buffers):
            now = module._buffers[name]
            module._buffers[name] = tensor if now is None else tensor.to(now.device)


@contextmanager
def latents_in_float32(pipeline: Any) -> Iterator[None]:
    """Keep the latents of a 16-bit pipeline in float32 from the noise to the decoder; round only the models' inputs.

    Otherwise x_t itself, and with it the sum x_t + dt * v, would be rounded to the 8 bits of bfloat16.
    """
    with ExitStack() as stack:
        for name in ("unet", "controlnet", "adapter"):
            model = getattr(pipeline, name, None)
            for part in getattr(model, "nets", [model]):  # several ControlNets are one model
                if isinstance(part, nn.Module):
                    hook = part.register_forward_pre_hook(_round_sample, with_kwargs=True)
                    stack.callback(hook.remove)
        for name in ("encode", "decode"):
            method = getattr(pipeline.vae, name)
            stack.enter_context(replaced(pipeline.vae, name, _rounding(pipeline.vae, method)))
        prepare = pipeline.prepare_latents

        def prepare_in_float32(*args: Any, **kwargs: Any) -> Any:
            args = tuple(_widened(value) for value in args)
            return prepare(*args, **{name: _widened(value) for name, value in kwargs.items()})

        stack.enter_context(replaced(pipeline, "prepare_latents", prepare_in_float32))
        yield


def _widened(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) else value


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _round_sample(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Round the sample, but not the timestep, which may have more digits than 16 bits hold."""
    if args:
        return (args[0].to(_dtype_of(model)), *args[1:]), kwargs
    return args, {**kwargs, "sample": kwargs["sample"].to(_dtype_of(model))}


def _rounding(vae: nn.Module, method: Any) -> Any:
    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return method(tensor.to(_dtype_of(vae)), *args, **kwargs)

    return call
