"""A studio that is still being set up, so that the page can be opened while the model is loaded. Free of torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from rectified_diffusers.demo.answers import Comparison

if TYPE_CHECKING:
    from rectified_diffusers.demo.studio import Studio

SWITCH_SECONDS = 5e-4  # between Python's threads while importing: a page is a hundred files, a few switches each


class ComingStudio:
    """Stands for a `Studio`: tells at once what the page shows of it; whoever asks for more waits until it is there.

    Args:
        name: of the model.
        comparison: what is drawn beside it.
        can_sketch: whether it has a ControlNet.
    """

    def __init__(self, name: str, comparison: Comparison, *, can_sketch: bool) -> None:
        self.name = name
        self.comparison = comparison
        self.can_sketch = can_sketch
        self._future: Future[Studio] = Future()

    def set_up(self, make: Callable[[], Studio]) -> None:
        """Make the studio in this thread while others wait; its error is theirs, too."""
        try:
            with _polite_to_threads():
                studio = make()
        except BaseException as error:
            self._future.set_exception(error)
            raise
        self._future.set_result(studio)

    def about(self) -> str:
        return self._future.result().about() if self._future.done() else f"{self.name} · is being loaded"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self._future.result(), name)


AnyStudio: TypeAlias = "Studio | ComingStudio"


@contextmanager
def _polite_to_threads() -> Iterator[None]:
    """Let the threads that serve the page have their turn sooner than after Python's five milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
