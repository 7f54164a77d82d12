"""Write safetensors shards atomically and read them by row with checksums. Independent of diffusion.

A shard is one safetensors file of tensors that all have the same number of rows. Its header contains one string: a
line of JSON followed by the CRC-32 of that line. The JSON object contains the writer's description of the rows and
their checksums. There is only one string because safetensors writes several in no fixed order, and equal shards must
be equal files.

Every read is checked: the header line when a shard is opened, the CRC-32 of each row when it is read. Reading one row
therefore reads no other row. `verify` uses the SHA-256 of the full content.
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
# Checksums in the header. Shards of preview releases before 0.1.0 have only the second one.
_ROWS, _ALL = "rows_crc32", "sha256"


def shard_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard's file. Numbers with more than five digits make the name longer."""
    return folder / f"shard-{shard:05d}.safetensors"


def shard_number(name: str) -> int | None:
    """Return the shard number in a file name, or None if it is not the name of a shard."""
    found = re.fullmatch(r"shard-(\d{5,})\.safetensors", name)
    return int(found[1]) if found else None


def holds_shards(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(shard_number(entry.name) is not None for entry in entries)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: it is complete or absent, even if the process or the machine stops.

    Several processes may write the same file. Each uses its own temporary file, and the last to finish wins.
    """
    try:
        with _partial_file(path) as (file, partial):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # Windows cannot move an open file
                file.close()
            os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path.parent, f"{path.name} of {len(content):,} bytes was not written") from error
        raise


def require_space(folder: Path, size: int) -> None:
    """Raise OSError if the disk of a folder has less than `size` bytes free."""
    if size > shutil.disk_usage(folder).free:
        raise disk_full(folder, f"{size:,} bytes are to be written")


def disk_full(folder: Path, what: str) -> OSError:
    """Return the error for a full disk."""
    free = shutil.disk_usage(folder).free
    return OSError(
        errno.ENOSPC,
        f"No space left on the disk of {folder}: {what}, {free:,} bytes are free. Whole files are kept: make room, "
        "then run the same again to go on",
    )


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of killed processes. Files that a running process is writing are kept."""
    for path in folder.glob(f".*{_PARTIAL_SUFFIX}"):
        try:
            with path.open("rb") as file:
                if _lock(file):
                    path.unlink(missing_ok=True)
        except OSError:  # removed by another process meanwhile, or open in one on a system that forbids removal
            continue


@contextmanager
def _partial_file(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """Open a locked temporary file next to `path` and remove it at the end unless it was moved.

    The lock ends with the process at the latest.
    """
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PARTIAL_SUFFIX}")
        with partial.open("xb") as file:
            try:
                _lock(file, wait=True)
                if os.fstat(file.fileno()).st_nlink:  # else it was removed as a leftover before it was locked
                    yield file, partial
                    return
            finally:
                partial.unlink(missing_ok=True)


def _lock(file: IO[bytes], wait: bool = False) -> bool:
    """Lock a file until it is closed or its process ends. Return whether this process holds the lock.

    Systems without POSIX locks do not allow an open file to be removed, which has the same effect. On a network file
    system without locks, the temporary files of killed processes remain, which is harmless.
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
    """Write tensors and a JSON header as one shard, atomically. Equal content produces equal bytes."""
    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    rows = zip(*(_bytes(tensor).reshape(len(tensor), -1) for tensor in contiguous.values()), strict=True)
    header = {**header, _ROWS: [_row_checksum(row) for row in rows]}
    header[_ALL] = _checksum(contiguous, header)
    line = json.dumps(header, sort_keys=True)
    write_atomically(path, save(contiguous, {_METADATA_KEY: f"{line}\n{_text_checksum(line)}"}))


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
