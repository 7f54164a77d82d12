"""Our commands in processes that can be harmed, forked from one that has torch loaded: a try takes a second."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

ENDED_WELL = 0
REFUSED = 2
HUNG = 124
PROC = Path("/proc")
# tqdm's own lock belongs to a process and all its forks: one that is killed while it has it keeps it for ever.
tqdm.set_lock(threading.RLock())


@dataclass
class Command:
    """A command on its way in a child process, with what it writes going to files."""

    pid: int
    stderr: Path
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls, arguments: Sequence[str], stderr: Path, prepare: Callable[[], object] = lambda: None, processes: int = 1
    ) -> "Command":
        """Fork a child that does `prepare` and runs `rectified-diffusers ARGUMENTS`.

        Args:
            processes: if more than one, the child is the launcher of that many.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _run(arguments, stderr, prepare, processes)
        return cls(pid, stderr)

    def wait(self, seconds: float = 300.0) -> int | None:
        """Wait for the end and return the exit code, negative after a signal; None if it takes longer."""
        deadline = time.monotonic() + seconds
        return self._wait_while(lambda: time.monotonic() < deadline)

    def work(self, seconds: float) -> int | None:
        """Wait as `wait` does until the processor has worked so long for it, however busy the machine is."""
        deadline = time.monotonic() + 300.0
        return self._wait_while(lambda: self.busy() < seconds and time.monotonic() < deadline)

    def finish(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and the last line of stderr. Kill a process that does not end."""
        code = self.wait()
        if code is None:
            self.kill()
            return HUNG, f"it did not end; it said: {self.error()}"
        return code, self.error()

    def busy(self) -> float:
        """Return the processor time in seconds, or the elapsed time where the system does not count it."""
        nanoseconds = []
        for pid in (self.pid, *self.children()):
            for thread in PROC.glob(f"{pid}/task/*/schedstat"):
                try:
                    nanoseconds.append(int(thread.read_text().split()[0]))
                except (OSError, IndexError):  # it ended meanwhile
                    continue
        return sum(nanoseconds) / 1e9 if nanoseconds else time.monotonic() - self.began

    def children(self) -> list[int]:
        """List the processes that a launcher started."""
        try:
            return [int(pid) for pid in (PROC / f"{self.pid}/task/{self.pid}/children").read_text().split()]
        except OSError:
            return []

    def kill(self) -> None:
        """End it with SIGKILL, which no program can catch."""
        for pid in (*self.children(), self.pid):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def said(self) -> str:
        """Return what it wrote to stderr; its last line is the error, if it ended in one."""
        return self.stderr.read_text(errors="replace")

    def error(self) -> str:
        lines = self.said().replace("\r", "\n").strip().splitlines()
        return lines[-1] if lines else ""

    def _wait_while(self, waiting: Callable[[], bool]) -> int | None:
        while waiting():
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None


def _run(arguments: Sequence[str], stderr: Path, prepare: Callable[[], object], processes: int) -> None:
    """Be the child: never returns to the caller's stack, so that no cleanup of the parent runs twice."""
    code = 70
    try:
        descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        # Not the parent's objects, behind which pytest may have put files of its own.
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        tqdm.set_lock(threading.RLock())  # another thread may have had that one at the fork
        prepare()
        code = _launch(arguments, processes) if processes > 1 else _command(list(arguments))
    finally:
        # The exception, if there is one, ends here: beyond is the stack of the parent.
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def _command(arguments: list[str]) -> int:
    from accelerate.state import AcceleratorState, GradientState

    from rectified_diffusers.cli import main

    # Not the parent's, which has one process: one of pytest's tests may have made it.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return main(arguments)


def _launch(arguments: Sequence[str], processes: int) -> int:
    """Run a command on several processes by accelerate's own launcher for the CPU, which ends all if one dies.

    Not by torch.distributed.launcher: a process that is killed when it has done its work, and waits for the others
    there, leaves that waiting for ever.
    """
    from accelerate import debug_launcher
    from torch.multiprocessing import ProcessExitedException

    try:
        debug_launcher(_worker, (list(arguments),), processes)
    except ProcessExitedException as error:
        return error.exit_code
    return ENDED_WELL


def _worker(arguments: list[str]) -> None:
    if code := _command(arguments):
        sys.exit(code)
