"""One update of a network's weights, by a batch that processes and micro-batches share."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rectified_diffusers.training.config import TrainerConfig
from rectified_diffusers.training.guards import require_finite
from rectified_diffusers.training.output import RunFolder


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
