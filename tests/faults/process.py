"""Our commands in processes that can be harmed, forked from one that has torch loaded: a try takes a second."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ENDED_WELL = 0
REFUSED = 2


@dataclass
class Command:
    """A command on its way in a child process, with what it writes going to files."""

    pid: int
    stderr: Path

    @classmethod
    def start(cls, arguments: Sequence[str], stderr: Path, prepare: Callable[[], object] = lambda: None) -> "Command":
        """Fork a child that does `prepare` and runs `rectified-diffusers ARGUMENTS`."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _run(arguments, stderr, prepare)
        return cls(pid, stderr)

    def wait(self, seconds: float = 300.0) -> int | None:
        """Wait for the end and give the exit code, negative after a signal; None if it takes longer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None

    def kill(self) -> None:
        """End it with SIGKILL, which no program can catch."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def said(self) -> str:
        """Give what it wrote to stderr; its last line is the error, if it ended in one."""
        return self.stderr.read_text(errors="replace")

    def error(self) -> str:
        lines = self.said().replace("\r", "\n").strip().splitlines()
        return lines[-1] if lines else ""


def run(arguments: Sequence[str], stderr: Path, prepare: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """Run a command to its end; give exit code and last line of stderr."""
    command = Command.start(arguments, stderr, prepare)
    code = command.wait()
    if code is None:
        command.kill()
        raise TimeoutError(f"{' '.join(arguments)} did not end; it said: {command.error()}")
    return code, command.error()


def _run(arguments: Sequence[str], stderr: Path, prepare: Callable[[], object]) -> None:
    """Be the child: never returns to the caller's stack, so that no cleanup of the parent runs twice."""
    code = 70
    try:
        descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        # Not the parent's objects, behind which pytest may have put files of its own.
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        prepare()
        from rectified_diffusers.cli import main

        code = main(list(arguments))
    finally:
        # The exception, if there is one, ends here: beyond is the stack of the parent.
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
