"""Divide shards among processes and jobs that share only a folder: each makes the shards that it has claimed."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rectified_diffusers.files import TEMPORARY

BEAT = 10.0  # seconds between two heartbeats of a claim
STALE = 120.0  # seconds without one after which a claim is that of a killed process; NFS may show a beat a minute late


class Claims:
    """Claims on the shards of a folder: files whose time of change is set again and again while the shard is made.

    The claims of a killed process end when no other process writes to the folder, see `remove_leftovers`, or `STALE`
    seconds later. Claims only save work: a shard that two processes make is the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[int, tuple[int, float]] = {}  # by shard: a claim's time of change, and since when we saw it

    @contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Claim a shard until the end of the block; yield whether it was free."""
        path = self.folder / f"{TEMPORARY}claim-{shard:05d}"
        if not self._take(path, shard):
            yield False
            return
        end = threading.Event()
        beating = threading.Thread(target=_beat, args=(path, end), daemon=True)
        beating.start()
        try:
            yield True
        finally:
            end.set()
            beating.join()
            path.unlink(missing_ok=True)

    def _take(self, path: Path, shard: int) -> bool:
        """Create the file of a claim; return False if another process has it and lives."""
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return self._is_stale(path, shard) and self._take(path, shard)
        return True

    def _is_stale(self, path: Path, shard: int) -> bool:
        """Remove a claim that has not changed for `STALE` seconds of our clock; the writer's may differ."""
        try:
            changed = path.stat().st_mtime_ns
        except FileNotFoundError:  # it has just ended
            return False
        seen, since = self.seen.setdefault(shard, (changed, time.monotonic()))
        if seen != changed:
            self.seen[shard] = changed, time.monotonic()
            return False
        if time.monotonic() - since < STALE:
            return False
        del self.seen[shard]
        path.unlink(missing_ok=True)
        return True


def _beat(path: Path, end: threading.Event) -> None:
    """Set the time of change of a claim until its end."""
    while not end.wait(BEAT):
        with suppress(OSError):
            os.utime(path)
