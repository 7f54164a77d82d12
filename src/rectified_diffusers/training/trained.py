"""A network in training, with its optimizer, average, updates and checkpoint tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim import Optimizer

from rectified_diffusers.training.checkpoint_reading import StoredCheckpoint
from rectified_diffusers.training.checkpoint_writing import CheckpointWriter
from rectified_diffusers.training.config import TrainerConfig
from rectified_diffusers.training.guards import require_checkpointing, require_finite
from rectified_diffusers.training.parts import Place
from rectified_diffusers.training.sharding import copy_weights, is_sharded, swap_weights, trainable

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


def optimizer_tensors(names: Sequence[str], optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as tensors named `<parameter>.<entry>`.

    An integer, such as the step count of bitsandbytes, becomes an int64 tensor without dimensions.

    Args:
        names: names of the optimizer's parameters, in its order.
    """
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}.{entry}": value for i, entries in state.items() for entry, value in _flat(entries)}


def load_optimizer_tensors(names: Sequence[str], optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of `optimizer_tensors`; settings of the optimizer, such as its learning rate, are kept."""
    state: dict[int, Any] = {}
    numbers = {name: number for number, name in enumerate(names)}
    for key, value in tensors.items():
        name, _, entry = key.rpartition(".")
        entries = state.setdefault(numbers[name], {})
        *folders, entry = entry.split(_NESTED)
        for folder in folders:
            entries = entries.setdefault(folder, {})
        entries[entry] = int(value.item()) if value.dtype == torch.int64 and value.ndim == 0 else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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
        network: in float32, on the device; its weights that require a gradient are trained. If the weights are
            sharded here, it may be in another dtype and in memory that others use, see `borrow_weights`.
        writer: writes its checkpoints; error messages name the last.
        name: name of its weights' file in a checkpoint, without the suffix.
        prefix: prefix of the name of its optimizer's file.
        averaged: whether to average its weights.
    """

    def __init__(
        self,
        network: Any,
        accelerator: Accelerator,
        config: TrainerConfig,
        writer: CheckpointWriter,
        name: str,
        prefix: str = "",
        averaged: bool = True,
    ) -> None:
        self.network, self.accelerator, self.config = network.train(), accelerator, config
        self.writer, self.averaged = writer, averaged
        self.weights_file, self.optimizer_file = f"{name}.safetensors", f"{prefix}optimizer.safetensors"
        if config.gradient_checkpointing:
            require_checkpointing(network)
            network.enable_gradient_checkpointing()
        if config.compile:
            network.compile()  # in place, so that its weights keep their names
        optimizer = make_optimizer(trainable(network), config, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(network, optimizer)
        if is_sharded(accelerator):
            self.model.float()
        self.parameters = trainable(network)  # after prepare, which may shard them
        if averaged:
            self.start_average()

    def start_average(self) -> None:
        """Start an average from the current weights, which diffusers' default would drop at the first step."""
        self.ema = EMAModel(self.parameters, decay=self.config.ema_decay, update_after_step=-1, foreach=True)

    def restart(self) -> None:
        """Set the weights to their average, and reset the optimizer and the average."""
        copy_weights(self.ema.shadow_params, self.parameters)  # `EMAModel.copy_to` cannot if they are sharded
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
        require_finite(step, loss, grad_norm, self.accelerator.scaler, self.writer.settle)
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
        swap_weights(self.parameters, self.ema.shadow_params)
        self.network.eval()
        try:
            yield self.network
        finally:
            self.network.train()
            swap_weights(self.parameters, self.ema.shadow_params)

    @property
    def nbytes(self) -> int:
        """Size in a checkpoint: the weights, the two moments of the optimizer and the average."""
        return (3 + self.averaged) * sum(weight.nbytes for weight in self.parameters)

    @property
    def names(self) -> list[str]:
        """Names of `parameters`."""
        return [name for name, weight in self.network.named_parameters() if weight.requires_grad]

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights and their average by file and name."""
        averages = {AVERAGE: self.ema.shadow_params} if self.averaged else {}
        files = {self.weights_file: self.parameters, **averages}
        return {file: dict(zip(self.names, tensors, strict=True)) for file, tensors in files.items()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint by file and name. They are not copied, and sharded if the weights are."""
        return {**self._weights(), self.optimizer_file: optimizer_tensors(self.names, self.optimizer.optimizer)}

    def targets(self, checkpoint: StoredCheckpoint) -> dict[str, dict[str, Tensor]]:
        """Return the tensors to load from a checkpoint: weights, average, and a new state of the optimizer."""
        stored = self._weights()
        weights = stored[self.weights_file]

        def empty(key: str, place: Place) -> Tensor:
            weight = weights.get(key.rpartition(".")[0])
            if weight is not None and weight.shape == place.shape:
                return torch.empty_like(weight, dtype=place.dtype, requires_grad=False)
            return torch.empty(place.shape, dtype=place.dtype, device=self.accelerator.device)

        state = {key: empty(key, place) for key, place in checkpoint.tensors(self.optimizer_file).items()}
        return {**stored, self.optimizer_file: state}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], ema_steps: int = 0) -> None:
        """Take over the loaded `targets`; `ema_steps` is the number of updates of the average."""
        load_optimizer_tensors(self.names, self.optimizer.optimizer, tensors[self.optimizer_file])
        if self.averaged:
            self.ema.optimization_step = ema_steps
