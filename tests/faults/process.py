"""Our commands in processes that can be harmed, forked from one that has torch loaded: a try takes a second."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

ENDED_WELL = 0
REFUSED = 2
HUNG = 124
PROC = Path("/proc")
_FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else multiprocessing
# tqdm's own lock belongs to a process and all its forks: one that is killed while it has it keeps it for ever.
tqdm.set_lock(threading.RLock())


class Command:
    """`rectified-diffusers ARGUMENTS` in a fork that does `prepare` first and writes to the file `stderr`.

    Args:
        processes: if more than one, the fork is the launcher of that many.
    """

    def __init__(
        self, arguments: Sequence[str], stderr: Path, prepare: Callable[[], object] = lambda: None, processes: int = 1
    ) -> None:
        self.stderr, self.began = stderr, time.monotonic()
        stderr.touch()
        self.process = _FORK.Process(target=_run, args=(list(arguments), stderr, prepare, processes))
        self.process.start()

    def wait(self, seconds: float = 300.0) -> int | None:
        """Wait for the end and return the exit code, negative after a signal; None if it takes longer."""
        self.process.join(seconds)
        return self.process.exitcode

    def work(self, seconds: float) -> int | None:
        """Wait as `wait` does until the processor has worked so long for it, however busy the machine is."""
        deadline = time.monotonic() + 300.0
        while self.process.exitcode is None and self.busy() < seconds and time.monotonic() < deadline:
            self.process.join(0.002)
        return self.process.exitcode

    def finish(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and the last line of stderr. Kill a process that no longer works."""
        worked, deadline = -1.0, time.monotonic() + 3600.0
        while (code := self.wait()) is None:  # a busy machine may leave it little time
            before, worked = worked, self.busy()
            if worked - before < 1 or time.monotonic() > deadline:
                self.kill()
                return HUNG, f"it did not end after {worked:.0f} s of work; it said: {self.error()}"
        return code, self.error()

    def busy(self) -> float:
        """Return the processor time in seconds, or the elapsed time where the system does not count it."""
        nanoseconds = []
        for pid in (self.process.pid, *self.children()):
            for thread in PROC.glob(f"{pid}/task/*/schedstat"):
                try:
                    nanoseconds.append(int(thread.read_text().split()[0]))
                except (OSError, IndexError):  # it ended meanwhile
                    continue
        return sum(nanoseconds) / 1e9 if nanoseconds else time.monotonic() - self.began

    def children(self) -> list[int]:
        """List the processes that a launcher started."""
        try:
            return [
                int(pid) for pid in (PROC / f"{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            ]
        except OSError:
            return []

    def kill(self) -> None:
        """End it with SIGKILL, which no program can catch."""
        for pid in self.children():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()

    def error(self) -> str:
        """Return the last line that it wrote to stderr: the error, if it ended in one."""
        lines = self.stderr.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
        return lines[-1] if lines else ""


def _run(arguments: list[str], stderr: Path, prepare: Callable[[], object], processes: int) -> None:
    descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    # Not the parent's objects, behind which pytest may have put files of its own.
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
    tqdm.set_lock(threading.RLock())  # another thread may have had that one at the fork
    prepare()
    sys.exit(_launch(arguments, processes) if processes > 1 else _command(arguments))


def _command(arguments: list[str]) -> int:
    from accelerate.state import AcceleratorState, GradientState

    from rectified_diffusers.cli import main

    # Not the parent's, which has one process: one of pytest's tests may have made it.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return main(arguments)


def _launch(arguments: list[str], processes: int) -> int:
    """Run a command on several processes by accelerate's own launcher for the CPU, which ends all if one dies.

    Not by torch.distributed.launcher: it waits without end for a process that is killed after its work is done.
    """
    from accelerate import debug_launcher
    from torch.multiprocessing import ProcessExitedException

    try:
        debug_launcher(_worker, (arguments,), processes)
    except ProcessExitedException as error:
        return error.exit_code
    return ENDED_WELL


def _worker(arguments: list[str]) -> None:
    if code := _command(arguments):
        sys.exit(code)
