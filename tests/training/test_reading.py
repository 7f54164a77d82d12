"""Reading ahead in worker processes: the same bytes for any number of them, and clear errors."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from rectified_diffusers.data.dataset import JoinedTriplets, TripletDataset
from rectified_diffusers.files import lock
from rectified_diffusers.training import reading
from rectified_diffusers.training.reading import RowReader, default_workers
from tests.training.helpers import digests, make_dataset, make_trainer

CPU = torch.device("cpu")


def train(method: str, dataset: TripletDataset, folder: Path, **options: Any) -> dict[str, str]:
    """Train and return the digests of all files."""
    make_trainer(method, dataset, folder, seed=3, **options).train()
    return digests(folder)


def only_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every read of this process fail during the steps."""
    ahead, read, process = RowReader.ahead, TripletDataset.rows, os.getpid()

    def rows(dataset: TripletDataset, indices: Any) -> Any:
        assert os.getpid() != process, "a step read its rows itself"
        return read(dataset, indices)

    @contextmanager
    def ahead_alone(reader: RowReader, batches: Any) -> Iterator[None]:
        with monkeypatch.context() as patch, ahead(reader, batches):
            patch.setattr(TripletDataset, "rows", rows)
            yield

    monkeypatch.setattr(RowReader, "ahead", ahead_alone)


@pytest.mark.parametrize(
    "method", ["reflow", *(pytest.param(method, marks=pytest.mark.slow) for method in ("progressive", "dmd"))]
)
def test_the_number_of_workers_changes_no_file(
    method: str, dataset: TripletDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"micro_batch_size": 3, "gradient_checkpointing": False}
    if method == "dmd":
        options["first_fake_updates"] = 2
    expected = train(method, dataset, tmp_path / "0", **options)
    only_ahead(monkeypatch)
    state = torch.get_rng_state()
    assert train(method, dataset, tmp_path / "2", num_workers=2, **options) == expected
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_workers(dataset: TripletDataset, tmp_path: Path) -> None:
    expected = train("reflow", dataset, tmp_path / "whole")
    train("reflow", dataset, tmp_path / "run", num_workers=2, max_steps=2)
    assert train("reflow", dataset, tmp_path / "run", num_workers=1) == expected


def test_rows_are_read_ahead_in_order_and_others_at_once(dataset: TripletDataset) -> None:
    reader, joined = RowReader(dataset, 2, CPU), JoinedTriplets([dataset.folder, dataset.folder])
    batches = [[3, 0], [1], [2, 2, 2], [0]]
    with reader.ahead(batches):
        for rows in ([3, 0], [1, 1], [1], [2, 2, 2], [0], [3]):
            assert torch.equal(reader.rows(rows).data, dataset.rows(rows).data)
            assert reader.rows([2]).prompts == dataset.rows([2]).prompts
    assert reader.rows([3]).prompts == dataset.rows([3]).prompts
    reader = RowReader(joined, 1, CPU)
    with reader.ahead([[7, 1]]):
        assert torch.equal(reader.rows([7, 1]).noise, joined.rows([7, 1]).noise)


def test_an_error_in_a_worker_is_that_of_reading(tmp_path: Path) -> None:
    own = make_dataset(tmp_path)
    path = tmp_path / "shard-00000.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    messages, words = [], f"Row 3 of {path} fails its checksum"
    for workers in (0, 1):
        reader = RowReader(own, workers, CPU)
        with reader.ahead([[0], [3]]):
            assert len(reader.rows([0])) == 1
            with pytest.raises(ValueError, match=words) as caught:
                reader.rows([3])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_killed_worker_is_one_error_that_names_the_triplets(dataset: TripletDataset, tmp_path: Path) -> None:
    """And only where rows are read: not in a step's `no_grad`, which would stay in force."""
    trainer = make_trainer("reflow", dataset, tmp_path, num_workers=2, max_steps=1000)
    train_step, workers, handlers = trainer.train_step, [], []

    def kill(step: int) -> tuple[float, ...]:
        if step == 3:
            handlers.append(signal.getsignal(signal.SIGCHLD))
            workers.extend(trainer.reader.batches._workers)  # pyright: ignore
            os.kill(workers[0].pid, signal.SIGKILL)
            workers[0].join()  # its death is known, and raises nothing here
        return train_step(step)

    trainer.train_step = kill
    words = rf"read triplets of {dataset.folder} ahead was stopped: .*num_workers"
    with pytest.raises(ChildProcessError, match=words) as caught:
        trainer.train()
    assert caught.value.__context__ is None
    assert torch.is_grad_enabled()
    assert not any(worker.is_alive() for worker in workers)
    assert signal.getsignal(signal.SIGCHLD) not in handlers


@pytest.mark.slow
def test_a_worker_killed_at_the_flag_of_all_workers_blocks_nobody(
    dataset: TripletDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch sets the flag to stop the workers; with a lock, which dies with its worker, it would wait for ever."""
    is_set, process = reading._Flag.is_set, os.getpid()

    def die(flag: reading._Flag) -> bool:
        if os.getpid() != process:
            os.kill(os.getpid(), signal.SIGKILL)
        return is_set(flag)

    monkeypatch.setattr(reading._Flag, "is_set", die)
    reader = RowReader(dataset, 2, CPU)
    with pytest.raises(ChildProcessError, match="num_workers"), reader.ahead([[0], [1]]):
        reader.rows([0])


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_killed_while_it_hands_over_a_batch_is_that_error_too(
    dataset: TripletDataset, error: Exception
) -> None:
    """It depends on the moment of the kill whether torch notices first."""

    def batches() -> Iterator[Any]:
        raise error
        yield

    reader = RowReader(dataset, 1, CPU)
    reader.batches = batches()
    with pytest.raises(ChildProcessError, match=r"ahead was stopped: .*num_workers"):
        reader.rows([0])


def test_other_errors_within_the_block_are_kept(dataset: TripletDataset) -> None:
    with pytest.raises(RuntimeError, match=r"^other$"), RowReader(dataset, 1, CPU).ahead([[0]]):
        raise RuntimeError("other")


def test_workers_do_not_keep_the_lock_of_a_killed_run(tmp_path: Path) -> None:
    ready, go = os.pipe(), os.pipe()
    with lock(tmp_path) as held:
        assert held
        if (child := os.fork()) == 0:
            os.write(ready[1], b"1")
            os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    with lock(tmp_path) as held:
        assert held, "the forked process lives and has no part in the lock"
    os.write(go[1], b"1")
    os.waitpid(child, 0)


def test_a_cpu_reads_within_the_step() -> None:
    assert default_workers(CPU) == 0
    assert 1 <= default_workers(torch.device("cuda")) <= 4


def test_pinned_batches_are_complete(dataset: TripletDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: (pinned.append(self), self.clone())[1])
    read = dataset.rows([1, 2])
    rows, copied = pin_memory(([1, 2], read))
    assert rows == [1, 2]
    assert copied.prompts == read.prompts
    assert torch.equal(copied.noise, read.noise)
    assert torch.equal(copied.data, read.data)
    assert len(pinned) == 2
