"""Write safetensors shards atomically and read them by row with checksums. Independent of diffusion.

A shard is one safetensors file of tensors that all have the same number of rows. Its header contains one string: a
line of JSON followed by the CRC-32 of that line. The JSON object contains the writer's description of the rows and
their checksums. There is only one string because safetensors writes several in no fixed order, and equal shards must
be equal files.

Every read is checked: the header line when a shard is opened, the CRC-32 of each row when it is read. Reading one row
therefore reads no other row. `verify` uses the SHA-256 of the full content.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Shard:
    """A shard open for reading. The header is in memory; the rows are memory-mapped on demand."""

    path: Path
    header: dict[str, Any]
    file: Any

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Open a shard. Checks its header and its length, but not its rows."""
        try:
            file: Any = safe_open(path, framework="pt")
            line, _, checksum = (file.metadata() or {})[_METADATA_KEY].partition("\n")
            if checksum:
                _require_equal(f"The header of {path}", checksum, _text_checksum(line))
            header = json.loads(line)
            if not isinstance(header, dict):
                raise TypeError(f"its header is {type(header).__name__}, expected an object")
            if not isinstance(header.get(_ROWS, []), list):
                raise TypeError(f"{_ROWS} is {type(header[_ROWS]).__name__}, expected a list")
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no whole shard of ours ({type(error).__name__}: {error}); "
                "it was cut, damaged or put there by something else. Delete it and make it again."
            ) from error
        return cls(path, header, file)

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype (in safetensors notation, such as `F16`) and shape of each tensor, by name."""
        slices = {name: self.file.get_slice(name) for name in sorted(self.file.keys())}
        return {name: (rows.get_dtype(), tuple(rows.get_shape())) for name, rows in slices.items()}

    def row(self, name: str, index: int) -> Tensor:
        """Return one row of a tensor, unchecked. It is a view of the file: copy it before changing or keeping it."""
        return self.file.get_slice(name)[index]

    def checked_row(self, index: int) -> dict[str, Tensor]:
        """Return one row of every tensor after comparing it with its checksum. It may be a view of the file."""
        row = {name: self.row(name, index) for name in sorted(self.file.keys())}
        checksums = self.header.get(_ROWS)
        if checksums is not None:
            expected = checksums[index] if index < len(checksums) else None
            _require_equal(f"Row {index} of {self.path}", expected, _row_checksum(map(_bytes, row.values())))
        return row

    def verify(self) -> None:
        """Read the full content and compare it with the checksum in the header; raise ValueError if they differ."""
        found = _checksum({name: self.file.get_tensor(name) for name in self.layout()}, self.header)
        _require_equal(str(self.path), self.header.get(_ALL), found)


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
