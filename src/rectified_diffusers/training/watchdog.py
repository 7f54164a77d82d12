"""A message from each process that stands still: in a training on several processes, one that stops stops all."""

import logging
import threading
import time
from types import TracebackType

logger = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds in one stage until the first message; it doubles with each


class Watchdog:
    """Log a warning for as long as a process stays in one stage of the training, inside a `with` block.

    Without it, processes that wait for one that is dead or slow are silent until the process group's time limit, whose
    error does not say what the others were doing.

    Args:
        process: index of this process, and `count`, the number of all. One process alone waits for no other.
    """

    def __init__(self, process: int, count: int) -> None:
        self.process, self.count = process, count
        self.end = threading.Event()
        self.enter("start")

    def enter(self, stage: str) -> None:
        """Begin a stage of the training, which the messages name."""
        self.state = stage, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.count > 1:
            threading.Thread(target=self._watch, args=(self.end,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end.set()
        self.end = threading.Event()  # of the next block

    def _watch(self, end: threading.Event) -> None:
        watched, patience = self.state, PATIENCE
        while not end.wait(min(PATIENCE, 5.0)):
            if self.state != watched:
                watched, patience = self.state, PATIENCE
            stage, since = watched
            if (elapsed := time.monotonic() - since) > patience:
                patience *= 2
                logger.warning(
                    "Process %d of %d has been in one stage for %.0f s: %s. It works, or waits for a process whose "
                    "message names another stage or which sends none because it has ended.",
                    *(self.process + 1, self.count, elapsed, stage),
                )
