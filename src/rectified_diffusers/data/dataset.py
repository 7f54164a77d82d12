"""Read triplets (prompt, noise, data) from the shards of one or more folders.

A folder of triplets contains the shards and `manifest.json`, which records the settings that produced them. The
manifest and the shard number fully determine a shard, so an interrupted run resumes with the missing shards.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rectified_diffusers.checks import require_type
from rectified_diffusers.data.index import open_index
from rectified_diffusers.data.manifest import PROMPT, STORAGE_DTYPES, Manifest
from rectified_diffusers.data.shards import Shard, shard_numbers, shard_path

_OPEN_SHARDS = 64  # maximum number of shards that a dataset keeps open
_INDEXED_FROM = 65  # number of shards from which a folder has an index: the headers of fewer are kept in memory
_INSPECTED_ROWS = 32  # rows checked when a dataset is opened
_READERS = 8 if hasattr(os, "pread") else 1  # threads: on a network disk, each read waits for an answer
_READ_AT_ONCE = 8 * _READERS  # rows that are in memory as they are stored
_Row = tuple[dict[str, Tensor], str]  # of every tensor, and the prompt


@dataclass(frozen=True)
class Triplets:
    """Prompts with the noise and data that a teacher coupled, VAE-scaled latents of shape `(B, C, H, W)` each.

    `text_embeddings` maps names to the prompts' embeddings `(B, ...)` as returned by `Denoiser.encode`. It is empty
    if they are not stored.

    Example:
        ```python
        batch = TripletDataset("triplets").rows([0, 1])
        print(batch.prompts, batch.noise.shape, batch.data.shape)
        ```
    """

    prompts: list[str]
    noise: Tensor
    data: Tensor
    text_embeddings: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("noise", "data"):
            require_type(name, getattr(self, name), Tensor, "Triplets hold latents (B, C, H, W).")
        if self.noise.shape != self.data.shape or len(self.noise) != len(self.prompts):
            raise ValueError(
                f"Triplets need noise and data of one shape and a prompt for each, got {len(self.prompts)} prompts, "
                f"noise {tuple(self.noise.shape)} and data {tuple(self.data.shape)}."
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def pin_memory(self) -> "Triplets":
        """Return the triplets in pinned memory, from which copies to a GPU need not wait; called by torch's loader."""
        embeddings = {name: part.pin_memory() for name, part in self.text_embeddings.items()}
        return Triplets(self.prompts, self.noise.pin_memory(), self.data.pin_memory(), embeddings)


def open_shard(folder: Path, manifest: Manifest, shard: int) -> Shard:
    """Open a shard and check that it matches the manifest, without reading its rows."""
    opened = Shard.open(shard_path(folder, shard))
    rows, dtype = manifest.rows(shard), STORAGE_DTYPES[manifest.storage_dtype]
    layout = {name: (dtype, (rows, *shape)) for name, shape in manifest.row_shapes.items()}
    prompts = opened.header.get("prompts")
    texts = len(prompts) if isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts) else None
    for name, expected, found in (
        ("number", shard, opened.header.get("shard")),
        ("manifest", manifest.identity, opened.header.get("manifest")),
        ("number of prompts", rows, texts),
        ("layout", layout, opened.layout()),
    ):
        if found != expected:
            raise ValueError(
                f"{opened.path} does not belong to the manifest beside it: expected {name} {expected!r}, got "
                f"{found!r}. Delete it and make it again with generate_triplets."
            )
    return opened


class TripletDataset:
    """Triplets in a folder, read on demand. Memory use does not grow with their number.

    Opening a dataset reads only a few rows. Use `verify_triplets` to read all of them.

    Example:
        ```python
        triplets = TripletDataset("triplets")
        print(len(triplets), triplets.rows([0]).prompts)
        ```
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self._require_shards()
        self._open_files()
        self._shard(0)  # checks the manifest's shapes against a file
        self._check_orientation()

    def _require_shards(self) -> None:
        """Raise ValueError if a shard is missing."""
        count = self.manifest.num_shards
        present = bytearray(count)
        for number in shard_numbers(self.folder):
            if number < count:
                present[number] = 1
        if missing := present.count(0):
            raise ValueError(
                f"{missing} of {count} shards are missing in {self.folder}, first: "
                f"{shard_path(self.folder, present.index(0)).name}. Run the same `rectified-diffusers triplets` "
                "or `real-triplets` command or call again: it makes what is missing."
            )

    def _open_files(self) -> None:
        self._kept = lru_cache(_OPEN_SHARDS)(lambda shard: open_shard(self.folder, self.manifest, shard))
        self._opening = Lock()
        count, self._index = self.manifest.num_shards, None
        if count >= _INDEXED_FROM:
            shards = (open_shard(self.folder, self.manifest, shard) for shard in range(count))
            self._index = open_index(self.folder, self.manifest, shards, _OPEN_SHARDS)

    def _shard(self, number: int) -> Shard:
        with self._opening:  # threads read at once: none opens a shard that another is opening
            return self._kept(number)

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the open files: a process that is not forked gets a pickled copy."""
        return {name: value for name, value in vars(self).items() if name not in ("_kept", "_opening", "_index")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_files()

    def __len__(self) -> int:
        return self.manifest.num_triplets

    @property
    def place(self) -> str:
        """The folder, for messages."""
        return str(self.folder)

    def rows(self, indices: Sequence[int] | Tensor) -> Triplets:
        """Return the triplets at `indices`, in that order, as float32.

        Each triplet is compared with its checksum, so a file that changed on disk raises an error and does not become
        training data.
        """
        parts = {name: torch.empty(len(indices), *shape) for name, shape in self.manifest.row_shapes.items()}
        prompts = [""] * len(indices)
        order = sorted(range(len(indices)), key=lambda position: indices[position])
        for position, (row, prompt) in zip(order, self._read([int(indices[i]) for i in order]), strict=True):
            prompts[position] = prompt
            for name, values in row.items():
                parts[name][position] = values
        noise, data = parts.pop("noise"), parts.pop("data")
        return Triplets(prompts, noise, data, {name.removeprefix(PROMPT): part for name, part in parts.items()})

    def _read(self, indices: Sequence[int]) -> Iterator[_Row]:
        """Yield the rows at ascending indices, read by several threads that each take neighbors.

        The threads end with the call: a process that has some could not be forked safely.
        """
        if min(len(indices), _READERS) == 1:
            yield from map(self._row, indices)
            return
        with ThreadPoolExecutor(_READERS, thread_name_prefix="rows") as executor:
            for begin in range(0, len(indices), _READ_AT_ONCE):
                some = indices[begin : begin + _READ_AT_ONCE]
                size = math.ceil(len(some) / _READERS)
                shares = [some[first : first + size] for first in range(0, len(some), size)]
                for rows in executor.map(lambda share: [self._row(index) for index in share], shares):
                    yield from rows

    def _row(self, index: int) -> _Row:
        """Return a row of every tensor and its prompt, checked by the index, or else by the header of its shard."""
        if not 0 <= index < len(self):
            raise IndexError(f"Indices must be in [0, {len(self)}), got {index} for the triplets in {self.folder}.")
        if self._index and (found := self._index.row(index)):
            return found
        number, row = divmod(index, self.manifest.triplets_per_shard)
        shard = self._shard(number)
        return shard.checked_row(row), shard.header["prompts"][row]

    def prompt_rows(self) -> Tensor:
        """Return indices of triplets that together contain every prompt."""
        # Triplet i has prompt i % num_prompts.
        return torch.arange(min(self.manifest.num_prompts, len(self)))

    def _check_orientation(self) -> None:
        """Raise ValueError if the stored noise is not spatially white with unit variance.

        This detects swapped noise and data.
        """
        count = min(_INSPECTED_ROWS, len(self))
        triplets = self.rows([index * len(self) // count for index in range(count)])
        if _is_unit_white(triplets.noise):
            return
        found = "std {:.3f}, lag-1 autocorrelation {:.3f}".format(*_whiteness(triplets.noise)[:2])
        if _is_unit_white(triplets.data):
            raise ValueError(
                f"Noise and data are swapped in {self.folder}: the stored noise is no white noise ({found}), "
                "the stored data is. Exchange the two tensors in the shards, or make the triplets again."
            )
        require_white(triplets.noise, f"The stored noise in {self.folder}", "Make the triplets again.")


def verify_triplets(folder: str | Path, progress: bool = False) -> TripletDataset:
    """Compare every shard of a folder with its checksum and return the dataset.

    Raises:
        ValueError: shards are missing or damaged. The message gives their number and lists the first ten.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    problems = []
    for shard in tqdm(range(manifest.num_shards), desc="Verifying", unit="shard", disable=not progress):
        try:
            open_shard(folder, manifest, shard).verify()
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        listed = "\n".join(problems[:10])
        raise ValueError(f"{len(problems)} of {manifest.num_shards} shards in {folder} are not sound:\n{listed}")
    return TripletDataset(folder)


def require_white(noise: Tensor, what: str, remedy: str) -> None:
    """Raise ValueError if noise is not spatially white with unit variance."""
    if not _is_unit_white(noise):
        std, autocorrelation, _ = _whiteness(noise)
        raise ValueError(
            f"{what} is not white with unit variance: expected std 1 and lag-1 autocorrelation 0, got std {std:.3f}, "
            f"lag-1 autocorrelation {autocorrelation:.3f}. {remedy}"
        )


def _is_unit_white(latents: Tensor) -> bool:
    """Return whether latents look like independent standard normal values, from variance and neighbors alone.

    The bounds are 0.1 or, for few values, six standard errors: a valid set is rejected about once in 10^8 times.
    Data from a trained teacher has an autocorrelation of several tenths. Latents from an untrained teacher can be
    white too, so this check applies only to the noise.
    """
    std, autocorrelation, pairs = _whiteness(latents)
    variance_bound = max(0.1, 6 * math.sqrt(2 / latents.numel()))
    correlation_bound = max(0.1, 6 / math.sqrt(max(pairs, 1)))
    return abs(std**2 - 1) <= variance_bound and abs(autocorrelation) <= correlation_bound


def _whiteness(latents: Tensor) -> tuple[float, float, int]:
    """Return the root mean square, the correlation of horizontal and vertical neighbors, and the number of pairs."""
    mean_square = latents.square().mean().item()
    across = latents[..., :, 1:] * latents[..., :, :-1]
    down = latents[..., 1:, :] * latents[..., :-1, :]
    pairs = across.numel() + down.numel()
    product = (across.sum() + down.sum()).item() / max(pairs, 1)
    return math.sqrt(mean_square), product / mean_square if mean_square else 0.0, pairs


_SHARED = ("latent_shape", "call_options", "text_embeddings", "vae_scaling_factor", "vae_shift_factor")


def open_triplets(folders: Sequence[str | Path]) -> TripletDataset:
    """Open one folder of triplets, or several as one dataset."""
    return TripletDataset(folders[0]) if len(folders) == 1 else JoinedTriplets(folders)


class JoinedTriplets(TripletDataset):
    """The triplets of several folders, concatenated.

    A folder's share of the training equals its share of all triplets; a folder passed twice counts twice. The folders
    may come from different teachers and guidance scales, but must share one VAE and one size.

    Example:
        ```python
        joined = JoinedTriplets(["triplets", "real-triplets"])
        print(len(joined))
        ```
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        require_type("folders", folders, (list, tuple), "Give the folders of triplets as a list.")
        if not folders:
            raise ValueError("folders must name at least one folder of triplets, got none.")
        self.parts = [TripletDataset(folder) for folder in folders]
        self.manifest = _joined(self.parts)
        *self._starts, _ = accumulate(map(len, self.parts), initial=0)

    @property
    def place(self) -> str:
        return " and ".join(part.place for part in self.parts)

    def _open_files(self) -> None:
        """Open nothing: the parts have the files."""

    def rows(self, indices: Sequence[int] | Tensor) -> Triplets:
        positions: list[list[int]] = [[] for _ in self.parts]
        for position, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"Indices must be in [0, {len(self)}), got {int(index)} for the joined triplets.")
            positions[bisect_right(self._starts, int(index)) - 1].append(position)
        read = [
            part.rows([int(indices[position]) - start for position in own])
            for part, start, own in zip(self.parts, self._starts, positions, strict=True)
        ]
        order = torch.tensor([position for own in positions for position in own], dtype=torch.long).argsort()
        prompts = [prompt for part in read for prompt in part.prompts]
        embeddings = {
            name: _sorted([part.text_embeddings[name] for part in read], order)
            for name in self.manifest.text_embeddings
        }
        noise, data = _sorted([part.noise for part in read], order), _sorted([part.data for part in read], order)
        return Triplets([prompts[i] for i in order.tolist()], noise, data, embeddings)

    def prompt_rows(self) -> Tensor:
        return torch.cat([start + part.prompt_rows() for part, start in zip(self.parts, self._starts, strict=True)])


def _joined(parts: Sequence[TripletDataset]) -> Manifest:
    """Return a manifest for all parts with the settings that reading and training need.

    Raises:
        ValueError: the parts differ in a setting that they must share.
    """
    first, *others = parts
    settings = first.manifest.settings
    for part in others:
        for name in _SHARED:
            expected, found = settings.get(name), part.manifest.settings.get(name)
            if found != expected:
                raise ValueError(
                    f"The triplets in {part.folder} do not go with those in {first.folder}: expected {name} "
                    f"{expected!r}, got {found!r}. Make them again with the same VAE, size and store_text_embeddings."
                )
    return Manifest.of(
        {
            "text_embeddings": None,
            **{name: settings[name] for name in _SHARED if name in settings},
            "num_triplets": sum(map(len, parts)),
            "guidance_scale": first.manifest.guidance_scale,
            "parts": [part.manifest.settings for part in parts],
        }
    )


def _sorted(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    return torch.cat(list(parts))[order]
