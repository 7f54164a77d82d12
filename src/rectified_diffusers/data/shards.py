"""Safetensors shards: written whole or not at all, checked, read by row. Knows nothing of diffusion.

A shard is one safetensors file of tensors with equally many rows. Its header carries one text, a JSON object with
whatever the writer says of the rows and a SHA-256 of all of it. One text, because safetensors writes several in no
fixed order, and equal shards are to be equal files.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_METADATA_KEY = "rectified_diffusers"
_PARTIAL_SUFFIX = ".partial"


def shard_path(folder: Path, shard: int) -> Path:
    """Name the file of a shard; numbers beyond five digits widen the name."""
    return folder / f"shard-{shard:05d}.safetensors"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all, whenever the process or the machine stops."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left of files they were writing; no process may be writing now."""
    for path in folder.glob(f".*{_PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)


def write_shard(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header as one shard, atomically; equal content gives equal bytes."""
    header = {**header, "sha256": _checksum(tensors, header)}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(contiguous, {_METADATA_KEY: json.dumps(header, sort_keys=True)}))


@dataclass(frozen=True)
class Shard:
    """A shard open for reading: the header is in memory, the rows are mapped from the file when asked for."""

    path: Path
    header: dict[str, Any]
    file: Any

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Open a shard, which checks its header and its length but not its content."""
        try:
            file: Any = safe_open(path, framework="pt")
            header = json.loads((file.metadata() or {})[_METADATA_KEY])
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
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
        """Read one row of a tensor; it is a view of the file, so copy what is to be changed or kept."""
        return self.file.get_slice(name)[index]

    def verify(self) -> None:
        """Read everything and compare it with the checksum of the header."""
        header = {key: value for key, value in self.header.items() if key != "sha256"}
        found = _checksum({name: self.file.get_tensor(name) for name in self.layout()}, header)
        expected = self.header.get("sha256")
        if found != expected:
            raise ValueError(
                f"{self.path} fails its checksum: expected SHA-256 {expected}, got {found}. "
                "Its content changed after it was written; delete it and make it again."
            )


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the header and of name, dtype, shape and bytes of every tensor, as hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
