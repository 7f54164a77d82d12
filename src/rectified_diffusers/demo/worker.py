"""Run the studio in a separate process that is started in advance and ends with the page."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.managers import BaseManager, BaseProxy
from typing import TYPE_CHECKING, Any, TypeAlias

from rectified_diffusers.demo.requests import Comparison

if TYPE_CHECKING:
    from rectified_diffusers.demo.studio import Studio


class LoadingStudio:
    """Stand-in for a `Studio` that is loading. It has what the page shows; any other access waits for the studio.

    If loading fails, every waiting caller gets the error.
    """

    def __init__(self, name: str, comparison: Comparison, studio: Future[Studio], *, can_sketch: bool) -> None:
        self.name = name
        self.comparison = comparison
        self.can_sketch = can_sketch
        self._studio = studio

    def about(self) -> str:
        return self._studio.result().about() if self._studio.done() else f"{self.name} · loading"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # looked up on a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self._studio.result(), name)


AnyStudio: TypeAlias = "Studio | LoadingStudio"

POLL_SECONDS = 0.5  # interval between checks that the process is alive


class StudioProcess:
    """Create a studio in another process. Use it as a context manager, whose exit ends the process.

    Args:
        make: creates the studio in the other process. It is sent there, so it must be a module-level function or a
            `functools.partial` of one.

    Attributes:
        studio: future of a proxy that calls the studio from any thread, or the error that `make` raised.
    """

    studio: Future[Studio]

    def __init__(self, make: Callable[[], Studio]) -> None:
        self._make = make
        # A forked process would have the locks of threads without the threads, and no CUDA.
        self._manager = _Manager(ctx=multiprocessing.get_context("spawn"))

    def __enter__(self) -> StudioProcess:
        others = multiprocessing.active_children()
        with _ctrl_c_later():  # the manager's own finalizer then ends the process
            self._manager.start(_end_with_the_parent)
        (self._process,) = set(multiprocessing.active_children()) - set(others)
        thread = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self.studio = thread.submit(self._load)
        thread.shutdown(wait=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.shutdown()

    def wait(self) -> None:
        """Wait until the process ends. It does not end by itself.

        Raises:
            ChildProcessError: the process has ended.
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
            f"the process that generates images has ended (exit code {code}); -9 usually means a lack of memory. "
            "Start the page again, with a smaller model or --dtype float16 if needed."
        )


class _Maker:
    """Has one method, which creates a studio: a manager reports the type of an error only for methods."""

    def make(self, make: Callable[[], Studio]) -> Studio:
        try:
            return make()
        except Exception as error:  # noqa: BLE001 (it is raised in the parent process)
            raise _Failure(error, traceback.format_exc()) from None


class _Failure(Exception):
    """Transfers an error of `make` and its traceback, so that it is not mistaken for a connection error."""

    def __init__(self, error: Exception, trace: str) -> None:
        super().__init__(error, trace)
        self.error = error
        self._trace = trace

    def __str__(self) -> str:
        return f"in the process that generates images:\n{self._trace}"


class _Images(BaseProxy):
    """Proxy of an iterator in the other process, which is closed when this proxy is no longer referenced."""

    _exposed_ = ("__next__",)

    def __iter__(self) -> _Images:
        return self

    def __next__(self) -> Any:
        return self._callmethod("__next__")


class _Manager(BaseManager):
    maker: Callable[[], Any]


_Manager.register("maker", _Maker, method_to_typeid={"make": "studio"})
_Manager.register("studio", create_method=False, method_to_typeid={"compare": "images", "morph": "images"})
_Manager.register("images", proxytype=_Images, create_method=False)


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Block Ctrl-C inside the context, and permanently in processes started there.

    A partly started process would respond to it with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    resource_tracker.ensure_running()  # it unblocks signals when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_parent() -> None:
    """Make this process exit when its parent ends, even if the parent was killed and could not end it."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)
