"""Shards: equal bytes for equal content, whole or absent, damage found."""

import hashlib
import json
import zlib

import pytest
import torch
from safetensors.torch import save_file

from rectified_diffusers.data import shards as module
from rectified_diffusers.data.shards import (
    Shard,
    holds_shards,
    shard_number,
    shard_path,
    write_shard,
)

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
        assert torch.equal(shard.checked_row(2)[name], tensor[2])
    shard.verify()


def test_names_are_wide_enough_to_sort(tmp_path):
    names = [shard_path(tmp_path, shard).name for shard in (0, 99_999, 123_456)]
    assert names == ["shard-00000.safetensors", "shard-99999.safetensors", "shard-123456.safetensors"]
    assert [shard_number(name) for name in names] == [0, 99_999, 123_456]
    for name in (
        "shard-1.safetensors",
        ".shard-00001.safetensors.partial",
        "shard-00001.safetensors~",
        "a.safetensors",
    ):
        assert shard_number(name) is None


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


FAILS = r"fails its checksum: expected \w+, got \w+\..*make it again"


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("[]", "its header is list, expected an object"),
        ("7", "its header is int, expected an object"),
        ('{"prompts": [], "rows_crc32": 7}', "rows_crc32 is int, expected a list"),
        ('{"prompts": [], "rows_crc32": {"0": "a"}}', "rows_crc32 is dict, expected a list"),
    ],
)
def test_a_header_of_other_types_raises(path, tensors, header, words):
    save_file(tensors, path, {"rectified_diffusers": header})
    with pytest.raises(ValueError, match=f"{path.name} is no whole shard of ours .TypeError: {words}.*make it again"):
        Shard.open(path)


def test_one_changed_byte_of_a_row_fails_when_that_row_is_read(path):
    flip(path, -1)  # of the last row
    shard = Shard.open(path)
    for row in (0, 1):
        shard.checked_row(row)
    with pytest.raises(ValueError, match=rf"Row 2 of .*shard-00003.safetensors {FAILS}"):
        shard.checked_row(2)
    with pytest.raises(ValueError, match=FAILS):
        shard.verify()


@pytest.mark.parametrize("text", [b"apple", b"rows_crc32", b"sha256"])
def test_one_changed_byte_of_the_header_fails_when_the_shard_is_opened(path, text):
    flip(path, path.read_bytes().index(text))
    with pytest.raises(ValueError, match=rf"The header of .*shard-00003.safetensors {FAILS}"):
        Shard.open(path)


def test_every_changed_bit_is_found(path):
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        flip(path, place)
        with pytest.raises(ValueError, match=r"fails its checksum|is no whole shard|has other"):
            read_everything(path)
        path.write_bytes(content)


def read_everything(path):
    """Read as training does; names and shapes of tensors are what a manifest says."""
    shard = Shard.open(path)
    if shard.layout() != {"data": ("BF16", (3, 4, 2, 2)), "noise": ("BF16", (3, 4, 2, 2))}:
        raise ValueError("has other tensors")
    for row in range(3):
        shard.checked_row(row)


def test_shards_of_the_previews_are_read_without_the_checksums_they_lack(path, tensors, monkeypatch):
    from safetensors.torch import save

    header = {**HEADER, "sha256": module._checksum(tensors, HEADER)}
    path.write_bytes(save(tensors, {"rectified_diffusers": json.dumps(header, sort_keys=True)}))
    shard = Shard.open(path)
    assert torch.equal(shard.checked_row(1)["data"], tensors["data"][1])
    shard.verify()


def test_the_checksums_are_those_that_shards_have_always_had(path, tensors):
    """Shards are read by later releases, which have to come to the same numbers."""
    header = Shard.open(path).header
    data, noise = (tensors[name].view(torch.uint8).numpy() for name in ("data", "noise"))
    assert header["rows_crc32"] == [zlib.crc32(data[row].tobytes() + noise[row].tobytes()) for row in range(3)]
    rest = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    digest.update(b"\ndata torch.bfloat16 (3, 4, 2, 2)\n" + data.tobytes())
    digest.update(b"\nnoise torch.bfloat16 (3, 4, 2, 2)\n" + noise.tobytes())
    assert header["sha256"] == digest.hexdigest()


def test_a_row_beyond_the_checksums_fails(path, tensors):
    save_file(tensors, path, {"rectified_diffusers": '{"prompts": [], "rows_crc32": [7, 8]}'})
    with pytest.raises(ValueError, match=r"Row 2 of .*shard-00003.safetensors fails its checksum: expected None"):
        Shard.open(path).checked_row(2)


def test_tensors_of_unequal_rows_are_no_shard(tmp_path, tensors):
    with pytest.raises(ValueError, match="shorter"):
        write_shard(tmp_path / "shard", {**tensors, "noise": tensors["noise"][:2]}, HEADER)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_holds_shards_or_other_files(tmp_path):
    (tmp_path / "manifest.json").touch()
    assert holds_shards(tmp_path) is False
    shard_path(tmp_path, 2).touch()
    assert holds_shards(tmp_path) is True
