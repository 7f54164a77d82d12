"""Write the checkpoints of a training run in the background, while the training goes on.

A checkpoint is written under a temporary name, flushed to disk and renamed.
"""

import errno
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.distributed import Peers
from rectified_diffusers.files import TEMPORARY, flush, is_full, no_space, remove, require_space
from rectified_diffusers.training.checkpoint_reading import STATE, checkpoint_path, checkpoint_steps, sealed
from rectified_diffusers.training.parts import Part, Snapshot, new_buffer, own_parts, part_name, write_file

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Write the checkpoints of a training, one at a time. At the end of a `with` block, all are written.

    A step stops while the tensors are copied to the CPU, and until the previous checkpoint is written. The memory of
    the copies, pinned if they come from a GPU, is kept for the next checkpoint. A failed write is raised by the next
    call; the previous checkpoint stays.

    Args:
        keep: number of newest checkpoints to keep.
        flush_log: called before a checkpoint becomes visible, so that none is ahead of the log.
    """

    def __init__(self, folder: Path, keep: int, peers: Peers, flush_log: Callable[[], object]) -> None:
        self.folder, self.keep, self.peers, self.flush_log = folder, keep, peers, flush_log
        # In the names of temporary files: a process of a killed training may still be writing its own.
        self.token = peers.exchange(secrets.token_hex(4))[0]
        self.snapshots: dict[str, Snapshot] = {}
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None

    def reserve(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Allocate the memory for the copies in the background, which would take the first checkpoint seconds."""

        def allocate(parts: Mapping[str, Mapping[str, Part]]) -> None:
            self.snapshots = {name: Snapshot(b"", new_buffer(own).zero_()) for name, own in parts.items()}

        self.wait()
        self.pending = self.executor.submit(allocate, self._parts(tensors))

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; every process must call this. The tensors may change afterwards."""
        self.wait()
        self.snapshots = {
            name: Snapshot.of(own, self.snapshots[name].body if name in self.snapshots else None)
            for name, own in self._parts(tensors).items()
        }
        if any(snapshot.body.is_pinned() for snapshot in self.snapshots.values()):
            torch.cuda.synchronize()
        self.pending = self.executor.submit(self._write, step, state)

    def check(self) -> None:
        """Raise the error of a write that has failed."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written, and raise its error if it has failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def settle(self) -> Path:
        """Wait until no checkpoint is being written, and return the folder of all."""
        if self.pending is not None:
            self.pending.exception()
        return self.folder

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            logger.warning("The last checkpoint was not written: %s", failure)

    def _parts(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Part]]:
        """Return the parts that this process writes, by the names of their files."""
        process, count = self.peers.process, self.peers.count
        parts = {part_name(file, process, count): own_parts(named, process, count) for file, named in tensors.items()}
        return {name: own for name, own in parts.items() if own}

    def _write(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the snapshots of all processes as one checkpoint, and remove the older ones that are not kept.

        The first process makes it visible when all have written their files. Checkpoints of later steps are removed
        too: they were damaged or skipped.
        """
        path = checkpoint_path(self.folder, step)
        temporary = path.with_name(f"{TEMPORARY}{self.token}-{path.name}")
        files: dict[str, Any] = {}

        def write() -> None:
            temporary.mkdir(parents=True, exist_ok=True)
            for name, snapshot in self.snapshots.items():
                files[name] = write_file(temporary / name, snapshot)
                flush(temporary / name)

        def publish() -> None:
            if self.peers.process > 0:
                return
            digests = {name: digest for part in parts for name, digest in part.items()}
            (temporary / STATE).write_text(sealed({"step": step, **state, "files": dict(sorted(digests.items()))}))
            flush(temporary / STATE)
            flush(temporary, recursive=False)
            self.flush_log()
            remove(path)
            temporary.replace(path)
            flush(self.folder, recursive=False)
            self._remove_others(step)

        try:
            self._together(write)
            parts = self.peers.exchange(files)
            self._together(publish)
        except OSError as error:
            if not is_full(error):
                raise
            needed = sum(len(snapshot.body) for snapshot in self.snapshots.values())
            raise no_space(self.folder, f"the checkpoint of step {step}", needed, _way_on(self.folder)) from error
        finally:
            if self.peers.process == 0:
                with suppress(OSError):  # the disk that refused the file may also refuse to remove it
                    remove(temporary)

    def _together(self, work: Callable[[], object]) -> None:
        """Do the work of this process. Raise if that of any process fails."""
        own = None
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the other processes wait for the result
            own = error
        result = None if own is None else (getattr(own, "errno", None), f"{type(own).__name__}: {own}")
        results = self.peers.exchange(result)
        if own is not None:
            raise own
        for process, failure in enumerate(results):
            if failure is not None:
                number, message = failure
                raise OSError(number or errno.EIO, f"Process {process} could not write its part: {message}")

    def _remove_others(self, step: int) -> None:
        steps = checkpoint_steps(self.folder)
        older, newer = [other for other in steps if other < step], [other for other in steps if other > step]
        for other in [*newer, *(older[: -(self.keep - 1)] if self.keep > 1 else older)]:
            shutil.rmtree(checkpoint_path(self.folder, other))


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
