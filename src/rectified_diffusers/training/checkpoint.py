"""Checkpoints of a training run: folders of safetensors and JSON that are either complete or absent.

A checkpoint is written under a temporary name, flushed to disk and renamed. `state.json` lists the size and digest of
every file and ends with its own digest, so a damaged checkpoint is detected and the previous one is used. No pickle.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rectified_diffusers.digests import hash_file
from rectified_diffusers.files import is_full, no_space, require_space, write_atomically
from rectified_diffusers.training.config import ProgressiveConfig, TrainerConfig

logger = logging.getLogger(__name__)

FREE_OPTIONS = frozenset(
    {
        "output_dir",
        "max_steps",
        "micro_batch_size",
        "num_workers",
        "gradient_checkpointing",
        "lpips_weights",
        "save_every_steps",
        "keep_checkpoints",
        "validate_every_steps",
        "validation_prompts",
        "validation_guidance_scale",
        "log_every_steps",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "straightness_paths",
    }
)
"""Options that may change when a run is resumed: they affect neither the loss nor the trajectory of the weights."""

STATE = "state.json"
SEAL = "blake2b"


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` optimizer steps; `tensors` is indexed by file name, then by parameter name."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, then remove all but the `keep` newest.

    Checkpoints of later steps are removed too: they were damaged or skipped.
    """
    path = checkpoint_path(folder, checkpoint.step)

    def write(temporary: Path) -> None:
        temporary.mkdir()
        for name, tensors in checkpoint.tensors.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / name)
        files = {name: file_digest(temporary / name) for name in sorted(checkpoint.tensors)}
        state = {"step": checkpoint.step, **checkpoint.state, "files": files}
        (temporary / STATE).write_text(sealed(state))

    try:
        write_atomically(path, write)
    except OSError as error:
        if not is_full(error):
            raise
        needed = sum(tensor.nbytes for tensors in checkpoint.tensors.values() for tensor in tensors.values())
        raise no_space(folder, f"the checkpoint of step {checkpoint.step}", needed, _way_on(folder)) from error
    older = [step for step in checkpoint_steps(folder) if step < checkpoint.step]
    newer = [step for step in checkpoint_steps(folder) if step > checkpoint.step]
    for step in [*newer, *(older[: -(keep - 1)] if keep > 1 else older)]:
        shutil.rmtree(checkpoint_path(folder, step))
    return path


def require_room(folder: Path, size: int, keep: int) -> None:
    """Raise if the disk has no room for all checkpoints that exist at the same time: the `keep` newest and a new one.

    Args:
        size: size of one checkpoint in bytes. Existing checkpoints need no more space.
    """
    needed = size * max(1, keep + 1 - len(checkpoint_steps(folder)))
    require_space(folder, needed, f"the {keep} checkpoints to keep and the one being written", _way_on(folder))


def _way_on(folder: Path) -> str:
    """Return the end of the error for a full disk: the last good checkpoint and how to continue."""
    steps = checkpoint_steps(folder)
    last = f"{checkpoint_path(folder, steps[-1])} is complete" if steps else "there is none yet"
    return (
        f"Last good checkpoint: {last}. Make room or lower keep_checkpoints, and run the same again to go on from it."
    )


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, in ascending order."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raise a `ValueError` that describes the damage if it is damaged."""
    try:
        state = unsealed((path / STATE).read_text())
        files, step = state.pop("files"), state.pop("step")
        for name, expected in files.items():
            found = file_digest(path / name)
            if found != expected:
                raise ValueError(f"{name} should be {expected} and is {found}")
        return Checkpoint(step, {name: load_file(path / name) for name in files}, state)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"The checkpoint {path} is damaged ({type(error).__name__}: {error}). "
            "Remove its folder to go on from the checkpoint before it."
        ) from error


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest intact checkpoint. Return None if there is no checkpoint; raise if all are damaged."""
    steps = checkpoint_steps(folder)
    for step in reversed(steps):
        try:
            return read_checkpoint(checkpoint_path(folder, step))
        except ValueError as error:
            logger.warning("%s Trying the one before it.", error)
    if steps:
        raise ValueError(
            f"None of the {len(steps)} checkpoints in {folder} is whole. Remove that folder to start from step 0."
        )
    return None


def config_to_json(config: TrainerConfig) -> dict[str, Any]:
    """Return the options that a checkpoint records: all except those for the machine and for monitoring the run."""
    options = {name: value for name, value in asdict(config).items() if name not in FREE_OPTIONS}
    if isinstance(config, ProgressiveConfig):
        del options["student_steps"]  # the number of rounds, which is as free as max_steps
    elif config.lr_schedule != "constant_with_warmup":
        options["max_steps"] = config.max_steps  # linear and cosine schedules reach 0 there
    return json.loads(json.dumps(options))


def recorded_options(run: Mapping[str, Any], config: TrainerConfig) -> dict[str, Any]:
    """Return a recorded run with default values for missing options, such as those of a run by an earlier release."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    known = {name: value for name, value in defaults.items() if name in config_to_json(config)}
    return {**json.loads(json.dumps(known, default=str)), **run}


def require_same_run(expected: Mapping[str, Any], found: Mapping[str, Any], output_dir: Path) -> None:
    """Raise a `ValueError` that names the first entry in which a run differs from the run to resume."""
    for name in [*expected, *(name for name in found if name not in expected)]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{output_dir} holds a run with {name}={expected.get(name)!r}, got {name}={found.get(name)!r}. "
                "Give the same value to resume that run, or another output_dir to start a new one."
            )


def require_same_model(expected: Mapping[str, str], found: Mapping[str, str], output_dir: Path) -> None:
    """Raise a `ValueError` that names the part in which the starting model differs from that of the run to resume."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{output_dir} holds a run that started from a model with another {name}. Give that model to resume "
                "the run, or another output_dir to start a new one."
            )


def sealed(state: Mapping[str, Any]) -> str:
    """Return a state as JSON whose last entry is the digest of the other entries."""
    digest = hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()
    return json.dumps({**state, SEAL: digest}, indent=2) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """Return the state that `sealed` wrote. Raise a `ValueError` if any bit has changed."""
    state = json.loads(text)
    if not isinstance(state, dict) or SEAL not in state:
        raise ValueError(f"{STATE} does not end in its digest")
    del state[SEAL]
    if text != sealed(state):
        raise ValueError(f"{STATE} is not what was written")
    if not isinstance(state.get("files"), dict):
        raise ValueError(f"{STATE} does not list its files")
    return state


def file_digest(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the BLAKE2b digest of a file."""
    digest = hash_file(path, hashlib.blake2b(digest_size=16))
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}
