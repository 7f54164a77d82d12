"""Write safetensors shards atomically and read them by row with checksums. Independent of diffusion.

A shard is one safetensors file of tensors that all have the same number of rows. Its header contains one string: a
line of JSON followed by the CRC-32 of that line. The JSON object contains the writer's description of the rows and
their checksums. There is only one string because safetensors writes several in no fixed order, and equal shards must
be equal files.

Every read is checked: the header line when a shard is opened, the CRC-32 of each row when it is read. Reading one row
therefore reads no other row. `verify` uses the SHA-256 of the full content.

Rows are read at their positions. A memory map would read ahead: up to 8 MB from the disk for a row of 65 kB.
"""

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rectified_diffusers.files import write_atomically

_METADATA_KEY = "rectified_diffusers"
# Checksums in the header. Shards of preview releases before 0.1.0 have only the second one.
_ROWS, _ALL = "rows_crc32", "sha256"
_FIRST_READ = 2**15  # bytes: the header of 256 rows with their prompts, in one request to the disk
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


def shard_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard's file. Numbers with more than five digits make the name longer."""
    return folder / f"shard-{shard:05d}.safetensors"


def shard_number(name: str) -> int | None:
    """Return the shard number in a file name, or None if it is not the name of a shard."""
    found = re.fullmatch(r"shard-(\d{5,})\.safetensors", name)
    return int(found[1]) if found else None


def shard_numbers(folder: Path) -> Iterator[int]:
    """Yield the numbers of the shards in a folder, in any order."""
    with os.scandir(folder) as entries:
        yield from (number for entry in entries if (number := shard_number(entry.name)) is not None)


def holds_shards(folder: Path) -> bool:
    return any(True for _ in shard_numbers(folder))


def write_shard(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header as one shard, atomically. Equal content produces equal bytes."""
    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    rows = zip(*(_bytes(tensor).reshape(len(tensor), -1) for tensor in contiguous.values()), strict=True)
    header = {**header, _ROWS: [_row_checksum(row) for row in rows]}
    header[_ALL] = _checksum(contiguous, header)
    line = json.dumps(header, sort_keys=True)
    content = save(contiguous, {_METADATA_KEY: f"{line}\n{_text_checksum(line)}"})
    write_atomically(path, lambda partial: partial.write_bytes(content))


class PositionedFile:
    """A file for reads at given positions, without reading ahead.

    Threads and forked processes may share it, except on Windows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # it was opened
            os.close(self.descriptor)

    def status(self) -> os.stat_result:
        return os.fstat(self.descriptor)

    def read(self, start: int, count: int) -> bytes:
        """Return `count` bytes from `start`."""
        if hasattr(os, "pread"):
            content = os.pread(self.descriptor, count, start)
        else:  # Windows, where no process is forked
            os.lseek(self.descriptor, start, os.SEEK_SET)
            content = os.read(self.descriptor, count)
        if len(content) < count:
            raise ValueError(
                f"{self.path} ends too early: expected {count} bytes from {start}, got {len(content)}. It was cut "
                "after it was opened; delete it and make it again."
            )
        return content


@dataclass(frozen=True)
class StoredTensor:
    """Dtype in safetensors notation, such as `F16`, shape, and position in the file of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * _DTYPES[self.dtype].itemsize

    def row(self, content: bytes) -> Tensor:
        """Return a row from its bytes."""
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0).byte()
        return values.view(_DTYPES[self.dtype]).reshape(self.shape[1:])


@dataclass(frozen=True)
class Shard:
    """A shard open for reading. The header is in memory; rows are read on demand."""

    source: PositionedFile
    header: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Open a shard. Checks its header and its length, but not its rows."""
        source = PositionedFile(path)
        try:
            tensors, metadata = _read_header(source)
            line, _, checksum = metadata[_METADATA_KEY].partition("\n")
            if checksum:
                _require_equal(f"The header of {path}", checksum, _text_checksum(line))
            header = json.loads(line)
            if not isinstance(header, dict):
                raise TypeError(f"its header is {type(header).__name__}, expected an object")
            if not isinstance(header.get(_ROWS, []), list):
                raise TypeError(f"{_ROWS} is {type(header[_ROWS]).__name__}, expected a list")
        except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no whole shard of ours ({type(error).__name__}: {error}); "
                "it was cut, damaged or put there by something else. Delete it and make it again."
            ) from error
        return cls(source, header, tensors)

    @property
    def path(self) -> Path:
        return self.source.path

    @cached_property
    def file(self) -> Any:
        """The shard opened by safetensors, which maps all of it: for reading it completely."""
        return safe_open(self.path, framework="pt")

    @property
    def row_checksums(self) -> list[Any] | None:
        return self.header.get(_ROWS)

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype (in safetensors notation, such as `F16`) and shape of each tensor, by name."""
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}

    def row(self, name: str, index: int) -> Tensor:
        """Return one row of a tensor, unchecked."""
        tensor = self.tensors[name]
        return tensor.row(self.source.read(tensor.start + index * tensor.row_bytes, tensor.row_bytes))

    def checked_row(self, index: int) -> dict[str, Tensor]:
        """Return one row of every tensor after comparing it with its checksum."""
        checksums = self.row_checksums
        if checksums is None:
            return {name: self.row(name, index) for name in self.tensors}
        row, checksum = read_row(self.source, self.tensors, index)
        expected = checksums[index] if index < len(checksums) else None
        _require_equal(f"Row {index} of {self.path}", expected, checksum)
        return row

    def verify(self) -> None:
        """Read the full content and compare it with the checksum in the header; raise ValueError if they differ."""
        found = _checksum({name: self.file.get_tensor(name) for name in self.layout()}, self.header)
        _require_equal(str(self.path), self.header.get(_ALL), found)


def read_row(source: PositionedFile, tensors: Mapping[str, StoredTensor], index: int) -> tuple[dict[str, Tensor], int]:
    """Return one row of every tensor, unchecked, and its CRC-32. The tensors are ordered by name."""
    row, checksum = {}, 0
    for name, tensor in tensors.items():
        content = source.read(tensor.start + index * tensor.row_bytes, tensor.row_bytes)
        checksum = zlib.crc32(content, checksum)
        row[name] = tensor.row(content)
    return row, checksum


def _read_header(source: PositionedFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a safetensors file, ordered by name, and its metadata; checks the length of the file.

    `safe_open` would map the file and read ahead.
    """
    size = source.status().st_size
    content = source.read(0, min(size, _FIRST_READ))
    length = int.from_bytes(content[:8], "little") if size >= 8 else size
    if 8 + length > size:
        raise SafetensorError(f"the file has {size} bytes, less than its header")
    try:
        text = content[8 : 8 + length] if 8 + length <= len(content) else source.read(8, length)
        entries = json.loads(text.decode())
        metadata = entries.pop("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise SafetensorError(f"its header is no JSON object: {error}") from error
    if not all(isinstance(value, str) for value in metadata.values()):
        raise SafetensorError("its metadata is no text")
    place, tensors = 8 + length, {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), place)
        place += math.prod(tensor.shape[:1]) * tensor.row_bytes
        sizes_are_whole = all(type(size) is int and size >= 0 for size in tensor.shape)
        if not sizes_are_whole or entry["data_offsets"] != [tensor.start - 8 - length, place - 8 - length]:
            raise SafetensorError(f"{name} is not where its shape puts it")
        tensors[name] = tensor
    if place != size:
        raise SafetensorError(f"the file has {size} bytes, expected {place}")
    return dict(sorted(tensors.items())), metadata


def _require_equal(what: str, expected: Any, found: Any) -> None:
    if found != expected:
        raise ValueError(
            f"{what} fails its checksum: expected {expected}, got {found}. Its content changed after it was written, "
            "on a failing disk perhaps; delete the file and make it again with the command that made it."
        )


def _row_checksum(row: Iterable[Any]) -> int:
    """Return the CRC-32 of a row: the bytes of its tensors, ordered by name."""
    value = 0
    for part in row:
        value = zlib.crc32(part, value)
    return value


def _text_checksum(line: str) -> str:
    return f"{zlib.crc32(line.encode()):08x}"


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return the hexadecimal SHA-256 of the header and of name, dtype, shape and bytes of every tensor."""
    rest = {key: value for key, value in header.items() if key != _ALL}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """Return the bytes of a tensor as an array, without a copy if the tensor is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
