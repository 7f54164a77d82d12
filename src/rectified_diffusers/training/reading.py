"""Read the triplets of the coming micro-batches in other processes, so that a step does not wait for the disk."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Dataset

from rectified_diffusers.data.dataset import TripletDataset, Triplets

_GPU_WORKERS = 4
_Batch = tuple[list[int], Triplets | Exception]
_TORCH_ERROR = "DataLoader worker"  # how torch's error for a worker that was killed begins


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
        """Read batches of rows ahead, in their order, until the end of the block.

        Raises:
            ChildProcessError: a worker was killed; torch raises it wherever the training is.
        """
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
        )
        try:
            self.batches = iter(loader)
            yield
        except RuntimeError as error:
            if not str(error).startswith(_TORCH_ERROR):
                raise
            raise self._stopped(error) from error
        finally:
            self.batches, self.next = iter(()), None  # which stops the workers

    def _stopped(self, error: Exception) -> ChildProcessError:
        return ChildProcessError(
            f"A process that read triplets of {self.dataset.place} ahead was stopped: {str(error).strip()} "
            "Run the same again to go on; if memory or /dev/shm is short, lower num_workers."
        )

    def rows(self, rows: list[int]) -> Triplets:
        """Return triplets by their rows: those read ahead if they are the next ones, else read now."""
        try:
            self.next = self.next or next(self.batches, None)
        except (ConnectionError, EOFError) as error:
            if "DataLoader worker" in str(error):  # of the reading itself
                raise
            raise self._stopped(error) from error  # the worker ended while it handed over a batch
        if self.next is None or self.next[0] != rows:
            return self.dataset.rows(rows)
        (_, read), self.next = self.next, None
        if isinstance(read, Exception):
            raise read
        return read


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
