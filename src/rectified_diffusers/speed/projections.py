"""Query, key and value of an attention layer as one matrix multiplication: diffusers' fused projections, made safe.

The fused matrices are copies, which a LoRA or a weight delta applied later would not reach. Here they are recomputed
when the weights change, and not used while a LoRA is attached.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from rectified_diffusers.loading.lora_checks import has_lora
from rectified_diffusers.speed.caches import Forget, weights_state
from rectified_diffusers.speed.patching import Hook

_COPIES = ("to_qkv", "to_kv", "to_added_qkv")


def can_fuse(unet: Any) -> bool:
    """Return whether every attention layer is stock: any other processor (IP-Adapter's) would be lost."""
    return all(type(processor).__name__ == "AttnProcessor2_0" for processor in unet.attn_processors.values())


@contextmanager
def fused_projections(unet: Any) -> Iterator[Forget]:
    """Fuse the projections of a U-Net; yield a function that makes them be fused again."""
    if not can_fuse(unet):
        kinds = ", ".join(sorted({type(processor).__name__ for processor in unet.attn_processors.values()}))
        raise ValueError(f"fuse_qkv needs layers with AttnProcessor2_0, got {kinds}. Pass fuse_qkv=False.")
    layers = [layer for layer in unet.modules() if isinstance(layer, Attention)]
    made_of: list[Any] = [None]

    def refresh(model: nn.Module, args: Any) -> None:
        if made_of[0] != _state(layers):
            _unfuse(unet, layers)
            if not has_lora(unet) and can_fuse(unet):
                unet.fuse_qkv_projections()
            made_of[0] = _state(layers)

    def forget() -> None:
        made_of[0] = None

    hook = unet.register_forward_pre_hook(Hook(refresh, in_copies=_unfuse_copy))
    try:
        yield forget
    finally:
        hook.remove()
        _unfuse(unet, layers)


def _unfuse_copy(unet: Any, args: Any) -> None:
    _unfuse(unet, [layer for layer in unet.modules() if isinstance(layer, Attention)])


def _state(layers: list[Any]) -> tuple[Any, ...]:
    projections = (getattr(layer, name, None) for layer in layers for name in ("to_q", "to_k", "to_v"))
    return tuple(weights_state(each) for each in projections if each is not None)


def _unfuse(unet: Any, layers: list[Any]) -> None:
    """Remove the fused copies, and restore stock processors in the layers that are still fused."""
    if not any(hasattr(layer, name) for layer in layers for name in _COPIES):
        return
    processors = dict(unet.attn_processors)
    fused = [name for name, each in processors.items() if type(each).__name__.startswith("Fused")]
    unet.set_attn_processor({**processors, **{name: unet.original_attn_processors[name] for name in fused}})
    for layer in layers:
        layer.fused_projections = False
        for name in _COPIES:
            if hasattr(layer, name):
                delattr(layer, name)
    unet.original_attn_processors = None
