"""One file with what reading a row needs besides its tensors: the headers of a folder's shards, read once.

The headers of 12,500 shards do not fit in memory, and reading a header costs a third of reading a row. `index.bin` has
fixed positions, so the entry of a row is found without reading others:

    64 bytes                      digest of the manifest's settings and of this format
    8 bytes for each shard        where its tensors start in its file
    16 bytes for each triplet     end of its prompt in the text below, CRC-32 of the row, CRC-32 of entry and prompt
    the prompts, in UTF-8

Numbers are little-endian. The index can be removed at any time. It is used for the shards that are older than it.
"""

import hashlib
import logging
import os
import struct
import zlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from rectified_diffusers.data.manifest import MANIFEST_NAME, STORAGE_DTYPES, Manifest
from rectified_diffusers.data.shards import PositionedFile, Shard, StoredTensor, read_row, shard_path
from rectified_diffusers.files import lock, write_atomically

logger = logging.getLogger(__name__)

INDEX_NAME = "index.bin"
_DIGEST_BYTES = 64
_START = struct.Struct("<Q")
_ENTRY = struct.Struct("<QII")


class ShardIndex:
    """The index of a folder of triplets, open for reading; it keeps at most `open_files` shards open."""

    def __init__(self, folder: Path, manifest: Manifest, open_files: int) -> None:
        self.folder, self.manifest = folder, manifest
        self.file = PositionedFile(folder / INDEX_NAME)
        self.status = self.file.status()
        self.entries = _DIGEST_BYTES + manifest.num_shards * _START.size
        self.prompts = self.entries + manifest.num_triplets * _ENTRY.size
        self.bytes_per_row = sum(tensor.row_bytes for tensor in _tensors(manifest, 0, 0).values())
        self.open_shard = lru_cache(open_files)(self._open_shard)

    def row(self, index: int) -> tuple[dict[str, Tensor], str] | None:
        """Return a row of every tensor and its prompt after comparing both with their checksums.

        Returns None if they differ, or if the shard is newer than the index: then its own header decides.
        """
        shard, row = divmod(index, self.manifest.triplets_per_shard)
        opened, entry = self.open_shard(shard), self._entry(index)
        if opened is None or entry is None:
            return None
        expected, prompt = entry
        tensors, checksum = read_row(*opened, row)
        return (tensors, prompt) if checksum == expected else None

    def is_current(self) -> bool:
        """Return whether it has the settings of the manifest, and every shard is as it was when it was indexed."""
        if self.status.st_size < self.prompts or self.file.read(0, _DIGEST_BYTES) != _digest(self.manifest):
            return False
        starts = _START.iter_unpack(self.file.read(_DIGEST_BYTES, self.entries - _DIGEST_BYTES))
        return all(
            self._describes(shard_path(self.folder, shard).stat(), shard, start)
            for shard, (start,) in enumerate(starts)
        )

    def _open_shard(self, shard: int) -> tuple[PositionedFile, dict[str, StoredTensor]] | None:
        (start,) = _START.unpack(self.file.read(_DIGEST_BYTES + shard * _START.size, _START.size))
        source = PositionedFile(shard_path(self.folder, shard))
        return (
            (source, _tensors(self.manifest, shard, start)) if self._describes(source.status(), shard, start) else None
        )

    def _describes(self, status: os.stat_result, shard: int, start: int) -> bool:
        """Return whether a shard has the length that the index expects and is older than the index."""
        size = start + self.manifest.rows(shard) * self.bytes_per_row
        return status.st_size == size and status.st_mtime_ns < self.status.st_mtime_ns

    def _entry(self, index: int) -> tuple[int, str] | None:
        """Return the CRC-32 of a row and its prompt, or None if the entry is damaged."""
        first = max(index - 1, 0)
        content = self.file.read(self.entries + first * _ENTRY.size, (index - first + 1) * _ENTRY.size)
        *before, (end, checksum, own) = _ENTRY.iter_unpack(content)
        begin = before[0][0] if before else 0
        if not begin <= end <= self.status.st_size - self.prompts:
            return None
        prompt = self.file.read(self.prompts + begin, end - begin)
        return (checksum, prompt.decode(*_UTF_8)) if own == _entry_checksum(begin, end, checksum, prompt) else None


_UTF_8 = "utf-8", "surrogatepass"  # JSON, and so a shard, can hold lone surrogates


def open_index(folder: Path, manifest: Manifest, shards: Iterable[Shard], open_files: int) -> ShardIndex | None:
    """Return the index of a folder, and write it first if there is none that matches the shards.

    One process writes it while the others wait. Returns None if it cannot be written, such as in a read-only folder,
    or if a shard is damaged, which is reported when that shard is read.

    Args:
        shards: all shards in order, opened on demand.
    """
    index = _current_index(folder, manifest, open_files)
    if index is not None or not os.access(folder, os.W_OK):
        return index
    with lock(folder / MANIFEST_NAME) as held:
        if held is not False:
            try:
                write_index(folder, manifest, shards)
                return ShardIndex(folder, manifest, open_files)
            except (ValueError, OSError, struct.error) as error:
                logger.info("%s has no index: %s", folder, error)
                return None
    with lock(folder / MANIFEST_NAME, shared=True):
        return _current_index(folder, manifest, open_files)


def _current_index(folder: Path, manifest: Manifest, open_files: int) -> ShardIndex | None:
    if not (folder / INDEX_NAME).exists():
        return None
    index = ShardIndex(folder, manifest, open_files)
    return index if index.is_current() else None


def write_index(folder: Path, manifest: Manifest, shards: Iterable[Shard]) -> None:
    """Write the index of a folder atomically; shards that change meanwhile are newer than it."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            begun = os.fstat(file.fileno()).st_mtime_ns
            file.write(_digest(manifest))
            entries = _DIGEST_BYTES + manifest.num_shards * _START.size
            prompts, end = entries + manifest.num_triplets * _ENTRY.size, 0
            for number, shard in enumerate(shards):
                file.seek(_DIGEST_BYTES + number * _START.size)
                file.write(_START.pack(_start(shard, manifest, number)))
                rows, texts = [], []
                for checksum, text in zip(shard.row_checksums or [], shard.header["prompts"], strict=True):
                    prompt = text.encode(*_UTF_8)
                    begin, end = end, end + len(prompt)
                    rows.append(_ENTRY.pack(end, checksum, _entry_checksum(begin, end, checksum, prompt)))
                    texts.append(prompt)
                file.seek(entries + number * manifest.triplets_per_shard * _ENTRY.size)
                file.write(b"".join(rows))
                file.seek(prompts + end - sum(map(len, texts)))
                file.write(b"".join(texts))
        os.utime(partial, ns=(begun, begun))

    write_atomically(folder / INDEX_NAME, write)


def _start(shard: Shard, manifest: Manifest, number: int) -> int:
    """Return where the tensors of a shard start; they must follow each other in the order of their names."""
    start = min(tensor.start for tensor in shard.tensors.values())
    if shard.tensors != _tensors(manifest, number, start):
        raise ValueError(f"{shard.path} has its tensors in another order than that of their names.")
    return start


def _tensors(manifest: Manifest, shard: int, start: int) -> dict[str, StoredTensor]:
    """Return the tensors of a shard, one after the other from `start`, ordered by name."""
    tensors, rows = {}, manifest.rows(shard)
    for name, shape in sorted(manifest.row_shapes.items()):
        tensors[name] = StoredTensor(STORAGE_DTYPES[manifest.storage_dtype], (rows, *shape), start)
        start += rows * tensors[name].row_bytes
    return tensors


def _digest(manifest: Manifest) -> bytes:
    return hashlib.sha256(f"index 1 of {manifest.identity}".encode()).hexdigest().encode()


def _entry_checksum(begin: int, end: int, checksum: int, prompt: bytes) -> int:
    return zlib.crc32(prompt, zlib.crc32(_ENTRY.pack(end, checksum, begin & 0xFFFFFFFF)))
