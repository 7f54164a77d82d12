"""Checkpoints are written in the background, by several processes, and read by another number of them."""

import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from rectified_diffusers.distributed import Peers
from rectified_diffusers.training import checkpoint_writing
from rectified_diffusers.training.checkpoint_reading import (
    STATE,
    StoredCheckpoint,
    checkpoint_path,
    checkpoint_steps,
    sealed,
    unsealed,
)
from rectified_diffusers.training.checkpoint_writing import CheckpointWriter
from rectified_diffusers.training.parts import Part, Snapshot, file_digest, file_of, own_parts, part_name, write_file
from rectified_diffusers.training.trained import load_optimizer_tensors, optimizer_tensors
from tests.training.checkpoints import Checkpoint, read_checkpoint, write_checkpoint

FILE = "unet.safetensors"


def make_tensors() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {f"layer.{i}": torch.randn(i + 1, 3, generator=generator) for i in range(5)}
    tensors |= {"é.step": torch.tensor(3), "half": torch.ones(3).half(), "none": torch.empty(0, 2)}
    return {FILE: tensors, "ema.safetensors": {"codes": torch.arange(5).byte()}}


@dataclass(frozen=True)
class ThreadPeers(Peers):
    """Processes that are threads of this one."""

    barrier: Any = None
    values: list[Any] = field(default_factory=list)

    def exchange(self, value: Any) -> list[Any]:
        self.values[self.process] = value
        self.barrier.wait(20)
        values = list(self.values)
        self.barrier.wait(20)
        return values


def on_threads(count: int, work: Callable[[Peers], Any]) -> list[Any]:
    """Return the result of `work`, or its error, for each of a number of connected peers."""
    barrier, values = threading.Barrier(count), [None] * count

    def run(process: int) -> Any:
        try:
            return work(ThreadPeers(process, count, None, barrier, values))
        except OSError as error:
            return error

    with ThreadPoolExecutor(count) as executor:
        return list(executor.map(run, range(count)))


def save_on(peers: Peers, folder: Path, step: int) -> None:
    with CheckpointWriter(folder, 2, peers, lambda: None) as writer:
        writer.save(step, make_tensors(), {"run": {}})


def test_a_file_is_that_of_safetensors(tmp_path: Path) -> None:
    tensors = make_tensors()[FILE]
    snapshot = Snapshot.of({name: Part(tensor, tuple(tensor.shape)) for name, tensor in tensors.items()})
    digest = write_file(tmp_path / FILE, snapshot)
    assert (tmp_path / FILE).read_bytes() == save(tensors)
    assert digest == file_digest(tmp_path / FILE)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [9, 1, 1, 1, 1], [1, 1, 1, 9], [3, 5, 7, 2, 6, 0]], ids=str)
def test_who_writes_what_does_not_depend_on_the_order(sizes: list[int], count: int) -> None:
    tensors = {
        f"layer.{i}.{entry}": torch.zeros(size, 2) for i, size in enumerate(sizes) for entry in ("exp_avg", "x")
    }
    tensors |= {f"layer.{i}.step": torch.tensor(1.0) for i in range(len(sizes))}
    expected = [list(own_parts(tensors, process, count)) for process in range(count)]
    assert sorted(name for names in expected for name in names) == sorted(tensors)
    for seed in range(20):
        names = random.Random(seed).sample(list(tensors), len(tensors))
        other = {name: tensors[name] for name in names}
        assert [list(own_parts(other, process, count)) for process in range(count)] == expected


@pytest.mark.parametrize("resumed_on", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_resumed_optimizer_writes_the_files_of_one_that_was_not_stopped(
    count: int, resumed_on: int, tmp_path: Path
) -> None:
    """Whatever number of processes wrote what is resumed: the order of the state depends on it."""
    network = torch.nn.Sequential(*(torch.nn.Linear(i + 1, i + 2) for i in range(5)))
    names = [name for name, _ in network.named_parameters()]

    def step(optimizer: torch.optim.Optimizer) -> None:
        for number, weight in enumerate(network.parameters()):
            weight.grad = torch.full_like(weight, number + 1.0)
        optimizer.step()

    def save(peers: Peers, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        with CheckpointWriter(folder, 2, peers, lambda: None) as writer:
            writer.save(1, {FILE: optimizer_tensors(names, optimizer)}, {})

    first, second = (torch.optim.AdamW(network.parameters(), lr=1e-3) for _ in range(2))
    step(first)
    for processes, folder in ((count, "first"), (resumed_on, "stopped")):
        on_threads(processes, lambda peers, folder=folder: save(peers, tmp_path / folder, first))
    stored = StoredCheckpoint(checkpoint_path(tmp_path / "stopped", 1), Peers())
    state = {name: torch.empty(place.shape, dtype=place.dtype) for name, place in stored.tensors(FILE).items()}
    stored.load({FILE: state})
    load_optimizer_tensors(names, second, state)
    assert on_threads(count, lambda peers: save(peers, tmp_path / "second", second)) == [None] * count
    written = [
        {path.name: path.read_bytes() for path in checkpoint_path(tmp_path / folder, 1).iterdir()}
        for folder in ("first", "second")
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_write_parts_of_one_checkpoint(count: int, tmp_path: Path) -> None:
    assert on_threads(count, lambda peers: save_on(peers, tmp_path, 4)) == [None] * count
    path = checkpoint_path(tmp_path, 4)
    sizes = [sum(x.nbytes for x in load_file(path / part_name(FILE, i, count)).values()) for i in range(count)]
    assert max(sizes) <= sum(sizes) / count + 60  # the largest tensor
    found, expected = read_checkpoint(path).tensors, make_tensors()
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert found[file].keys() == tensors.keys()
        assert all(torch.equal(found[file][name], tensor) for name, tensor in tensors.items())
        assert all(found[file][name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_a_part_that_one_process_cannot_write_is_an_error_on_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_threads(2, lambda peers: save_on(peers, tmp_path, 2))

    def fail(path: Path, snapshot: Snapshot) -> Any:
        if "-00002-of" in path.name:
            raise PermissionError(13, "Permission denied")
        return write_file(path, snapshot)

    monkeypatch.setattr(checkpoint_writing, "write_file", fail)
    first, second = on_threads(2, lambda peers: save_on(peers, tmp_path, 4))
    assert isinstance(second, PermissionError)
    assert "Process 1 could not write its part: PermissionError" in str(first)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(checkpoint_writing, "write_file", lambda *part: go.wait(20) and write_file(*part))
    tensors = {FILE: {"weight": torch.zeros(3)}}
    with CheckpointWriter(tmp_path, 2, Peers(), lambda: None) as writer:
        writer.save(1, tensors, {})
        tensors[FILE]["weight"] += 1
        writer.check()
        assert checkpoint_steps(tmp_path) == []
        go.set()
        writer.save(2, tensors, {})  # waits for the first
        assert torch.equal(read_checkpoint(checkpoint_path(tmp_path, 1)).tensors[FILE]["weight"], torch.zeros(3))
    assert checkpoint_steps(tmp_path) == [1, 2]
    assert torch.equal(read_checkpoint(checkpoint_path(tmp_path, 2)).tensors[FILE]["weight"], torch.ones(3))


def test_the_memory_of_the_copies_is_reserved_and_used_again(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, 1, Peers(), lambda: None) as writer:
        writer.reserve(make_tensors())
        writer.settle()
        reserved = {name: snapshot.body.data_ptr() for name, snapshot in writer.snapshots.items()}
        assert reserved.keys() == make_tensors().keys()
        for step in (1, 2):
            writer.save(step, make_tensors(), {})
            assert {name: snapshot.body.data_ptr() for name, snapshot in writer.snapshots.items()} == reserved


def test_a_failed_write_is_reported_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*part: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoint_writing, "write_file", fail)
    with CheckpointWriter(tmp_path, 1, Peers(), lambda: None) as writer:
        writer.save(1, make_tensors(), {})
        assert writer.settle() == tmp_path
        with pytest.raises(OSError, match="Read-only file system"):
            writer.check()
        writer.check()  # once
    with pytest.raises(KeyError):  # which the failed write does not hide
        save_and_fail(tmp_path)
    assert "The last checkpoint was not written: " in caplog.text


def save_and_fail(folder: Path) -> None:
    with CheckpointWriter(folder, 1, Peers(), lambda: None) as writer:
        writer.save(1, make_tensors(), {})
        raise KeyError


def test_rows_of_sharded_tensors_are_put_together(tmp_path: Path) -> None:
    """Parts as FSDP2 makes them: the first process has more rows than the last."""
    weight = torch.randn(5, 2)
    parts = [Part(weight[:3], (5, 2)), Part(weight[3:], (5, 2), first=6)]
    path = write_parts(tmp_path, parts)
    assert torch.equal(read_checkpoint(path).tensors[FILE]["weight"], weight)


def write_parts(folder: Path, parts: list[Part]) -> Path:
    path = checkpoint_path(folder, 1)
    path.mkdir()
    names = [part_name(FILE, i, len(parts)) for i in range(len(parts))]
    assert {file_of(name) for name in names} == {FILE}
    files = {n: write_file(path / n, Snapshot.of({"weight": part})) for n, part in zip(names, parts, strict=True)}
    (path / STATE).write_text(sealed({"step": 1, "files": files}))
    return path


@pytest.mark.parametrize(
    ("firsts", "message"),
    [([0, 4], "does not hold the next part of weight"), ([0], "the last part of weight in unet.* is missing")],
)
def test_a_tensor_with_a_gap_is_damaged(firsts: list[int], message: str, tmp_path: Path) -> None:
    path = write_parts(tmp_path, [Part(torch.ones(1, 2), (3, 2), first) for first in firsts])
    with pytest.raises(ValueError, match=f"is damaged .*{message}"):
        read_checkpoint(path)


def test_a_tensor_of_another_shape_is_not_loaded(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, Checkpoint(1, {FILE: {"weight": torch.ones(2, 3)}}, {}), keep=1)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2\), in unet.safetensors \(2, 3\)"):
        StoredCheckpoint(path, Peers()).load({FILE: {"weight": torch.ones(3, 2)}})


def test_a_state_without_a_step_is_damaged(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, Checkpoint(1, make_tensors(), {}), keep=1)
    (path / STATE).write_text(sealed({**unsealed((path / STATE).read_text()), "step": None}))
    with pytest.raises(ValueError, match=r"state\.json names no step"):
        read_checkpoint(path)


def test_what_is_not_contiguous_is_loaded_in_place(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, Checkpoint(1, {FILE: {"weight": torch.randn(2, 3)}}, {}), keep=1)
    weight = torch.zeros(3, 2).T
    StoredCheckpoint(path, Peers()).load({FILE: {"weight": weight}})
    assert torch.equal(weight, load_file(path / FILE)["weight"])


def test_a_checkpoint_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    """It was written by `save_file`, and hashed afterwards."""
    path, tensors = checkpoint_path(tmp_path, 7), make_tensors()
    path.mkdir()
    for file, named in tensors.items():
        save_file(named, path / file)
    files = {name: file_digest(path / name) for name in tensors}
    (path / STATE).write_text(sealed({"step": 7, "run": {"seed": 0}, "files": files}))
    found = read_checkpoint(path)
    assert (found.step, found.state) == (7, {"run": {"seed": 0}})
    assert json.loads((path / STATE).read_text())["files"] == files
    for file, named in tensors.items():
        assert all(torch.equal(found.tensors[file][name], tensor) for name, tensor in named.items())
