"""The weights that are trained, also where each process holds a part of them (FSDP2): taken whole and put back."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def is_sharded(accelerator: Accelerator) -> bool:
    """Tell whether the processes share the weights out among them. FSDP's first version, which flattens them, raises.

    What it made of a network has no weights by the names of the checkpoint.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    version = getattr(plugin, "fsdp_version", 1)  # accelerate before 1.6 knows no other
    if plugin is not None and version != 2:
        raise ValueError(
            f"Expected FSDP version 2, got {version}. Set fsdp_version: 2 in accelerate's config, as "
            "examples/accelerate_configs/fsdp.yaml does, or launch with --fsdp_version 2."
        )
    return plugin is not None


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """Give the weights that are trained, in the network's order."""
    return [weight for weight in network.parameters() if weight.requires_grad]


def whole(weight: Tensor) -> Tensor:
    """Give a weight or its average whole, without gradient; a sharded one on the CPU, and every process has to ask."""
    found: Any = weight.detach()
    return found.full_tensor().cpu() if hasattr(found, "full_tensor") else found


def shared_out(value: Tensor, weight: Tensor) -> Tensor:
    """Give a whole tensor on the device of a weight and, if that is sharded, in the same parts."""
    value = value.to(weight.device)
    if not hasattr(weight, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor  # public from torch 2.5 on

    like: Any = weight
    return distribute_tensor(value, like.device_mesh, like.placements)


@torch.no_grad()
def copy_weights(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    """Copy weights, either side of which may be sharded."""
    for value, weight in zip(source, target, strict=True):
        weight.copy_(shared_out(whole(value), weight))
