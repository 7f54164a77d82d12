"""Shards: equal bytes for equal content, whole or absent, damage found."""

import os

import pytest
import torch
from safetensors.torch import save_file

from rectified_diffusers.data.shards import Shard, remove_partial_files, shard_path, write_atomically, write_shard

HEADER = {"prompts": ["a red apple", "", "café \u2028"], "shard": 3, "more": 1, "keys": 2}


@pytest.fixture
def tensors():
    return {name: torch.randn(3, 4, 2, 2).bfloat16() for name in ("noise", "data")}


@pytest.fixture
def path(tmp_path, tensors):
    path = shard_path(tmp_path, 3)
    write_shard(path, tensors, HEADER)
    return path


def test_read_back(path, tensors):
    shard = Shard.open(path)
    assert {key: shard.header[key] for key in HEADER} == HEADER
    assert shard.layout() == {"data": ("BF16", (3, 4, 2, 2)), "noise": ("BF16", (3, 4, 2, 2))}
    for name, tensor in tensors.items():
        assert torch.equal(shard.row(name, 2), tensor[2])
    shard.verify()


def test_names_are_wide_enough_to_sort(tmp_path):
    assert [shard_path(tmp_path, shard).name for shard in (0, 99_999, 123_456)] == [
        "shard-00000.safetensors",
        "shard-99999.safetensors",
        "shard-123456.safetensors",
    ]


def test_equal_content_is_equal_bytes(path, tensors):
    content = path.read_bytes()
    views = {name: tensor.mT.contiguous().mT for name, tensor in reversed(tensors.items())}  # strides differ
    for _ in range(5):
        write_shard(path, views, dict(reversed(HEADER.items())))
        assert path.read_bytes() == content


@pytest.mark.parametrize("kept", [0, 4, 50, -1])
def test_a_cut_shard_raises(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"shard-00003.safetensors is no whole shard.*Delete it"):
        Shard.open(path)


def test_a_lengthened_shard_raises(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="is no whole shard"):
        Shard.open(path)


def test_a_foreign_safetensors_file_raises(path, tensors):
    save_file(tensors, path)
    with pytest.raises(ValueError, match="is no whole shard of ours"):
        Shard.open(path)


@pytest.mark.parametrize("place", [-1, 120])
def test_one_changed_byte_fails_the_checksum(path, place):
    content = bytearray(path.read_bytes())
    assert b"prompts" in content[:place] or place == 120
    content[content.index(b"apple") if place == 120 else place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"fails its checksum: expected SHA-256 \w{64}, got \w{64}.*make it again"):
        Shard.open(path).verify()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_partial_files_are_removed_and_others_kept(tmp_path):
    for name in (".shard-00000.safetensors.17.partial", "notes.partial", ".hidden"):
        (tmp_path / name).touch()
    remove_partial_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "notes.partial"]
