"""Shard the weights of networks over the processes (FSDP2), gather them and copy them."""

import copy
from collections.abc import Callable, Iterable
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
            "examples/accelerate_configs/fsdp.yaml does, or launch with --fsdp_version 2; it needs accelerate 1.6."
        )
    return plugin is not None


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights that are trained, in the network's order."""
    return [weight for weight in network.parameters() if weight.requires_grad]


def borrow_weights(network: Any) -> Any:
    """Return a copy of a network's modules whose weights are in the same memory, until they are sharded.

    Sharding copies the part of each weight that this process holds, so that no process copies the full network.
    """
    own = {id(weight): nn.Parameter(weight.detach(), weight.requires_grad) for weight in network.parameters()}
    return copy.deepcopy(network, own)


def freeze(network: Any, accelerator: Accelerator) -> Any:
    """Return a network of `initial_network` for predictions only, on the device; sharded if those in training are."""
    network.requires_grad_(False).eval()
    if not is_sharded(accelerator):
        return network.to(accelerator.device)
    from accelerate.utils import fsdp2_prepare_model  # since accelerate 1.6, as FSDP2; `prepare` wants an optimizer

    return fsdp2_prepare_model(accelerator, network).float()


def full(weight: Tensor) -> Tensor:
    """Return a full weight or average without gradient; if sharded, on the CPU, and every process must call this."""
    tensor: Any = weight.detach()
    return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor


def gathered(weights: Iterable[Tensor], make_network: Callable[[], Any], accelerator: Accelerator) -> Any:
    """Return a new network in float32 with full copies of trained weights.

    If the weights are sharded, every process must call this. They are gathered one by one, and only the first process
    keeps them: the others return None.
    """
    if is_sharded(accelerator) and not accelerator.is_main_process:
        for weight in weights:
            full(weight)
        return None
    network = make_network().eval()
    if is_sharded(accelerator):
        network = copy.deepcopy(network).float().to(accelerator.device)  # so far with the pipeline's own weights
    copy_weights(weights, trainable(network))
    return network


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
        alike = getattr(value, "placements", None) == getattr(weight, "placements", None)
        weight.copy_(value.detach() if alike else shard_like(full(value), weight))


@torch.no_grad()
def swap_weights(first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
    """Exchange the values of weights, one after the other, so that there is no copy of all."""
    for one, other in zip(first, second, strict=True):
        value = one.detach().clone()
        one.copy_(other)
        other.copy_(value)
