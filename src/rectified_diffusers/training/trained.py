"""A network in training, with its optimizer, average, updates and checkpoint tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from rectified_diffusers.training.config import TrainerConfig
from rectified_diffusers.training.guards import require_checkpointing, require_finite
from rectified_diffusers.training.sharding import copy_weights, full, trainable

_FULL_STATE = StateDictOptions(full_state_dict=True)
AVERAGE = "ema.safetensors"
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
    state: Any = get_optimizer_state_dict(model, optimizer, options=_FULL_STATE)
    state["state"] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition(".")
        entries = state["state"].setdefault(name, {})
        *folders, entry = entry.split(_NESTED)
        for folder in folders:
            entries = entries.setdefault(folder, {})
        entries[entry] = int(value.item()) if value.dtype == torch.int64 and value.ndim == 0 else value
    set_optimizer_state_dict(model, optimizer, state, options=_FULL_STATE)


def _flat(entries: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the named tensors of a parameter's state; those of a nested dictionary are named `<name>/<name>`."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}{_NESTED}{inner}", tensor) for inner, tensor in _flat(value))
        else:
            yield name, torch.as_tensor(value)


class Trained:
    """A network in training: its optimizer, the average (EMA) of its weights, its updates and its checkpoint tensors.

    The weights may be sharded over the processes (FSDP2). The numbers of processes and micro-batches change only the
    rounding of an update.

    Args:
        network: in float32, on the device; its weights that require a gradient are trained.
        checkpoints: folder of the checkpoints, for error messages.
        name: name of its weights' file in a checkpoint, without the suffix.
        prefix: prefix of the name of its optimizer's file.
        averaged: whether to average its weights.
    """

    def __init__(
        self,
        network: Any,
        accelerator: Accelerator,
        config: TrainerConfig,
        checkpoints: Path,
        name: str,
        prefix: str = "",
        averaged: bool = True,
    ) -> None:
        self.network, self.accelerator, self.config = network.train(), accelerator, config
        self.checkpoints, self.averaged = checkpoints, averaged
        self.weights_file, self.optimizer_file = f"{name}.safetensors", f"{prefix}optimizer.safetensors"
        if config.gradient_checkpointing:
            require_checkpointing(network)
            network.enable_gradient_checkpointing()
        optimizer = make_optimizer(trainable(network), config, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(network, optimizer)
        self.parameters = trainable(network)  # after prepare, which may shard them
        if averaged:
            self.start_average()

    def start_average(self) -> None:
        """Start an average from the current weights, which diffusers' default would drop at the first step."""
        self.ema = EMAModel(self.parameters, decay=self.config.ema_decay, update_after_step=-1, foreach=True)

    def restart(self) -> None:
        """Set the weights to their average, and reset the optimizer and the average."""
        self.ema.copy_to(self.parameters)
        self.optimizer.optimizer.state.clear()
        self.start_average()

    def update(
        self, step: int, inputs: Sequence[Tensor], losses_of: Callable[..., Tensor], learning_rate: float, seed: int
    ) -> tuple[float, float]:
        """Update weights and average on the mean loss of a batch; return this loss and the norm of its gradient.

        Args:
            inputs: tensors `(batch_size, ...)` on the CPU, for the full batch.
            losses_of: called with the parts of `inputs` that belong to a micro-batch; returns its losses, `(B,)`.
            seed: seed for the dropout of a network, so that a resumed run samples the same.
        """
        total: Any = self.accelerator.reduce(self.backward(inputs, losses_of, seed), "mean")
        norm: Any = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        loss, grad_norm = total.item(), norm.item()
        require_finite(step, loss, grad_norm, self.accelerator.scaler, self.checkpoints)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.averaged:  # `EMAModel.step` without a copy of all weights
            self.ema.optimization_step += 1
            self.ema.cur_decay_value = self.ema.get_decay(self.ema.optimization_step)
            weights = [weight.detach() for weight in self.parameters]
            torch._foreach_lerp_(self.ema.shadow_params, weights, 1 - self.ema.cur_decay_value)
        return loss, grad_norm

    def micro_batches(self, inputs: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return the parts of `inputs` that belong to each micro-batch of this process."""
        count = self.config.batch_size // self.accelerator.num_processes
        mine = slice(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)
        size = min(self.config.micro_batch_size or count, count)
        return list(zip(*(part[mine].split(size) for part in inputs), strict=True))

    def backward(self, inputs: Sequence[Tensor], losses_of: Callable[..., Tensor], seed: int) -> Tensor:
        """Accumulate the gradients of this process's part of the batch; return its mean loss, a scalar."""
        device, count = self.accelerator.device, self.config.batch_size // self.accelerator.num_processes
        micro_batches = self.micro_batches(inputs)
        total = torch.zeros((), device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.accelerator.process_index)
            for i, parts in enumerate(micro_batches, start=1):
                with nullcontext() if i == len(micro_batches) else self.accelerator.no_sync(self.model):
                    share = losses_of(*parts).sum() / count  # the processes' gradients are averaged
                    self.accelerator.backward(share)
                total += share.detach()
        return total

    @contextmanager
    def average(self) -> Iterator[Any]:
        """Return the network with the averaged weights, in evaluation mode, until the end of the block."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        self.network.eval()
        try:
            yield self.network
        finally:
            self.network.train()
            self.ema.restore(self.parameters)

    @property
    def nbytes(self) -> int:
        """Size in a checkpoint: the weights, the two moments of the optimizer and the average."""
        return (3 + self.averaged) * sum(weight.nbytes for weight in self.parameters)

    def named(self, weights: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return full tensors by parameter name; `weights` has the order of `parameters`."""
        names = [name for name, weight in self.network.named_parameters() if weight.requires_grad]
        return dict(zip(names, map(full, weights), strict=True))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint by file and name; every process must call this."""
        return {
            self.weights_file: self.named(self.parameters),
            **({AVERAGE: self.named(self.ema.shadow_params)} if self.averaged else {}),
            self.optimizer_file: optimizer_tensors(self.model, self.optimizer.optimizer),
        }

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], ema_steps: int = 0) -> None:
        """Load the tensors of a checkpoint; `ema_steps` is the number of updates of the average."""
        load_optimizer_tensors(self.model, self.optimizer.optimizer, tensors[self.optimizer_file])
        names = [name for name, weight in self.network.named_parameters() if weight.requires_grad]
        copy_weights((tensors[self.weights_file][name] for name in names), self.parameters)
        if self.averaged:
            copy_weights((tensors[AVERAGE][name] for name in names), self.ema.shadow_params)
            self.ema.optimization_step = ema_steps
