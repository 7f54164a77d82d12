"""Safetensors shards: written whole or not at all, checked, read by row. Knows nothing of diffusion.

A shard is one safetensors file of tensors with equally many rows. Its header carries one text: a line of JSON, an
object with whatever the writer says of the rows and the checksums of these, and the CRC-32 of that line. One text,
because safetensors writes several in no fixed order, and equal shards are to be equal files.

Every read is checked: the line of the header when a shard is opened, a CRC-32 of each row when it is read. Reading a
row therefore reads no other. The SHA-256 of everything is for `verify`.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_METADATA_KEY = "rectified_diffusers"
_PARTIAL_SUFFIX = ".partial"
# Checksums in the header. Shards of the previews before 0.1.0 have the second one only.
_ROWS, _ALL = "rows_crc32", "sha256"


def shard_path(folder: Path, shard: int) -> Path:
    """Name the file of a shard; numbers beyond five digits widen the name."""
    return folder / f"shard-{shard:05d}.safetensors"


def shard_number(name: str) -> int | None:
    """Give the number of the shard that a file is named for, or None if it is none."""
    found = re.fullmatch(r"shard-(\d{5,})\.safetensors", name)
    return int(found[1]) if found else None


def holds_shards(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(shard_number(entry.name) is not None for entry in entries)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all, whenever the process or the machine stops.

    Any number of processes may write the same file: each has a temporary file of its own, and the last to finish wins.
    """
    try:
        with _partial_file(path) as (file, partial):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # where an open file cannot be moved
                file.close()
            os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path.parent, f"{path.name} of {len(content):,} bytes was not written") from error
        raise


def require_space(folder: Path, size: int) -> None:
    """Raise if a folder has no room for `size` bytes more."""
    if size > shutil.disk_usage(folder).free:
        raise disk_full(folder, f"{size:,} bytes are to be written")


def disk_full(folder: Path, what: str) -> OSError:
    """Make the error about a disk that has no room."""
    free = shutil.disk_usage(folder).free
    return OSError(
        errno.ENOSPC,
        f"No space left on the disk of {folder}: {what}, {free:,} bytes are free. Whole files are kept: make room, "
        "then run the same again to go on",
    )


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left of files they were writing; a file that a living one is writing stays."""
    for path in folder.glob(f".*{_PARTIAL_SUFFIX}"):
        try:
            with path.open("rb") as file:
                if _lock(file):
                    path.unlink(missing_ok=True)
        except OSError:  # removed by another process meanwhile, or open in one, where the system forbids it
            continue


@contextmanager
def _partial_file(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """Open a temporary file beside `path`, locked for the life of the process, and remove it unless it was moved."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PARTIAL_SUFFIX}")
        with partial.open("xb") as file:
            try:
                _lock(file, wait=True)
                if os.fstat(file.fileno()).st_nlink:  # else it was taken for a leftover before it had the lock
                    yield file, partial
                    return
            finally:
                partial.unlink(missing_ok=True)


def _lock(file: IO[bytes], wait: bool = False) -> bool:
    """Lock a file until it is closed or its process ends; tell whether it is ours.

    Systems without POSIX locks do not let an open file be removed, which serves as well. A network file system that
    has none either leaves the temporary files of killed processes lying, which does no harm.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_shard(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header as one shard, atomically; equal content gives equal bytes."""
    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    rows = zip(*(_bytes(tensor).reshape(len(tensor), -1) for tensor in contiguous.values()), strict=True)
    header = {**header, _ROWS: [_row_checksum(row) for row in rows]}
    header[_ALL] = _checksum(contiguous, header)
    line = json.dumps(header, sort_keys=True)
    write_atomically(path, save(contiguous, {_METADATA_KEY: f"{line}\n{_text_checksum(line)}"}))


@dataclass(frozen=True)
class Shard:
    """A shard open for reading: the header is in memory, the rows are mapped from the file when asked for."""

    path: Path
    header: dict[str, Any]
    file: Any

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Open a shard, which checks its header and its length but not its rows."""
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
        """Give dtype, in safetensors' spelling such as `F16`, and shape of each tensor by name."""
        slices = {name: self.file.get_slice(name) for name in sorted(self.file.keys())}
        return {name: (rows.get_dtype(), tuple(rows.get_shape())) for name, rows in slices.items()}

    def row(self, name: str, index: int) -> Tensor:
        """Read one row of a tensor, unchecked; it is a view of the file, so copy what is to be changed or kept."""
        return self.file.get_slice(name)[index]

    def checked_row(self, index: int) -> dict[str, Tensor]:
        """Read one row of every tensor and compare it with its checksum; it may be a view of the file."""
        row = {name: self.row(name, index) for name in sorted(self.file.keys())}
        checksums = self.header.get(_ROWS)
        if checksums is not None:
            expected = checksums[index] if index < len(checksums) else None
            _require_equal(f"Row {index} of {self.path}", expected, _row_checksum(map(_bytes, row.values())))
        return row

    def verify(self) -> None:
        """Read everything and compare it with the checksum of the header."""
        found = _checksum({name: self.file.get_tensor(name) for name in self.layout()}, self.header)
        _require_equal(str(self.path), self.header.get(_ALL), found)


def _require_equal(what: str, expected: Any, found: Any) -> None:
    if found != expected:
        raise ValueError(
            f"{what} fails its checksum: expected {expected}, got {found}. Its content changed after it was written, "
            "on a failing disk perhaps; delete the file and make it again with the command that made it."
        )


def _row_checksum(row: Iterable[Any]) -> int:
    """Return the CRC-32 of a row: the bytes of its tensors, in the order of their names."""
    value = 0
    for part in row:
        value = zlib.crc32(part, value)
    return value


def _text_checksum(line: str) -> str:
    return f"{zlib.crc32(line.encode()):08x}"


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the header and of name, dtype, shape and bytes of every tensor, as hexadecimal digits."""
    rest = {key: value for key, value in header.items() if key != _ALL}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """Give the bytes of a tensor, without copying those of a whole tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
