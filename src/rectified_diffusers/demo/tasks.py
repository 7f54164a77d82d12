"""Run long tasks that are observed while they run and stop soon after their observer has gone."""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


class Stopped(Exception):
    """Raised inside a task when its observer has gone."""


def watch(work: Callable[[Callable[[T], None]], None]) -> Iterator[T]:
    """Run `work(emit)` in a separate thread and yield the items that it emits; raise its error, if any, at the end.

    Closing the iterator stops the work: its next `emit` raises `Stopped`. After a visitor presses Stop or leaves the
    page, the model therefore runs at most one more step.
    """
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    closed = threading.Event()

    def emit(item: T) -> None:
        if closed.is_set():
            raise Stopped
        items.put(item)

    worker = ThreadPoolExecutor(1, thread_name_prefix="generation")
    future = worker.submit(work, emit)
    worker.shutdown(wait=False)  # the only task is submitted; closing the iterator does not wait for its end
    future.add_done_callback(lambda _: items.put(_END))
    try:
        while (item := items.get()) is not _END:
            yield item
        future.result()
    finally:
        closed.set()


class Requests:
    """Counts the requests of each visitor, so that work for an old request can stop when there is a newer one.

    Args:
        visitors: maximum number of visitors to track. The one with the oldest last request is dropped.
    """

    def __init__(self, visitors: int = 1024) -> None:
        self._visitors = visitors
        self._counts: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def record(self, visitor: str, request: object = None, *, may_repeat: bool = False) -> None:
        """Record a newer request, or that the visitor wants nothing more.

        Args:
            may_repeat: whether a request equal to the last one is a repetition of it, and not a newer request.
        """
        key = hash(repr(request))  # the request itself can be long
        with self._lock:
            count, last = self._counts.pop(visitor, (0, 0))
            is_newer = not (may_repeat and count and key == last)
            self._counts[visitor] = count + is_newer, key
            if len(self._counts) > self._visitors:
                self._counts.popitem(last=False)

    def while_current(self, visitor: str, items: Iterable[T]) -> Iterator[T]:
        """Yield items until the visitor has a newer request."""
        count = self._count(visitor)
        for item in items:
            if self._count(visitor) != count:
                return
            yield item

    def _count(self, visitor: str) -> int:
        return self._counts.get(visitor, (0, 0))[0]
