"""Write and read whole checkpoints on one process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rectified_diffusers.distributed import Peers
from rectified_diffusers.training.checkpoint_reading import StoredCheckpoint, checkpoint_path, load_newest
from rectified_diffusers.training.checkpoint_writing import CheckpointWriter


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` optimizer steps; `tensors` is indexed by file name, then by parameter name."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    with CheckpointWriter(folder, keep, Peers(), lambda: None) as writer:
        writer.save(checkpoint.step, checkpoint.tensors, checkpoint.state)
    return checkpoint_path(folder, checkpoint.step)


def read_checkpoint(path: Path) -> Checkpoint:
    return _whole(StoredCheckpoint(path, Peers()))


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    return load_newest(folder, _whole, Peers())


def _whole(stored: StoredCheckpoint) -> Checkpoint:
    tensors = stored.empty()
    stored.load(tensors)
    return Checkpoint(stored.step, tensors, stored.state)
