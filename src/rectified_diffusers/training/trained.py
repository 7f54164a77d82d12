"""The optimizer of a trained network, its tensors in a checkpoint, and the update step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from rectified_diffusers.training.config import TrainerConfig
from rectified_diffusers.training.guards import require_finite
from rectified_diffusers.training.run_folder import RunFolder

_WHOLE_STATE = StateDictOptions(full_state_dict=True)
_NESTED = "/"  # bitsandbytes keeps a dictionary of tensors in a parameter's state


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainerConfig, device: torch.device) -> Optimizer:
    """Return AdamW with the config's settings, in 8 bits if configured; only then is bitsandbytes imported."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings, fused=device.type in ("cuda", "cpu") or None)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # RuntimeError: not built for this CUDA version
        raise ImportError(
            'optimizer="adamw8bit" needs bitsandbytes: pip install "rectified_diffusers[8bit]", or use '
            f'optimizer="adamw" ({error}).'
        ) from error
    return AdamW8bit(parameters, **settings)


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as tensors named `<parameter>.<entry>`, on the CPU of the main process.

    An integer, such as the step count of bitsandbytes, becomes an int64 tensor without dimensions. Every process must
    call this; processes other than the main one may get nothing.
    """
    on_cpu = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_optimizer_state_dict(model, optimizer, options=on_cpu).get("state", {})
    return {f"{name}.{entry}": value for name, entries in state.items() for entry, value in _flat(entries)}


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of `optimizer_tensors`; settings of the optimizer, such as its learning rate, are kept."""
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
    """Yield the named tensors of a parameter's state; those of a nested dictionary are named `<name>/<name>`."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}{_NESTED}{inner}", tensor) for inner, tensor in _flat(value))
        else:
            yield name, torch.as_tensor(value)


@dataclass(frozen=True)
class Update:
    """Update the weights of one network; the numbers of processes and micro-batches change only rounding.

    Args:
        model, optimizer: as prepared by accelerate.
        parameters: the weights of the model that are trained.
        config: sizes of batch and micro-batch, and the norm that gradients are scaled down to.
        output: folder with the checkpoints, for error messages.
    """

    accelerator: Accelerator
    model: Any
    optimizer: Any
    parameters: list[nn.Parameter]
    config: TrainerConfig
    output: RunFolder

    def __call__(
        self, step: int, drawn: Sequence[Tensor], losses_of: Callable[..., Tensor], learning_rate: float, seed: int
    ) -> tuple[float, float]:
        """Take one optimizer step on the mean loss of a batch; return this loss and the norm of its gradient.

        Args:
            drawn: tensors `(batch_size, ...)` on the CPU, for the full batch.
            losses_of: called with the parts of `drawn` that belong to a micro-batch; returns its losses, `(B,)`.
            seed: seed for the dropout of a network, so that a resumed run samples the same.
        """
        total: Any = self.accelerator.reduce(self.backward(drawn, losses_of, seed), "mean")
        norm: Any = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        loss, grad_norm = total.item(), norm.item()
        require_finite(step, loss, grad_norm, self.accelerator.scaler, self.output.checkpoints)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, grad_norm

    def backward(self, drawn: Sequence[Tensor], losses_of: Callable[..., Tensor], seed: int) -> Tensor:
        """Accumulate the gradients of this process's part of the batch; return its mean loss, a scalar."""
        processes, device = self.accelerator.num_processes, self.accelerator.device
        count = self.config.batch_size // processes
        mine = slice(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)
        size = min(self.config.micro_batch_size or count, count)
        micro_batches = list(zip(*(part[mine].split(size) for part in drawn), strict=True))
        total = torch.zeros((), device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.accelerator.process_index)
            for i, parts in enumerate(micro_batches, start=1):
                with nullcontext() if i == len(micro_batches) else self.accelerator.no_sync(self.model):
                    share = losses_of(*parts).sum() / count  # the processes' gradients are averaged
                    self.accelerator.backward(share)
                total += share.detach()
        return total
