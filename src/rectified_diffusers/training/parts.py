"""Tensors of a checkpoint as safetensors files: each process writes and reads its part of them.

One process writes `unet.safetensors`; of two, the second writes `unet-00002-of-00002.safetensors`. Sharded weights are
written by the process that holds them, other tensors by one process each. Tensors are found by their names, so that
the number of processes may change.
"""

# HuggingFaceStorageWriter of torch.distributed.checkpoint computes no digests, and serializes a part in memory again.

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.digests import hash_file
from rectified_diffusers.weights.weight_files import read_header

_SUFFIX = ".safetensors"
_FULL_TENSORS = "full_tensors"  # entry of a file's metadata: first element and full shape of what is there in part
_BLOCK = 1 << 23
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class Part:
    """The elements of a tensor of a shape that follow its element `first`: all, or those that one process holds."""

    values: Tensor
    shape: tuple[int, ...]
    first: int = 0
    is_copy: bool = False
    """Whether another process holds the same part of a sharded tensor, and writes it."""


def is_distributed(tensor: Tensor) -> bool:
    """Return whether a tensor is sharded over the processes."""
    return hasattr(tensor, "full_tensor")


def part_of(tensor: Any) -> Part:
    """Return what this process holds of a tensor; of one that is sharded by FSDP2, some of its rows."""
    tensor = tensor.detach()
    if not is_distributed(tensor):
        return Part(tensor, tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = tensor.device_mesh
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    is_copy = any(place.is_replicate() and mesh.get_local_rank(axis) for axis, place in enumerate(tensor.placements))
    return Part(tensor.to_local(), tuple(tensor.shape), offsets[0] * math.prod(tensor.shape[1:]), is_copy)


def own_parts(tensors: Mapping[str, Tensor], process: int, count: int) -> dict[str, Part]:
    """Return the parts that a process writes; tensors that each of them holds are divided evenly by size.

    They are divided in the order of their names: a resumed optimizer has its state in another order than a new one,
    and must write the same files.
    """
    parts, done = {}, 0
    size = sum(tensor.nbytes for tensor in tensors.values() if not is_distributed(tensor))
    for name, tensor in sorted(tensors.items()):
        part = part_of(tensor)
        if is_distributed(tensor):
            own = part.values.numel() > 0 and not part.is_copy
        else:
            middle = (done + tensor.nbytes / 2) / max(size, 1)
            own = process == min(int(middle * count), count - 1)
            done += tensor.nbytes
        if own:
            parts[name] = part
    return parts


@dataclass(frozen=True)
class Snapshot:
    """The content of a safetensors file, copied to the CPU, so that training may go on while it is written."""

    header: bytes
    body: Tensor

    @classmethod
    def of(cls, parts: Mapping[str, Part], buffer: Tensor | None = None) -> "Snapshot":
        """Copy parts to a new buffer, or to one of an earlier snapshot if it has the same size."""
        header, metadata, end = {}, {}, 0
        ordered = sorted(parts.items(), key=lambda item: (-item[1].values.itemsize, item[0]))  # aligned
        for name, part in ordered:
            begin, end = end, end + part.values.nbytes
            shape = list(part.values.shape)
            header[name] = {"dtype": _CODES[part.values.dtype], "shape": shape, "data_offsets": [begin, end]}
            if shape != list(part.shape):
                metadata[name] = [part.first, part.shape]
        if metadata:
            header = {"__metadata__": {_FULL_TENSORS: json.dumps(metadata)}, **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if buffer is None or len(buffer) != end:
            buffer = new_buffer(parts)
        for name, part in ordered:
            begin, end = header[name]["data_offsets"]
            target = buffer[begin:end].view(part.values.dtype).view(part.values.shape)
            target.copy_(part.values, non_blocking=buffer.is_pinned())
        return cls(len(text).to_bytes(8, "little") + text, buffer)


def new_buffer(parts: Mapping[str, Part]) -> Tensor:
    """Return memory for the copy of parts, pinned if they are on a GPU."""
    on_gpu = any(part.values.is_cuda for part in parts.values())
    size = sum(part.values.nbytes for part in parts.values())
    return torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)


def part_name(file: str, process: int, count: int) -> str:
    """Return the name of a process's part of a file."""
    return file if count == 1 else f"{file.removesuffix(_SUFFIX)}-{process + 1:05d}-of-{count:05d}{_SUFFIX}"


def file_of(part: str) -> str:
    """Return the name of the file that a part belongs to."""
    return re.sub(r"-\d{5}-of-\d{5}(?=\.safetensors$)", "", part)


def write_file(path: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Write a file; return its size and digest, which `file_digest` returns later if no bit of it has changed."""
    digest = hashlib.blake2b(snapshot.header, digest_size=16)
    body = snapshot.body.numpy().data
    with path.open("wb") as file:
        file.write(snapshot.header)
        for start in range(0, len(body), _BLOCK):
            block = body[start : start + _BLOCK]
            file.write(block)
            digest.update(block)
    return {"bytes": len(snapshot.header) + len(body), "blake2b": digest.hexdigest()}


def file_digest(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the BLAKE2b digest of a file."""
    digest = hash_file(path, hashlib.blake2b(digest_size=16))
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


@dataclass(frozen=True)
class Place:
    """Where a part of a tensor is: its file, its position there, its elements in the tensor, and the full tensor."""

    path: Path
    start: int
    first: int
    count: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, begin: int, end: int) -> Tensor:
        """Return the elements from `begin` to `end` of the full tensor."""
        values = torch.empty(end - begin, dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + (begin - self.first) * values.itemsize)
            _fill(file, values)
        return values


def _fill(file: Any, values: Tensor) -> memoryview:
    """Read the next bytes of a file into a tensor and return them."""
    content, done = values.view(torch.uint8).numpy().data, 0
    while done < len(content):
        count = file.readinto(content[done:])
        if not count:
            raise ValueError(f"{Path(file.name).name} ends too early")
        done += count
    return content


def places_in(path: Path) -> dict[str, Place]:
    """Return the tensors of a file, or of a part of one, in the order of their bytes."""
    start, header = read_header(path)
    full = json.loads((header.pop("__metadata__", None) or {}).get(_FULL_TENSORS, "{}"))
    places = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        count = math.prod(entry["shape"])
        first, shape = full.get(name, (0, entry["shape"]))
        begin, dtype = start + entry["data_offsets"][0], _DTYPES[entry["dtype"]]
        places[name] = Place(path, begin, first, count, dtype, tuple(shape))
    return places


def read_file(path: Path, places: Mapping[str, Place], receive: Any) -> dict[str, Any]:
    """Read a file once: call `receive(name, place, values)` for each tensor, and return its size and digest."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with path.open("rb", buffering=0) as file:
        start = min((place.start for place in places.values()), default=path.stat().st_size)
        size += len(header := file.read(start))
        digest.update(header)
        for name, place in places.items():
            values = torch.empty(place.count, dtype=place.dtype)
            content = _fill(file, values)
            digest.update(content)
            size += len(content)
            receive(name, place, values)
        size += len(rest := file.read())
        digest.update(rest)
    return {"bytes": size, "blake2b": digest.hexdigest()}
