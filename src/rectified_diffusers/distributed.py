"""The processes of `accelerate launch` and torchrun, connected also where there are only CPUs."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

_PATIENCE = timedelta(days=30)  # of processes that are done, for the slowest


def several_on_cpu() -> bool:
    """Tell whether a launcher started several processes where there are only CPUs.

    accelerate connects them only if it is told so; else each would work by itself, in one and the same folder.
    """
    devices = getattr(torch, "accelerator", torch.cuda)  # torch.accelerator is there from torch 2.6 on
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not devices.is_available()


def join_processes() -> PartialState:
    """Take part in the work of all processes, which wait for each other however long that takes."""
    return PartialState(cpu=several_on_cpu() or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_PATIENCE)
