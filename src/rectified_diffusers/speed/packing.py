"""Weights in oneDNN's own layout, so that a CPU does not reorder them in each call.

For each call of a layer in bfloat16, PyTorch lets oneDNN reorder the weight for its kernel and drops the result. For
1280 channels at 8x8, that is a third of the layer's time. Here the reordered copy is kept, as torch.compile with
`freezing` does. The kernels stay the same.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rectified_diffusers.speed.caches import Forget
from rectified_diffusers.speed.patching import replaced


class _Packed(NamedTuple):
    weight: Tensor
    source: Tensor  # kept, so that no other weight can have its address
    version: int | None
    size: tuple[int, ...]


class Packing:
    """A weight in oneDNN's layout, which is made at first use and after the weight or the input's size changes.

    Args:
        reorder: returns a weight in the layout for inputs of a size.
    """

    def __init__(self, reorder: Callable[[Tensor, list[int]], Tensor]) -> None:
        self.reorder = reorder
        self.made: _Packed | None = None

    def forget(self) -> None:
        """Drop the reordered copy, and with it the memory."""
        self.made = None

    def __call__(self, weight: Tensor, features: Tensor) -> Tensor:
        made, size = self.made, tuple(features.shape)  # read once: another thread may exchange it
        version = None if weight.is_inference() else weight._version
        stale = made is None or made.source.data_ptr() != weight.data_ptr()
        if made is None or stale or (made.version, made.size) != (version, size):
            weight = weight.detach()
            made = self.made = _Packed(self.reorder(weight, list(size)), weight, version, size)
        return made.weight


def can_pack(features: Tensor, weight: Tensor) -> bool:
    """Return whether a call is inference in bfloat16 on a CPU whose instructions oneDNN uses for it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    on_cpu = features.device.type == weight.device.type == "cpu"
    return on_cpu and features.dtype == weight.dtype == torch.bfloat16 and _is_supported()


def _is_supported() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[Forget]:
    """Keep the weights of a model's convolutions and linear layers in oneDNN's layout; yield a function to drop them.

    Layers in another dtype or on another device run unchanged, and so do all layers while gradients are enabled. The
    parameters stay as they are. Packed convolutions return channels-last features.
    """
    packings: list[Packing] = []
    with ExitStack() as stack:
        for layer in model.modules():
            if "forward" not in vars(layer) and (made := _fast_forward(layer)) is not None:
                forward, packing = made
                packings.append(packing)
                stack.enter_context(replaced(layer, "forward", _where_possible(layer, layer.forward, forward)))

        def forget() -> None:
            for packing in packings:
                packing.forget()

        yield forget


def _where_possible(layer: Any, stock: Any, fast: Any) -> Any:
    def forward(features: Tensor) -> Tensor:
        return fast(features) if can_pack(features, layer.weight) else stock(features)

    return forward


def _fast_forward(layer: Any) -> tuple[Callable[[Tensor], Tensor], Packing] | None:
    """Return what computes a layer with a packed weight, and its packing; None for another kind of layer."""
    if type(layer) is nn.Linear:
        return _linear(layer)
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return _convolution(layer)
    return None


def _linear(layer: nn.Linear) -> tuple[Callable[[Tensor], Tensor], Packing]:
    packing = Packing(lambda weight, size: torch.ops.mkldnn._reorder_linear_weight(weight, None))

    def forward(features: Tensor) -> Tensor:
        weight = packing(layer.weight, features)
        return torch.ops.mkldnn._linear_pointwise(features, weight, layer.bias, "none", [], "")

    return forward, packing


def _convolution(layer: nn.Conv2d) -> tuple[Callable[[Tensor], Tensor], Packing]:
    settings = layer.padding, layer.stride, layer.dilation, layer.groups

    def reorder(weight: Tensor, size: list[int]) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, size)

    packing = Packing(reorder)

    def forward(features: Tensor) -> Tensor:
        weight = packing(layer.weight, features)
        return torch.ops.mkldnn._convolution_pointwise(features, weight, layer.bias, *settings, "none", [], "")

    return forward, packing
