"""Read the checkpoints of a training run: folders of safetensors and JSON that are either complete or absent.

`checkpoint_writing.py` writes them. `state.json` lists the size and digest of every file and ends with its own digest,
so a damaged checkpoint is detected and the previous one is used. No pickle.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from rectified_diffusers.distributed import Peers
from rectified_diffusers.training.parts import Place, file_of, is_distributed, part_of, places_in, read_file

logger = logging.getLogger(__name__)

STATE = "state.json"
SEAL = "blake2b"
Result = TypeVar("Result")


class DamagedError(ValueError):
    """A checkpoint is not as it was written."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, in ascending order."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


class StoredCheckpoint:
    """A checkpoint on the disk, of which each process reads the part that it needs.

    Args:
        path: folder of a checkpoint, of this or another number of processes, or of an earlier release.
    """

    def __init__(self, path: Path, peers: Peers) -> None:
        self.path, self.peers = path, peers
        self.state, self.parts = self._checked(self._open)
        self.files: dict[str, Any] = self.state.pop("files")
        self.step: int = self.state.pop("step")

    def _open(self) -> tuple[dict[str, Any], dict[str, dict[str, Place]]]:
        state = unsealed((self.path / STATE).read_text())
        if not isinstance(state.get("step"), int):
            raise ValueError(f"{STATE} names no step")
        parts = {name: places_in(self.path / name) for name in sorted(state["files"])}
        require_full(parts)
        return state, parts

    def tensors(self, file: str) -> dict[str, Place]:
        """Return the tensors of `unet.safetensors`, for example, as their first parts; empty if there are none."""
        parts = [places for part, places in self.parts.items() if file_of(part) == file]
        return {name: place for places in reversed(parts) for name, place in places.items()}

    def empty(self) -> dict[str, dict[str, Tensor]]:
        """Return full tensors, not initialized, for everything in the checkpoint."""
        files = {file: self.tensors(file) for file in map(file_of, self.parts)}
        return {
            file: {name: torch.empty(place.shape, dtype=place.dtype) for name, place in places.items()}
            for file, places in files.items()
        }

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the checkpoint into tensors, by file and name; of one that is sharded, the part of this process.

        Every process must call this with the same names. One process reads each file and checks its digest; it sends
        to the others what they need in full. Of a sharded tensor, a process also reads its rows in files of others. If
        the checkpoint is damaged, the tensors have partly changed.
        """
        targets = {(file, name): part_of(tensor) for file, named in tensors.items() for name, tensor in named.items()}
        flat = {key: part.values.contiguous().view(-1) for key, part in targets.items()}
        sharded = {(file, name) for file, name in targets if is_distributed(tensors[file][name])}
        owners = {part: number % self.peers.count for number, part in enumerate(self.parts)}
        own = [part for part, owner in owners.items() if owner == self.peers.process]

        def copy(key: tuple[str, str], place: Place, values: Tensor | None) -> None:
            """Copy the elements of a place, read now unless given, that lie in this process's part of a tensor."""
            part = targets[key]
            begin, end = max(part.first, place.first), min(part.first + len(flat[key]), place.first + place.count)
            if begin < end:
                found = place.read(begin, end) if values is None else values[begin - place.first : end - place.first]
                flat[key][begin - part.first : end - part.first].copy_(found)

        def read_own() -> None:
            for file, named in tensors.items():
                stored = self.tensors(file)
                for name, tensor in named.items():
                    if stored[name].shape != tensor.shape:
                        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, in {file} {stored[name].shape}")
            for part in own:
                file = file_of(part)

                def receive(name: str, place: Place, values: Tensor, file: str = file) -> None:
                    if (file, name) in targets:
                        copy((file, name), place, values)

                found = read_file(self.path / part, self.parts[part], receive)
                if found != self.files[part]:
                    raise ValueError(f"{part} should be {self.files[part]} and is {found}")

        def read_others() -> None:
            for part in self.parts.keys() - set(own):
                for name, place in self.parts[part].items():
                    if (file_of(part), name) in sharded:
                        copy((file_of(part), name), place, None)

        self._checked(read_own)
        self._checked(read_others)
        for part, places in self.parts.items() if self.peers.count > 1 else ():
            for name, place in places.items():
                key = (file_of(part), name)
                if key in targets and key not in sharded:
                    torch.distributed.broadcast(flat[key][place.first : place.first + place.count], owners[part])
        with torch.no_grad():
            for key, part in targets.items():
                if flat[key].data_ptr() != part.values.data_ptr():  # it was not contiguous
                    part.values.copy_(flat[key].view(part.values.shape))

    def _checked(self, work: Callable[[], Result]) -> Result:
        """Return the result of this process's work. Raise on all processes if any finds the checkpoint damaged."""
        result: Any = None
        damage = None
        try:
            result = work()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            damage = f"{type(error).__name__}: {error}"
        for found in self.peers.exchange(damage):
            if found:
                raise DamagedError(
                    f"The checkpoint {self.path} is damaged ({found}). "
                    "Remove its folder to go on from the checkpoint before it."
                )
        return result


def require_full(parts: Mapping[str, Mapping[str, Place]]) -> None:
    """Raise unless the parts of each tensor are one after the other, from its first element to its last."""
    ends: dict[tuple[str, str], int] = {}
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for part, places in parts.items():
        for name, place in places.items():
            key = (file_of(part), name)
            if ends.get(key, 0) != place.first or shapes.setdefault(key, place.shape) != place.shape:
                raise ValueError(f"{part} does not hold the next part of {name}")
            ends[key] = place.first + place.count
    for (file, name), end in ends.items():
        if end != math.prod(shapes[file, name]):
            raise ValueError(f"the last part of {name} in {file} is missing")


def load_newest(folder: Path, load: Callable[[StoredCheckpoint], Result], peers: Peers) -> Result | None:
    """Return `load` of the newest intact checkpoint, or None if there is no checkpoint; raise if all are damaged."""
    steps = peers.exchange(checkpoint_steps(folder))[0]
    for step in reversed(steps):
        try:
            return load(StoredCheckpoint(checkpoint_path(folder, step), peers))
        except DamagedError as error:
            logger.warning("%s Trying the one before it.", error)
    if steps:
        raise ValueError(
            f"None of the {len(steps)} checkpoints in {folder} is whole. Remove that folder to start from step 0."
        )
    return None


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
