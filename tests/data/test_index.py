"""The index of a folder with many shards: the rows are those of the shards, whatever happens to either file."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.triplet_memory import write_synthetic

from rectified_diffusers.data import dataset as dataset_module
from rectified_diffusers.data import index as module
from rectified_diffusers.data.dataset import JoinedTriplets, TripletDataset, Triplets
from rectified_diffusers.data.index import INDEX_NAME
from rectified_diffusers.data.shards import Shard, shard_path, write_shard
from rectified_diffusers.files import lock

COUNT = 28


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with ten shards of three triplets, the last of one, older than any index."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(dataset_module, "_INDEXED_FROM", 2)
    folder = tmp_path / "set"
    write_synthetic(folder, num_triplets=COUNT, triplets_per_shard=3, latent_shape=(4, 8, 8))
    age(folder)
    return folder


def age(folder: Path) -> None:
    for path in folder.glob("shard-*"):
        os.utime(path, ns=(10**18, 10**18))


def of_the_shards(folder: Path) -> Triplets:
    """Return all triplets of a folder by the headers of its shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_module, "_INDEXED_FROM", COUNT)
        return TripletDataset(folder).rows(range(COUNT))


def require_equal(found: Triplets, expected: Triplets) -> None:
    assert found.prompts == expected.prompts
    assert torch.equal(found.noise, expected.noise)
    assert torch.equal(found.data, expected.data)


def count_headers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []
    open_shard = Shard.open
    monkeypatch.setattr(Shard, "open", lambda path: (opened.append(path.name), open_shard(path))[1])
    return opened


def rewrite(folder: Path, shard: int, header: dict[str, Any]) -> None:
    opened = Shard.open(shard_path(folder, shard))
    tensors = {name: opened.file.get_tensor(name).clone() for name in opened.tensors}
    write_shard(opened.path, tensors, {**opened.header, **header})


def test_rows_are_those_of_the_shards_without_their_headers(folder, monkeypatch):
    expected = of_the_shards(folder)
    TripletDataset(folder)
    content = (folder / INDEX_NAME).read_bytes()
    opened = count_headers(monkeypatch)
    dataset = TripletDataset(folder)
    opened.clear()
    require_equal(dataset.rows(range(COUNT)), expected)
    assert opened == []
    assert (folder / INDEX_NAME).read_bytes() == content
    (folder / INDEX_NAME).unlink()
    TripletDataset(folder)
    assert (folder / INDEX_NAME).read_bytes() == content, "equal shards have equal indexes"


def test_few_shards_have_no_index(folder, monkeypatch):
    monkeypatch.setattr(dataset_module, "_INDEXED_FROM", 11)
    TripletDataset(folder)
    assert not (folder / INDEX_NAME).exists()


def test_a_pickled_dataset_reads_the_same(folder):
    dataset = TripletDataset(folder)
    for original in (dataset, JoinedTriplets([folder, folder])):
        copied = pickle.loads(pickle.dumps(original))  # noqa: S301
        require_equal(copied.rows([27, 0, 9]), original.rows([27, 0, 9]))


def test_prompts_of_any_text_are_kept(folder):
    prompts = ["café \u2028", "", "\ud800"]
    rewrite(folder, 4, {"prompts": prompts})
    age(folder)
    assert TripletDataset(folder).rows([12, 13, 14]).prompts == prompts


@pytest.mark.parametrize("older", [False, True], ids=["newer", "restored with its old time"])
def test_a_changed_shard_is_read_by_its_own_header(folder, older, monkeypatch):
    dataset = TripletDataset(folder)
    assert dataset._index is not None
    dataset._index.open_shard.cache_clear()  # as if it had not read the shard yet
    opened = Shard.open(shard_path(folder, 5))
    noise = opened.file.get_tensor("noise").flip(-1)
    prompts = [prompt[::-1] for prompt in opened.header["prompts"]]
    write_shard(opened.path, {"noise": noise, "data": noise.clone()}, {**opened.header, "prompts": prompts})
    if older:
        age(folder)
    for changed in (dataset, TripletDataset(folder)):
        rows = changed.rows([15, 16, 17])
        assert rows.prompts == prompts
        assert torch.equal(rows.noise, noise.float())


def test_an_index_that_is_older_than_a_shard_is_made_again(folder, monkeypatch):
    TripletDataset(folder)
    rewrite(folder, 5, {"prompts": ["a", "b", "c"]})
    TripletDataset(folder)
    opened = count_headers(monkeypatch)
    dataset = TripletDataset(folder)
    opened.clear()
    assert dataset.rows([15, 16, 17]).prompts == ["a", "b", "c"]
    assert opened == []
    assert TripletDataset(folder).rows([15, 16, 17]).prompts == ["a", "b", "c"]


def test_every_changed_byte_of_the_index_changes_no_row(folder):
    expected = of_the_shards(folder)
    TripletDataset(folder)
    path = folder / INDEX_NAME
    content, time = path.read_bytes(), path.stat().st_mtime_ns
    for place in range(0, len(content), 23):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        os.utime(path, ns=(time, time))
        require_equal(TripletDataset(folder).rows(range(COUNT)), expected)


@pytest.mark.parametrize("kept", [0, 63, 100, 600, -1])
def test_a_cut_index_changes_no_row(folder, kept):
    expected = of_the_shards(folder)
    TripletDataset(folder)
    path = folder / INDEX_NAME
    path.write_bytes(path.read_bytes()[:kept])
    require_equal(TripletDataset(folder).rows(range(COUNT)), expected)


def test_the_index_of_another_folder_is_not_used(folder, tmp_path):
    other = tmp_path / "other"
    write_synthetic(other, num_triplets=COUNT, triplets_per_shard=3, latent_shape=(4, 4, 16))
    age(other)
    TripletDataset(folder)
    shutil.copy(folder / INDEX_NAME, other)
    expected = of_the_shards(other)
    require_equal(TripletDataset(other).rows(range(COUNT)), expected)


def test_a_read_only_folder_needs_no_index(folder, monkeypatch):
    expected = of_the_shards(folder)
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    require_equal(TripletDataset(folder).rows(range(COUNT)), expected)
    assert not (folder / INDEX_NAME).exists()


def test_an_index_that_cannot_be_written_is_left_out(folder, monkeypatch):
    def refuse(*_: Any) -> None:
        raise PermissionError("no")

    expected = of_the_shards(folder)
    monkeypatch.setattr(module, "write_atomically", refuse)
    require_equal(TripletDataset(folder).rows(range(COUNT)), expected)


def test_a_damaged_shard_is_reported_when_it_is_read(folder):
    path = shard_path(folder, 5)
    path.write_bytes(path.read_bytes()[:-1])
    dataset = TripletDataset.__new__(TripletDataset)
    dataset.folder, dataset.manifest = folder, dataset_module.Manifest.read(folder)
    dataset._open_files()
    assert not (folder / INDEX_NAME).exists()
    dataset.rows(range(15))
    with pytest.raises(ValueError, match=r"shard-00005\.safetensors is no whole shard"):
        dataset.rows([15])


def test_a_shard_that_is_cut_after_it_was_opened_raises(folder):
    dataset = TripletDataset(folder)
    dataset.rows([15])
    os.truncate(shard_path(folder, 5), 2000)
    with pytest.raises(ValueError, match=r"shard-00005\.safetensors ends too early: expected 512 bytes"):
        dataset.rows([17])


def test_one_changed_byte_of_a_row_fails_its_checksum(folder):
    datasets = TripletDataset(folder), TripletDataset(folder)
    with shard_path(folder, 5).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    datasets[0].rows([15])  # one has the shard open, the other opens it
    for changed in datasets:
        changed.rows([15, 16])
        with pytest.raises(ValueError, match=r"Row 2 of .*shard-00005\.safetensors fails its checksum"):
            changed.rows([17])


@pytest.mark.parametrize("header", [{}, {"rows_crc32": [1, "a", 3]}], ids=["missing", "of another type"])
def test_shards_without_checksums_of_rows_have_no_index(folder, header):
    from safetensors.torch import save

    opened = Shard.open(shard_path(folder, 5))
    rest = {name: value for name, value in opened.header.items() if name != "rows_crc32"}
    tensors = {name: opened.file.get_tensor(name) for name in opened.tensors}
    opened.path.write_bytes(save(tensors, {"rectified_diffusers": json.dumps({**rest, **header})}))
    manifest = dataset_module.Manifest.read(folder)
    shards = (dataset_module.open_shard(folder, manifest, shard) for shard in range(10))
    assert module.open_index(folder, manifest, shards, 4) is None
    assert not (folder / INDEX_NAME).exists()


def test_processes_wait_for_the_one_that_writes_the_index(folder, monkeypatch):
    TripletDataset(folder)
    manifest, content = dataset_module.Manifest.read(folder), (folder / INDEX_NAME).read_bytes()
    (folder / INDEX_NAME).unlink()
    acquire, shared = module.lock, []

    def finish_first(path: Path, **options: Any) -> Any:
        if options.get("shared"):  # the other process has written it when it releases the lock
            shared.append(path)
            (folder / INDEX_NAME).write_bytes(content)
            return acquire(folder, shared=True)
        return acquire(path)

    monkeypatch.setattr(module, "lock", finish_first)
    with lock(folder / "manifest.json"):
        index = module.open_index(folder, manifest, iter(()), 4)
    assert shared == [folder / "manifest.json"]
    assert index is not None
