"""Gather trained weights and copy them back, including weights sharded over the processes (FSDP2)."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether the weights are sharded over the processes. Raise for version 1 of FSDP.

    Version 1 flattens the weights, so the network has none with the names in the checkpoint.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    version = getattr(plugin, "fsdp_version", 1)  # accelerate before 1.6 has only version 1
    if plugin is not None and version != 2:
        raise ValueError(
            f"Expected FSDP version 2, got {version}. Set fsdp_version: 2 in accelerate's config, as "
            "examples/accelerate_configs/fsdp.yaml does, or launch with --fsdp_version 2."
        )
    return plugin is not None


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights that are trained, in the network's order."""
    return [weight for weight in network.parameters() if weight.requires_grad]


def full(weight: Tensor) -> Tensor:
    """Return a full weight or average without gradient; if sharded, on the CPU, and every process must call this."""
    tensor: Any = weight.detach()
    return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor


def shard_like(value: Tensor, weight: Tensor) -> Tensor:
    """Return a full tensor on the device of a weight and, if the weight is sharded, with the same sharding."""
    value = value.to(weight.device)
    if not hasattr(weight, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor  # public from torch 2.5 on

    like: Any = weight
    return distribute_tensor(value, like.device_mesh, like.placements)


@torch.no_grad()
def copy_weights(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    """Copy weights; source and target may be sharded."""
    for value, weight in zip(source, target, strict=True):
        weight.copy_(shard_like(full(value), weight))
