"""Opening and verifying folders of triplets: missing files, files that belong together, and the noise."""

import json
import math
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.triplet_memory import write_synthetic
from torch import Tensor

from rectified_diffusers.data import dataset as module
from rectified_diffusers.data.dataset import TripletDataset, verify_triplets
from rectified_diffusers.data.shards import PositionedFile, Shard, shard_path, write_shard


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a separate folder with five shards of four triplets each."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    write_synthetic(tmp_path / "set", num_triplets=20, triplets_per_shard=4, latent_shape=(4, 8, 8))
    return tmp_path / "set"


def rewrite(folder: Path, shard: int, header: dict[str, Any], **changes: Tensor) -> None:
    """Rewrite a shard with different tensors or a different header."""
    path = shard_path(folder, shard)
    old = Shard.open(path)
    tensors = {name: old.file.get_tensor(name).clone() for name in ("noise", "data")}
    write_shard(path, {**tensors, **changes}, {**old.header, **header})


def board(shape: tuple[int, ...], variance: float, correlation: float) -> Tensor:
    """Return a constant plus a checkerboard: neighbors are equal in one, opposite in the other, so both are exact."""
    rows, columns = (torch.arange(size) for size in shape[-2:])
    signs = 1 - 2 * ((rows[:, None] + columns) % 2)
    field = math.sqrt((1 + correlation) / 2) + math.sqrt((1 - correlation) / 2) * signs
    return (math.sqrt(variance) * field).expand(shape).contiguous()


MANY, FEW = (8, 4, 32, 32), (2, 4, 2, 2)  # where 0.1 is the bound, and where six standard errors are


@pytest.mark.parametrize(
    ("shape", "variance", "correlation", "white"),
    [
        (MANY, 1.08, 0.0, True),
        (MANY, 1.12, 0.0, False),
        (MANY, 0.88, 0.0, False),
        (MANY, 1.0, 0.09, True),
        (MANY, 1.0, 0.11, False),
        (MANY, 1.0, -0.11, False),
        (FEW, 1 + 0.97 * 6 * math.sqrt(2 / 32), 0.0, True),
        (FEW, 1 + 1.03 * 6 * math.sqrt(2 / 32), 0.0, False),
        ((1, 1, 8, 8), 1.0, 0.97 * 6 / math.sqrt(112), True),
        ((1, 1, 8, 8), 1.0, 1.03 * 6 / math.sqrt(112), False),
    ],
)
def test_noise_may_differ_from_white_by_a_tenth_or_six_standard_errors(shape, variance, correlation, white):
    assert module._is_unit_white(board(shape, variance, correlation)) is white


def test_whiteness_is_of_all_neighbours_across_and_down():
    std, correlation, pairs = module._whiteness(torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]]))
    products = 1 * 2 + 2 * 3 + 4 * 5 + 5 * 6, 1 * 4 + 2 * 5 + 3 * 6
    assert pairs == 7
    assert std == pytest.approx(math.sqrt(91 / 6))
    assert correlation == pytest.approx(sum(products) / 7 / (91 / 6))
    assert module._whiteness(torch.tensor([[[[1.0, 2]]]])) == pytest.approx((math.sqrt(2.5), 2 / 2.5, 1))


def test_noise_is_inspected_in_the_whole_set(folder):
    for shard in range(1, 5):
        alike = board((4, 4, 8, 8), 1.0, 0.9).half()
        rewrite(folder, shard, {}, noise=alike, data=alike.clone())
    with pytest.raises(ValueError, match=r"The stored noise in .* is not white with unit variance"):
        TripletDataset(folder)


@pytest.mark.parametrize(
    ("header", "tensors", "match"),
    [
        ({"prompts": "abcd"}, {}, "expected number of prompts 4, got None"),
        ({"prompts": [1, 2, 3, 4]}, {}, "expected number of prompts 4, got None"),
        ({"prompts": ["a"]}, {}, "expected number of prompts 4, got 1"),
        ({}, {"noise": torch.zeros(4, 4, 8, 8)}, r"expected layout \{.*'noise': \('F16', .* got .*'noise': \('F32'"),
    ],
    ids=str,
)
def test_a_shard_of_other_content_does_not_belong_to_the_manifest(folder, header, tensors, match):
    rewrite(folder, 0, header, **tensors)
    with pytest.raises(ValueError, match=f"shard-00000.safetensors does not belong to the manifest .*: {match}"):
        TripletDataset(folder)


def test_giant_latents_are_refused_before_there_is_memory_for_them(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "latent_shape": [4, 10**7, 10**7]}))
    with pytest.raises(ValueError, match=r"manifest\.json was changed: none of the 5 readable shards"):
        TripletDataset(folder)


@pytest.mark.parametrize(
    ("kept", "missing", "first"), [((0, 1, 2, 4), 1, 3), ((3,), 4, 0), ((4,), 4, 0), ((0, 4), 3, 1), ((), 5, 0)]
)
def test_the_first_shard_that_is_missing_is_named(folder, kept, missing, first):
    for shard in set(range(5)) - set(kept):
        shard_path(folder, shard).unlink()
    with pytest.raises(ValueError, match=rf"{missing} of 5 shards are missing in .*, first: shard-0000{first}\."):
        TripletDataset(folder)


def test_a_shard_beyond_the_set_stands_for_none_of_it(folder):
    shard_path(folder, 1).rename(shard_path(folder, 5))
    with pytest.raises(ValueError, match=r"1 of 5 shards are missing in .*, first: shard-00001\."):
        TripletDataset(folder)


@pytest.fixture
def alone(monkeypatch) -> Callable[[Callable[[], Any]], Any]:
    """Return what calls a function while rows are read one after the other."""

    def call(work: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_READERS", 1)
            return work()

    return call


@pytest.mark.parametrize("indexed_from", [1, 100], ids=["with an index", "by the headers"])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 64, 65, 150])
def test_rows_read_at_once_are_those_read_one_after_the_other(folder, count, indexed_from, alone, monkeypatch):
    monkeypatch.setattr(module, "_INDEXED_FROM", indexed_from)
    monkeypatch.setattr(module, "_OPEN_SHARDS", 2)  # so that shards are closed while other threads read
    dataset = TripletDataset(folder)
    indices = torch.randint(20, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    for given in (indices, torch.tensor(indices, dtype=torch.long)):
        expected, found = alone(partial(dataset.rows, given)), dataset.rows(given)
        assert found.prompts == expected.prompts
        assert torch.equal(found.noise, expected.noise)
        assert torch.equal(found.data, expected.data)


@pytest.mark.skipif(module._READERS == 1, reason="the system has no reads at positions")
def test_the_rows_of_a_batch_are_read_at_once(folder, monkeypatch):
    """The first read of each thread waits until all threads read."""
    dataset, read, barrier = TripletDataset(folder), PositionedFile.read, threading.Barrier(module._READERS)
    waited, before = threading.local(), threading.active_count()

    def read_together(file: PositionedFile, start: int, count: int) -> bytes:
        if not hasattr(waited, "done"):
            barrier.wait(60)
            waited.done = True
        return read(file, start, count)

    monkeypatch.setattr(PositionedFile, "read", read_together)
    assert len(dataset.rows(range(2 * module._READERS))) == 2 * module._READERS
    assert threading.active_count() == before, "a process with threads could not be forked"


@pytest.mark.parametrize("indices", [[3, 20], [-1, 4], [2, 5, 9, 14], [14, 9, 2], list(range(19, -1, -1))], ids=str)
def test_the_error_of_rows_read_at_once_is_that_of_the_first(folder, indices, alone):
    for shard, row in ((1, 1), (2, 1), (3, 2)):
        opened = Shard.open(shard_path(folder, shard))
        with opened.path.open("r+b") as file:
            file.seek(opened.tensors["noise"].start + row * opened.tensors["noise"].row_bytes)
            file.write(b"\xff\xff")
    dataset = TripletDataset.__new__(TripletDataset)  # opening would read damaged rows
    dataset.folder, dataset.manifest = folder, module.Manifest.read(folder)
    dataset._open_files()
    messages = []
    for call in (alone, lambda work: work()):
        with pytest.raises((ValueError, IndexError)) as caught:
            call(partial(dataset.rows, indices))
        messages.append((caught.type, str(caught.value)))
    assert messages[0] == messages[1]


def test_verifying_shows_its_progress_or_nothing(folder, capfd):
    assert len(verify_triplets(folder)) == 20
    assert capfd.readouterr() == ("", "")
    verify_triplets(folder, progress=True)
    shown = capfd.readouterr().err
    assert "Verifying: 100%" in shown
    assert "5/5" in shown
    assert "shard/s" in shown or "s/shard]" in shown


def test_ten_damaged_shards_are_listed_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    write_synthetic(tmp_path, num_triplets=11, triplets_per_shard=1)
    for path in tmp_path.glob("shard-*"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"11 of 11 shards in .* are not sound:\n") as caught:
        verify_triplets(tmp_path)
    found = [line.partition(" fails its checksum")[0] for line in str(caught.value).splitlines()[1:]]
    assert found == [str(shard_path(tmp_path, shard)) for shard in range(10)]
