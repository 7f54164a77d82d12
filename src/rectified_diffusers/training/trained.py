"""What one trained network needs beside its weights: optimizer, its tensors in a checkpoint, and its updates."""

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


@dataclass(frozen=True)
class Update:
    """Update the weights of one network; neither processes nor micro-batches change more than rounding.

    Args:
        model, optimizer: as accelerate prepared them.
        parameters: the weights of the model that are trained.
        config: size of batch and micro-batch, and the norm that gradients are scaled down to.
        output: where the checkpoints are, for errors.
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
        """Take one step of the optimizer against the mean loss of a batch; give it and the norm of its gradient.

        Args:
            drawn: for the whole batch, tensors `(batch_size, ...)` on the CPU.
            losses_of: called with the parts of `drawn` that belong to a micro-batch; gives its losses, `(B,)`.
            seed: of what a network with dropout draws, by which it does the same after a resume.
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
        """Add up the gradients of this process's part of the batch; give its mean loss, a scalar."""
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
