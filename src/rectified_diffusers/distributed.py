"""Process groups of `accelerate launch` and torchrun, also connected on machines with only CPUs."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState
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


def training_group() -> InitProcessGroupKwargs:
    """Return the settings of a training's process group; the default limit is ten minutes."""
    return InitProcessGroupKwargs(timeout=_TRAINING_PATIENCE)
