"""Read the triplets of the coming micro-batches in other processes, so that a step does not wait for the disk."""

import copy
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import BaseContext
from multiprocessing.sharedctypes import RawValue
from types import FrameType

import torch
from torch.utils.data import DataLoader, Dataset

from rectified_diffusers.data.dataset import TripletDataset, Triplets

_GPU_WORKERS = 4
_Batch = tuple[list[int], Triplets | Exception]
_KILLED, _READING = "DataLoader worker", "Caught "  # how torch's errors of a killed worker and of the reading begin


def default_workers(device: torch.device) -> int:
    """Return the number of reading processes for a device: a CPU has no time for them beside its training."""
    return 0 if device.type == "cpu" else min(_GPU_WORKERS, os.cpu_count() or 1)


class RowReader:
    """Read rows of a dataset; inside a block `ahead`, worker processes have read them already.

    What is read is a function of the rows alone, so the number of workers changes no result.

    Args:
        workers: number of processes; 0 reads when `rows` is called, None chooses by the device.
        device: where the triplets will be copied; for a GPU, they are read to pinned memory.
    """

    def __init__(self, dataset: TripletDataset, workers: int | None, device: torch.device) -> None:
        self.dataset, self.device = dataset, device
        self.workers = default_workers(device) if workers is None else workers
        self.batches: Iterator[_Batch] = iter(())
        self.next: _Batch | None = None

    @contextmanager
    def ahead(self, batches: Iterable[list[int]]) -> Iterator[None]:
        """Read batches of rows ahead, in their order, until the end of the block."""
        if not self.workers:
            yield
            return
        loader = DataLoader(
            _Batches(self.dataset),
            batch_size=None,
            sampler=batches,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the loader takes a number from it, which must not come from the global one
            multiprocessing_context=_context(),
        )
        self.batches = iter(loader)
        with _deaths_raise_in_no_signal():
            try:
                yield
            finally:
                self.batches, self.next = iter(()), None  # which stops the workers

    def rows(self, rows: list[int]) -> Triplets:
        """Return triplets by their rows: those read ahead if they are the next ones, else read now.

        Raises:
            ChildProcessError: a worker was killed.
        """
        try:
            self.next = self.next or next(self.batches, None)
            stopped = None
        except (ConnectionError, EOFError, RuntimeError) as error:  # the first two: while it handed over a batch
            stopped = str(error).strip()
            if stopped.startswith(_READING) or (isinstance(error, RuntimeError) and not stopped.startswith(_KILLED)):
                raise
        if stopped is not None:  # raised here and not above: torch's error would keep the other workers
            raise ChildProcessError(
                f"A process that read triplets of {self.dataset.place} ahead was stopped: {stopped} "
                "Run the same again to go on; if memory or /dev/shm is short, lower num_workers."
            )
        if self.next is None or self.next[0] != rows:
            return self.dataset.rows(rows)
        (_, read), self.next = self.next, None
        if isinstance(read, Exception):
            raise read
        return read


@contextmanager
def _deaths_raise_in_no_signal() -> Iterator[None]:
    """Let torch raise the death of a worker only where the next batch is asked for, at most five seconds later.

    Its handler of SIGCHLD would raise wherever the training is: at the end of a `no_grad`, for example, which then
    stays in force.
    """
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    raising = handler

    def quiet(number: int, frame: FrameType | None) -> None:
        with suppress(RuntimeError):
            raising(number, frame)

    signal.signal(signal.SIGCHLD, quiet)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


class _Flag:
    """A `multiprocessing.Event` without the lock, which a killed process may hold for ever."""

    def __init__(self) -> None:
        self.value = RawValue(ctypes.c_bool)

    def set(self) -> None:
        self.value.value = True

    def is_set(self) -> bool:
        return self.value.value


def _context() -> BaseContext:
    """Return the default way to start processes, with events that no killed process can block."""
    context = copy.copy(multiprocessing.get_context())
    context.Event = _Flag  # pyright: ignore[reportAttributeAccessIssue]
    return context


class _Batches(Dataset):
    """Batches of rows of a dataset as torch's loader gets them: with an error in place of the rows that it concerns.

    torch would add the traceback of the worker to its message.
    """

    def __init__(self, dataset: TripletDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, rows: list[int]) -> _Batch:
        try:
            return rows, self.dataset.rows(rows)
        except (ValueError, OSError) as error:
            return rows, error
