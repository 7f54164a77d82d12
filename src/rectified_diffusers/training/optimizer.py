"""The optimizers to choose from, and their state as named tensors for a checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from rectified_diffusers.training.config import TrainerConfig

_WHOLE_STATE = StateDictOptions(full_state_dict=True)
_NESTED = "/"  # bitsandbytes keeps a dictionary of tensors in a parameter's state


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainerConfig, device: torch.device) -> Optimizer:
    """Make AdamW with the config's settings, in 8 bits if it asks for that; bitsandbytes is imported then alone."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings, fused=device.type in ("cuda", "cpu") or None)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # the second for a CUDA that it was not built for
        raise ImportError(
            'optimizer="adamw8bit" needs bitsandbytes: pip install "rectified_diffusers[8bit]", or use '
            f'optimizer="adamw" ({error}).'
        ) from error
    return AdamW8bit(parameters, **settings)


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Give the state of an optimizer as tensors named `<parameter>.<entry>`, on the CPU of the main process.

    A whole number, as which bitsandbytes counts its steps, is a tensor of int64 without dimensions. Every process has
    to call it; the others may get nothing.
    """
    on_cpu = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_optimizer_state_dict(model, optimizer, options=on_cpu).get("state", {})
    return {f"{name}.{entry}": value for name, entries in state.items() for entry, value in _flat(entries)}


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back; the settings of the optimizer, such as its rate, stay."""
    state: Any = get_optimizer_state_dict(model, optimizer, options=_WHOLE_STATE)
    state["state"] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition(".")
        entries = state["state"].setdefault(name, {})
        *folders, entry = entry.split(_NESTED)
        for folder in folders:
            entries = entries.setdefault(folder, {})
        entries[entry] = int(value.item()) if value.dtype == torch.int64 and value.ndim == 0 else value
    set_optimizer_state_dict(model, optimizer, state, options=_WHOLE_STATE)


def _flat(entries: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of a parameter's state with their names, those of a dictionary in it as `<name>/<name>`."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}{_NESTED}{inner}", tensor) for inner, tensor in _flat(value))
        else:
            yield name, torch.as_tensor(value)
