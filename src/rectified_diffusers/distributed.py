"""Process groups of `accelerate launch` and torchrun, also connected on machines with only CPUs."""

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

_PATIENCE = timedelta(days=30)  # how long finished processes wait for the slowest
_TRAINING_PATIENCE = timedelta(hours=2)  # for one that writes 192 GB, the checkpoint of a model of 12B, or validates


def several_on_cpu() -> bool:
    """Return whether a launcher started several processes on a machine with only CPUs.

    accelerate connects them only on request; otherwise each would work alone, all in the same folder.
    """
    devices = getattr(torch, "accelerator", torch.cuda)  # torch.accelerator exists since torch 2.6
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not devices.is_available()


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
