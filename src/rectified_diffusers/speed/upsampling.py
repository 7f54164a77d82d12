"""Nearest-neighbor upsampling and the 3x3 convolution after it, as one transposed convolution.

Several of the nine pixels under the kernel are copies of one source pixel. Adding the weights that meet the same
source pixel first leaves four products of nine per output pixel, and no upsampled image is written. In the 4x4 kernel
of the transposed convolution, with stride 2 and padding 1, row u collects the kernel rows a with u = a' + 2 - a, a' in
{0, 1}: it is the 3x3 kernel, mirrored, spread by a 2x2 box. The result is equal except for the rounding of those sums.
"""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from rectified_diffusers.speed.caches import Forget
from rectified_diffusers.speed.packing import Packing, can_pack
from rectified_diffusers.speed.patching import Hook, replaced


def folded_weight(weight: Tensor) -> Tensor:
    """Fold upsampling by 2 into the kernel after it: `(out, in, 3, 3)` to `(in, out, 4, 4)`, added in float32.

    As a convolution with the box, this takes several times as long.
    """
    kernels = weight.detach().transpose(0, 1)
    is_last = weight.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last else torch.contiguous_format
    folded = weight.new_empty(*kernels.shape[:2], 4, 4).contiguous(memory_format=layout)
    pixels = list(itertools.product(range(3), repeat=2))
    taps = {(i, j): kernels[..., 2 - i, 2 - j].float() for i, j in pixels}
    for u, v in itertools.product(range(4), repeat=2):
        folded[..., u, v] = sum(taps[i, j] for i, j in pixels if u - i in (0, 1) and v - j in (0, 1))
    return folded


class _Folded:
    """A convolution with the upsampling before it; its kernel is folded at first use and after it changes."""

    def __init__(self, convolution: nn.Conv2d, pack: bool) -> None:
        self.convolution = convolution
        self.made_of: tuple[Any, ...] = ()
        self.weight: Tensor | None = None
        self.packing = Packing(_reordered) if pack else None

    def forget(self) -> None:
        self.weight = None
        if self.packing is not None:
            self.packing.forget()

    def refresh(self) -> None:
        """Fold the kernel if it is not the one that was folded last."""
        weight = self.convolution.weight
        state = (weight.data_ptr(), weight.dtype, weight.device, None if weight.is_inference() else weight._version)
        if self.weight is None or self.made_of != state:
            self.weight, self.made_of = folded_weight(weight), state

    def __call__(self, features: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # then the model's own call has done it
            self.refresh()
        weight, bias = cast(Tensor, self.weight), self.convolution.bias
        if self.packing is None or not can_pack(features, weight):
            return F.conv_transpose2d(features, weight, bias, stride=2, padding=1)
        packed = self.packing(weight, features)
        return torch.ops.mkldnn._convolution_transpose_pointwise(features, packed, bias, *_GEOMETRY, "none", [], "")


_GEOMETRY = (1, 1), (0, 0), (2, 2), (1, 1), 1  # padding at the input and at the output, stride, dilation, groups


def _reordered(weight: Tensor, size: list[int]) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, *_GEOMETRY, size)


@contextmanager
def folded_upsampling(model: nn.Module, pack: bool = False) -> Iterator[Forget]:
    """Fold every upsampling of a U-Net or a decoder; yield a function that makes the kernels be folded again.

    Layers with another kernel, with a LoRA on them, or called with an output size other than twice theirs, run
    unchanged. So do all layers while gradients are enabled. The call of the model itself folds changed kernels first,
    so that the layers contain no such check, at which torch.compile would split the model.

    Args:
        model: U-Net or decoder.
        pack: keep the folded kernels in oneDNN's layout, as `packed_weights` does.
    """
    folds: list[_Folded] = []
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, Upsample2D) and _is_foldable(layer):
                folds.append(_Folded(layer.conv, pack))  # pyright: ignore[reportArgumentType]
                stack.enter_context(replaced(layer, "forward", _forward(layer, layer.forward, folds[-1])))
            elif isinstance(layer, nn.Sequential):
                folds += _fold_sequence(layer, stack, pack)

        def refresh(*_: Any) -> None:
            if not torch.is_grad_enabled():
                for fold in folds:
                    fold.refresh()

        def forget() -> None:
            for fold in folds:
                fold.forget()

        stack.callback(model.register_forward_pre_hook(Hook(refresh)).remove)

        yield forget


def _is_plain(convolution: Any) -> bool:
    expected = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return type(convolution) is nn.Conv2d and tuple(getattr(convolution, name) for name in names) == expected


def _is_foldable(layer: Upsample2D) -> bool:
    return layer.norm is None and layer.interpolate and layer.name == "conv" and _is_plain(layer.conv)


def _forward(layer: Upsample2D, stock: Any, fold: _Folded) -> Any:
    def forward(hidden_states: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_size is not None or layer.conv is not fold.convolution or torch.is_grad_enabled():
            return stock(hidden_states, output_size, *args, **kwargs)
        return fold(hidden_states)

    return forward


def _fold_sequence(sequence: nn.Sequential, stack: ExitStack, pack: bool) -> list[_Folded]:
    """Fold the pairs (nn.Upsample, nn.Conv2d) of AutoencoderTiny, whose layers are in one sequence."""
    folds: list[_Folded] = []
    for before, after in itertools.pairwise(sequence):
        doubles = isinstance(before, nn.Upsample) and before.scale_factor == 2 and before.mode == "nearest"
        if doubles and _is_plain(after):
            folds.append(_Folded(after, pack))  # pyright: ignore[reportArgumentType]
            stack.enter_context(replaced(before, "forward", _unless_training(before.forward, nn.Identity())))
            stack.enter_context(replaced(after, "forward", _unless_training(after.forward, folds[-1])))
    return folds


def _unless_training(stock: Any, fast: Any) -> Any:
    def forward(features: Tensor) -> Tensor:
        return stock(features) if torch.is_grad_enabled() else fast(features)

    return forward
