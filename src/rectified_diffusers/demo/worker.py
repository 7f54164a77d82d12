"""The studio in a process of its own: started ahead, waited for, and ended with the page."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeAlias

from rectified_diffusers.demo.requests import Comparison

if TYPE_CHECKING:
    from rectified_diffusers.demo.studio import Studio


import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.managers import BaseManager, BaseProxy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rectified_diffusers.demo.studio import Studio


class ComingStudio:
    """Stands for a `Studio`: tells at once what the page shows of it; whoever asks for more waits until it is there.

    Args:
        name: of the model.
        comparison: what is drawn beside it.
        studio: the studio to be; if it fails, its error is everyone's who waits.
        can_sketch: whether it has a ControlNet.
    """

    def __init__(self, name: str, comparison: Comparison, studio: Future[Studio], *, can_sketch: bool) -> None:
        self.name = name
        self.comparison = comparison
        self.can_sketch = can_sketch
        self._studio = studio

    def about(self) -> str:
        return self._studio.result().about() if self._studio.done() else f"{self.name} · is being loaded"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self._studio.result(), name)


AnyStudio: TypeAlias = "Studio | ComingStudio"

POLL_SECONDS = 0.5  # between two looks whether the process is alive


class StudioProcess:
    """Makes a studio in another process; to be used in a `with`, whose end is the process's end.

    Args:
        make: makes the studio there, so it is sent there: a function of a module, or a `functools.partial` of one.

    Attributes:
        studio: a stand-in that calls the studio, from any thread; or what `make` raised.
    """

    studio: Future[Studio]

    def __init__(self, make: Callable[[], Studio]) -> None:
        self._make = make
        # Forked, it would have the threads' locks without the threads, and no CUDA.
        self._manager = _Manager(ctx=multiprocessing.get_context("spawn"))

    def __enter__(self) -> StudioProcess:
        others = multiprocessing.active_children()
        with _ctrl_c_later():  # which then ends the process by the manager's own finalizer
            self._manager.start(_end_with_the_parent)
        (self._process,) = set(multiprocessing.active_children()) - set(others)
        thread = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self.studio = thread.submit(self._load)
        thread.shutdown(wait=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.shutdown()

    def wait(self) -> None:
        """Wait until the process ends, which it does not by itself.

        Raises:
            ChildProcessError: it has ended.
        """
        while self._process.is_alive():
            self._process.join(POLL_SECONDS)
        raise self._ended()

    def _load(self) -> Studio:
        try:
            return self._manager.maker().make(self._make)
        except _Failure as failure:
            raise failure.error from failure
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise self._ended() from error

    def _ended(self) -> ChildProcessError:
        code = self._process.exitcode
        return ChildProcessError(
            f"the process that draws has ended (exit code {code}); -9 is mostly a lack of memory. "
            "Start the page again, if need be with a smaller model or --dtype float16."
        )


class _Maker:
    """Has the one method that makes a studio: a manager tells the type of an error of a method alone."""

    def make(self, make: Callable[[], Studio]) -> Studio:
        try:
            return make()
        except Exception as error:  # noqa: BLE001 (it is raised over there)
            raise _Failure(error, traceback.format_exc()) from None


class _Failure(Exception):
    """Brings an error of the making over, so that none is taken for one of the connection, and its traceback."""

    def __init__(self, error: Exception, told: str) -> None:
        super().__init__(error, told)
        self.error = error
        self._told = told

    def __str__(self) -> str:
        return f"in the process that draws:\n{self._told}"


class _Pictures(BaseProxy):
    """Stands for an iterator over there, which is closed when nobody holds this any more."""

    _exposed_ = ("__next__",)

    def __iter__(self) -> _Pictures:
        return self

    def __next__(self) -> Any:
        return self._callmethod("__next__")


class _Manager(BaseManager):
    maker: Callable[[], Any]


_Manager.register("maker", _Maker, method_to_typeid={"make": "studio"})
_Manager.register("studio", create_method=False, method_to_typeid={"compare": "pictures", "morph": "pictures"})
_Manager.register("pictures", proxytype=_Pictures, create_method=False)


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Hold Ctrl-C back, from a process started inside for good: half started, it answers with a traceback."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    resource_tracker.ensure_running()  # which lets signals through when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_parent() -> None:
    """See to it that this process does not outlive one that was killed and could not end it."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)
