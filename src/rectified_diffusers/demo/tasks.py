"""Long work that is watched while it runs, and ends soon after nobody watches any more."""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


class Stopped(Exception):
    """Raised inside the work when its watcher has gone."""


def watch(work: Callable[[Callable[[T], None]], None]) -> Iterator[T]:
    """Run `work(emit)` in a thread of its own and yield what it emits; its error, if any, is raised at the end.

    Closing the iterator stops the work: its next `emit` raises `Stopped`. So a page whose visitor pressed Stop or left
    costs at most one more step of the model.
    """
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    closed = threading.Event()

    def emit(item: T) -> None:
        if closed.is_set():
            raise Stopped
        items.put(item)

    worker = ThreadPoolExecutor(1, thread_name_prefix="drawing")
    future = worker.submit(work, emit)
    worker.shutdown(wait=False)  # the one task is in; nobody waits for its end when the iterator is closed
    future.add_done_callback(lambda _: items.put(_END))
    try:
        while (item := items.get()) is not _END:
            yield item
        future.result()
    finally:
        closed.set()


class Wishes:
    """Counts what each visitor has wished for, so that work for an old wish can end when there is a newer one.

    Args:
        visitors: how many are remembered; the one who has wished for nothing the longest is forgotten.
    """

    def __init__(self, visitors: int = 1024) -> None:
        self._visitors = visitors
        self._counts: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def newer(self, visitor: str, wish: object = None, *, may_repeat: bool = False) -> None:
        """Note a newer wish, or that the visitor wants no more.

        Args:
            wish: what is wished for.
            may_repeat: whether one equal to the last is the same one, told once more, and not newer.
        """
        told = hash(repr(wish))  # the wish itself can be long
        with self._lock:
            count, last = self._counts.pop(visitor, (0, 0))
            is_newer = not (may_repeat and count and told == last)
            self._counts[visitor] = count + is_newer, told
            if len(self._counts) > self._visitors:
                self._counts.popitem(last=False)

    def while_current(self, visitor: str, items: Iterable[T]) -> Iterator[T]:
        """Pass items on until the visitor has a newer wish."""
        wish = self._count(visitor)
        for item in items:
            if self._count(visitor) != wish:
                return
            yield item

    def _count(self, visitor: str) -> int:
        return self._counts.get(visitor, (0, 0))[0]
