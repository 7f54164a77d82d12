"""The switches that pay on each kind of CPU, and `tune`, which measures them on this CPU.

The table depends on the CPU's instructions alone, so that "auto" generates the same image at any load of the machine.
`python benchmarks/cpu_switches.py` measures a row of it.
"""

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rectified_diffusers.checks import require_count, require_pipeline
from rectified_diffusers.speed.attention import attention
from rectified_diffusers.speed.packing import packed_weights
from rectified_diffusers.speed.upsampling import folded_upsampling

CpuKind = Literal["amx", "avx512_bf16", "other"]

SWITCHES: dict[CpuKind, dict[str, Any]] = {
    "amx": {
        "dtype": torch.bfloat16,
        "channels_last": True,
        "blockwise_attention": False,
        "fold_upsampling": True,
        "pack_weights": False,
    },
    "avx512_bf16": {
        "dtype": torch.bfloat16,
        "channels_last": True,
        "blockwise_attention": True,
        "fold_upsampling": True,
        "pack_weights": True,
    },
    "other": {
        "dtype": torch.float32,
        "channels_last": True,
        "blockwise_attention": False,
        "fold_upsampling": True,
        "pack_weights": False,
    },
}
"""By kind of CPU. AVX-512 without its bfloat16 instructions computes bfloat16 by conversion, no faster."""

_TRIES = 3
# The most of what is timed; beyond it, the time per product hardly changes.
_SIDE, _CHANNELS, _TOKENS = 64, 320, 1024


def cpu_kind() -> CpuKind:
    """Return the kind of this CPU by the instructions that PyTorch uses for bfloat16."""
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return "amx"
    return "avx512_bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "other"


def tune(pipeline: DiffusionPipeline, *, height: int | None = None, width: int | None = None) -> dict[str, Any]:
    """Measure on this CPU which switches of `optimize` pay for a pipeline, and return them as its arguments.

    Times the largest attention, convolution, upsampling and linear layer of the U-Net with and without each switch, in
    about a second. Close results depend on the load of the machine, and with them the last bits of an image.

    Args:
        pipeline: with a U-Net, on the CPU.
        height, width: of the images in pixels; default: the pipeline's own.

    Returns:
        `dtype`, `channels_last`, `blockwise_attention`, `fold_upsampling` and `pack_weights`.

    Example:
        ```python
        chosen = tune(pipeline)
        print(chosen)
        fast = optimize(pipeline, **chosen)
        ```
    """
    require_pipeline("tune", pipeline, "unet", "vae")
    pipe: Any = pipeline
    if pipe.unet.device.type != "cpu":
        raise ValueError(f"tune measures CPUs, got a pipeline on {pipe.unet.device}. Call optimize with its defaults.")
    factor = pipe.vae_scale_factor
    sides: list[int] = []
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None:
            require_count(name, pixels)
            if pixels % factor:
                raise ValueError(f"{name} must be a multiple of {factor} for this VAE, got {pixels}.")
        sides.append(pipe.unet.config["sample_size"] if pixels is None else pixels // factor)
    layers = _LargestLayers()
    with torch.no_grad(), layers:
        _call_on_meta(pipe.unet, sides)
    with torch.inference_mode():
        convolution = {
            (dtype, layout): _seconds(_convolution(layers.convolution, dtype, layout))
            for dtype in (torch.float32, torch.bfloat16)
            for layout in (torch.contiguous_format, torch.channels_last)
        }
        dtype, layout = min(convolution, key=lambda way: convolution[way])
        queries, keys = (torch.randn(shape).to(dtype) for shape in layers.attention)
        plain = _seconds(lambda: F.scaled_dot_product_attention(queries, keys, keys))
        blockwise = _seconds(lambda: attention(queries, keys, keys)) if dtype == torch.bfloat16 else math.inf
        upsample: Any = Upsample2D(layers.upsampling[1], use_conv=True)
        upsample.to(dtype=dtype, memory_format=layout)
        features = torch.randn(layers.upsampling).to(dtype=dtype, memory_format=layout)
        inputs, (outputs, width) = layers.linear
        linear = nn.Linear(width, outputs, dtype=dtype)
        return {
            "dtype": dtype,
            "channels_last": layout == torch.channels_last,
            "blockwise_attention": blockwise < plain,
            "fold_upsampling": _pays(folded_upsampling, upsample, features),
            "pack_weights": dtype == torch.bfloat16 and _pays(packed_weights, linear, torch.randn(inputs).to(dtype)),
        }


class _LargestLayers(TorchFunctionMode):
    """Record the shapes of the largest attention, 3x3 convolution, upsampling and linear layer of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = ((1, 1, 1, 1), (1, 1, 1, 1))
        self.convolution = ((1, 1, 1, 1), (1, 1, 3, 3))
        self.upsampling = (1, 1, 1, 1)
        self.linear = ((1, 1), (1, 1))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = (tuple(each.shape) for each in args[:2])
            if query[2] * key[2] > self.attention[0][2] * self.attention[1][2]:
                heads = min(query[1], torch.get_num_threads())  # one for each thread
                self.attention = (1, heads, *query[2:]), (1, heads, *key[2:])
        elif func is F.conv2d and args[1].shape[-1] == 3:
            features, weight = _cropped(args[0].shape), (*(min(each, _CHANNELS) for each in args[1].shape[:2]), 3, 3)
            if _products(features, weight) > _products(*self.convolution):
                self.convolution = features, weight
        elif func is F.interpolate:
            self.upsampling = max(self.upsampling, _cropped(args[0].shape), key=math.prod)
        elif func is F.linear:
            tokens = min(args[0].shape[:-1].numel(), _TOKENS)
            layer = (tokens, args[0].shape[-1]), tuple(args[1].shape)
            self.linear = max(self.linear, layer, key=lambda each: each[0][0] * math.prod(each[1]))
        return func(*args, **(kwargs or {}))


def _cropped(shape: Any) -> tuple[int, int, int, int]:
    """Return the shape of a part of feature maps `(B, C, H, W)`."""
    return 1, min(shape[1], _CHANNELS), min(shape[2], _SIDE), min(shape[3], _SIDE)


def _products(features: tuple[int, ...], weight: tuple[int, ...]) -> int:
    return math.prod(features[2:]) * math.prod(weight)


def _call_on_meta(unet: Any, sides: list[int]) -> None:
    """Call a network of a U-Net's architecture on the meta device, which computes shapes only."""
    config = unet.config
    with torch.device("meta"):
        network = type(unet).from_config(config)
        noise, text = torch.empty(1, config["in_channels"], *sides), torch.empty(1, 77, config["cross_attention_dim"])
        added = None
        if config["addition_embed_type"] == "text_time":  # SDXL
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        network(noise, torch.tensor(1000.0), text, added_cond_kwargs=added)


def _convolution(shapes: Any, dtype: torch.dtype, layout: torch.memory_format) -> Callable[[], object]:
    features, weight = (torch.randn(shape).to(dtype=dtype, memory_format=layout) for shape in shapes)
    return lambda: F.conv2d(features, weight, padding=1)


def _pays(switch: Callable[[nn.Module], Any], layer: nn.Module, features: Tensor) -> bool:
    """Return whether a layer is faster with a switch of `optimize` on."""
    without = _seconds(lambda: layer(features))
    with switch(layer):
        return _seconds(lambda: layer(features)) < without


def _seconds(call: Callable[[], object]) -> float:
    """Return the shortest time of a call, which is the one that the rest of the machine disturbed least."""
    call()
    times = []
    for _ in range(_TRIES):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)
