"""Process groups of `accelerate launch` and torchrun, also connected on machines with only CPUs."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, gather_object, parse_flag_from_env

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

_PATIENCE = timedelta(days=30)  # how long finished processes wait for the slowest
_TRAINING_PATIENCE = timedelta(hours=2)  # for one that writes 192 GB, the checkpoint of a model of 12B, or validates


def several_on_cpu() -> bool:
    """Return whether a launcher started several processes on a machine with only CPUs.

    accelerate connects them only on request; otherwise each would work alone, all in the same folder.
    """
    _warn_of_missing_processes()
    devices = getattr(torch, "accelerator", torch.cuda)  # torch.accelerator exists since torch 2.6
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not devices.is_available()


def _warn_of_missing_processes() -> None:
    """Warn if `accelerate launch --cpu --num_processes N` was called, which starts one process for any N.

    It sets the address of a process group only for several processes, but no size.
    """
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    launched = parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ
    if launched and not any(name in os.environ for name in sizes):
        logger.warning(
            "accelerate launch --cpu has started one process, whatever its --num_processes. Start N with "
            "torchrun --nproc_per_node N -m rectified_diffusers.cli COMMAND ..."
        )


def join_processes() -> PartialState:
    """Join the process group and return its state; processes wait for each other for up to 30 days."""
    return PartialState(cpu=several_on_cpu() or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_PATIENCE)


def training_accelerator(mixed_precision: str, **arguments: Any) -> Accelerator:
    """Return the accelerator of a training, whose processes wait for each other for up to two hours."""
    # accelerate fixes its mixed precision for the lifetime of the process. bf16 needs only autocast, which
    # the trainers apply themselves, so one process can do runs of either precision; fp16 needs a scaler.
    precision = "fp16" if mixed_precision == "fp16" else "no"
    group = InitProcessGroupKwargs(timeout=_TRAINING_PATIENCE)  # ten minutes by default
    return Accelerator(cpu=several_on_cpu(), mixed_precision=precision, kwargs_handlers=[group], **arguments)


def divided(calls: Sequence[Callable[[], Value]]) -> list[Value]:
    """Return the results of calls, of which each process makes a share; every process must call this.

    All make the same number of calls, the last one again if none is left: with sharded weights, the calls of a turn
    need all processes, and must evaluate the network equally often.
    """
    state = PartialState()
    process, count = state.process_index, state.num_processes
    turns = range(0, len(calls), count)
    own = [calls[min(first + process, len(calls) - 1)]() for first in turns]
    made = gather_object([own])
    return [made[i % count][i // count] for i in range(len(calls))]


@dataclass(frozen=True)
class Peers:
    """The processes of a training. Their messages do not mix with those of the steps, so a thread may exchange them.

    Attributes:
        process: number of this process, from 0.
        count: number of processes.
        group: process group for the messages.
    """

    process: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def connect(cls) -> "Peers":
        """Connect the processes of the default process group, if there is one; each must call this."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        group = torch.distributed.new_group(backend="gloo", timeout=_TRAINING_PATIENCE)  # NCCL passes no objects
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), group)

    def exchange(self, value: Value) -> list[Value]:
        """Return the values of all processes; each must call this."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values
