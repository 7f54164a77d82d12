"""Triplets (prompt, noise, data): made by a teacher, stored in shards, read by index.

A folder of triplets holds `manifest.json`, which says what made them, and the shards. A shard follows from the
manifest and its number alone, so a run that was stopped goes on with the shards that are missing.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor
from tqdm.auto import tqdm

from rectified_diffusers.arguments import require_type
from rectified_diffusers.data.config import StoredTripletConfig, TripletConfig
from rectified_diffusers.data.manifest import (
    MANIFEST_NAME,
    STORAGE_DTYPES,
    identity,
    new_manifest,
    num_shards,
    read_manifest,
    rows_of,
    settle_manifest,
)
from rectified_diffusers.data.processes import join_processes
from rectified_diffusers.data.prompts import check_prompts, prompts_sha256
from rectified_diffusers.data.shards import (
    Shard,
    holds_shards,
    remove_partial_files,
    require_space,
    shard_number,
    shard_path,
    write_shard,
)
from rectified_diffusers.data.teacher import Teacher

_PROMPT = "prompt."  # before the names of stored text embeddings in a shard
_OPEN_SHARDS = 64  # files and mappings that a dataset holds at once
_INSPECTED_ROWS = 32  # in the check of a dataset when it is opened


@dataclass(frozen=True)
class Triplets:
    """Prompts with the noise and the data that a teacher coupled: `(B, C, H, W)` each, VAE-scaled latents.

    `text_embeddings` are the prompts' as `Denoiser.encode` gives them, `(B, ...)` by name, or empty if not stored.
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


Batches = Callable[[int, range], Iterable[Triplets]]
"""Makes the triplets of a shard, batch by batch, from its number and the indices of its triplets."""


def generate_triplets(
    teacher: Any, prompts: Sequence[str], output_dir: str | Path, config: TripletConfig, progress: bool = True
) -> "TripletDataset":
    """Solve the teacher's ODE from noise to data for every prompt and store the triplets in shards.

    Triplet i has prompt `prompts[i % len(prompts)]`; the noise of shard k is drawn from (seed, k). Run again with the
    same settings, it goes on with the shards that are missing; with other settings it raises. The batch size is no
    such setting: it changes the data by rounding errors of the teacher at most, and the noise not at all.

    Under `accelerate launch` the missing shards are divided among the processes, and the files are the same whatever
    their number. Other processes may write to the same folder at the same time: what is made twice is made equal.

    Args:
        teacher: a diffusers text-to-image pipeline, epsilon, v or flow, on the device of this process; it is not
            changed.
        prompts: a list, or what `open_prompts` opened.
    """
    require_type("config", config, TripletConfig, "Make one: TripletConfig(num_triplets=1000).")
    prompts = check_prompts(prompts)
    adapted = Teacher.of(teacher, config)

    def batches(shard: int, indices: range) -> Iterator[Triplets]:
        # The noise of a short last shard is the beginning of a whole one's.
        drawn = draw_noise(config.seed, shard, (config.triplets_per_shard, *adapted.latent_shape))
        noise = adapted.round(drawn[: len(indices)])
        for start in range(0, len(indices), config.batch_size):
            batch = slice(start, start + config.batch_size)
            own = [prompts[index % len(prompts)] for index in indices[batch]]
            embeddings = adapted.encode(own) if config.store_text_embeddings else {}
            yield Triplets(own, noise[batch], adapted(own, noise[batch]), embeddings)

    manifest = make_manifest(adapted, config, len(prompts), prompts_sha256(prompts))
    return write_triplets(output_dir, manifest, batches, progress)


def write_triplets(
    output_dir: str | Path, manifest: dict[str, Any], batches: Batches, progress: bool
) -> "TripletDataset":
    """Make the shards of a folder that are missing, on as many processes as there are."""
    folder = Path(output_dir)
    processes = join_processes()
    with processes.main_process_first():
        is_new = processes.is_main_process and not (folder / MANIFEST_NAME).exists()
        if processes.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            remove_partial_files(folder)
        manifest = settle_manifest(folder, manifest)  # which holds every process to it
    missing = _missing_shards(folder, manifest, processes)
    mine = missing[processes.process_index :: processes.num_processes]
    done = manifest["num_triplets"] - sum(rows_of(manifest, shard) for shard in missing)
    total = done + sum(rows_of(manifest, shard) for shard in mine)
    several = f", process 1 of {processes.num_processes}" if processes.num_processes > 1 else ""
    hidden = not (progress and processes.is_main_process)
    bar = tqdm(total=total, initial=done, desc=f"Triplets{several}", unit="image", disable=hidden)
    with bar as progress_bar, _settings_can_change(folder, is_new):
        for shard in mine:
            if _is_there(folder, manifest, shard):  # by another process meanwhile
                progress_bar.update(rows_of(manifest, shard))
            else:
                _make_shard(folder, manifest, shard, batches, progress_bar)
    processes.wait_for_everyone()
    return TripletDataset(folder)


@contextmanager
def _settings_can_change(folder: Path, is_new: bool) -> Iterator[None]:
    """Take the manifest of a new folder back where the first triplets are refused: it is for other settings, then."""
    try:
        yield
    except ValueError:
        if is_new and not holds_shards(folder):
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
        raise


def _missing_shards(folder: Path, manifest: dict[str, Any], processes: PartialState) -> list[int]:
    """List what is to be made, as the main process sees it; raise if there is no room for it."""
    count = num_shards(manifest)
    there = torch.zeros(count, dtype=torch.uint8)
    if processes.is_main_process:
        there = torch.tensor([_is_there(folder, manifest, shard) for shard in range(count)], dtype=torch.uint8)
    flags: Any = broadcast(there.to(processes.device))
    missing = (flags == 0).nonzero().flatten().tolist()
    if processes.is_main_process:
        values = sum(math.prod(shape) for shape in _row_shapes(manifest).values())
        size = values * getattr(torch, manifest["storage_dtype"]).itemsize
        require_space(folder, size * sum(rows_of(manifest, shard) for shard in missing))
    return missing


def draw_noise(seed: int, shard: int, shape: tuple[int, ...]) -> Tensor:
    """Draw the noise of one shard, a function of (seed, shard) on every machine: a CPU generator, float32."""
    digest = hashlib.blake2b(f"{seed}/{shard}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(shape, generator=generator)


def _make_shard(folder: Path, manifest: dict[str, Any], shard: int, batches: Batches, progress_bar: Any) -> None:
    """Make the triplets of one shard and write them."""
    first, rows = shard * manifest["triplets_per_shard"], rows_of(manifest, shard)
    dtype = getattr(torch, manifest["storage_dtype"])
    tensors = {name: torch.empty(rows, *shape, dtype=dtype) for name, shape in _row_shapes(manifest).items()}
    prompts: list[str] = []
    for made in batches(shard, range(first, first + rows)):
        place = slice(len(prompts), len(prompts) + len(made))
        embeddings = {f"{_PROMPT}{name}": part for name, part in made.text_embeddings.items()}
        for name, part in {"noise": made.noise, "data": made.data, **embeddings}.items():
            tensors[name][place] = part
            _check_finite(name, tensors[name][place], made.prompts, shard)
        prompts += made.prompts
        progress_bar.update(len(made))
    header = {"shard": shard, "manifest": identity(manifest), "prompts": prompts}
    write_shard(shard_path(folder, shard), tensors, header)


def _check_finite(name: str, values: Tensor, prompts: Sequence[str], shard: int) -> None:
    for prompt, row in zip(prompts, values, strict=True):
        if not row.isfinite().all():
            raise ValueError(
                f"The teacher's {name} for prompt {prompt!r} in shard {shard} is not finite in {values.dtype}. "
                "Load the teacher in float32 or bfloat16, or set another storage_dtype; finished shards are kept."
            )


def make_manifest(
    teacher: Teacher, config: StoredTripletConfig, num_prompts: int, sha256: str, **more: Any
) -> dict[str, Any]:
    """Write down all that decides the triplets, and under `made_with` what helps to find it again.

    Args:
        num_prompts: of the first triplets, which have all the prompts there are.
        sha256: of the prompts.
        more: what else decides the triplets, or is other than the teacher says.
    """
    embeddings = teacher.encode([""]) if config.store_text_embeddings else {}
    settings = {
        "num_triplets": config.num_triplets,
        "triplets_per_shard": config.triplets_per_shard,
        "seed": config.seed,
        "storage_dtype": config.storage_dtype,
        "num_prompts": num_prompts,
        "prompts_sha256": sha256,
        "text_embeddings": {name: list(part.shape[1:]) for name, part in embeddings.items()} or None,
        **teacher.settings(),
        **more,
    }
    return new_manifest(**settings, made_with=teacher.provenance())


def _row_shapes(manifest: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Give the shape of a row of every tensor in a shard."""
    latents = tuple(manifest["latent_shape"])
    embeddings = manifest.get("text_embeddings") or {}
    return {"noise": latents, "data": latents, **{f"{_PROMPT}{name}": tuple(s) for name, s in embeddings.items()}}


def _is_there(folder: Path, manifest: dict[str, Any], shard: int) -> bool:
    """Tell whether a shard is present and as it was written, which is all read for; a damaged one raises."""
    if not shard_path(folder, shard).exists():
        return False
    _open_shard(folder, manifest, shard).verify()
    return True


def _open_shard(folder: Path, manifest: dict[str, Any], shard: int) -> Shard:
    """Open a shard and check that it is the one that the manifest speaks of, without reading its rows."""
    opened = Shard.open(shard_path(folder, shard))
    rows = rows_of(manifest, shard)
    dtype = STORAGE_DTYPES[manifest["storage_dtype"]]
    layout = {name: (dtype, (rows, *shape)) for name, shape in _row_shapes(manifest).items()}
    expected = (shard, identity(manifest), rows, layout)
    header = opened.header
    prompts = header.get("prompts")
    texts = len(prompts) if isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts) else None
    found = (header.get("shard"), header.get("manifest"), texts, opened.layout())
    for name, here, there in zip(("number", "manifest", "number of prompts", "layout"), expected, found, strict=True):
        if here != there:
            raise ValueError(
                f"{opened.path} does not belong to the manifest beside it: expected {name} {here!r}, got {there!r}. "
                "Delete it and make it again with generate_triplets."
            )
    return opened


class TripletDataset:
    """Triplets in a folder, read when asked for; memory does not grow with their number.

    Opening one reads a few rows only; `verify_triplets` reads all.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        count = num_shards(self.manifest)
        there = bytearray(min(count, 1 + sum(1 for _ in os.scandir(self.folder))))  # one more than there can be
        present = 0
        for entry in os.scandir(self.folder):
            number = shard_number(entry.name)
            if number is not None and number < count:
                present += 1
                if number < len(there):
                    there[number] = 1
        if present < count:
            raise ValueError(
                f"{count - present} of {count} shards are missing in {self.folder}, first: "
                f"{shard_path(self.folder, there.index(0)).name}. Run the same `rectified-diffusers triplets` "
                "or `real-triplets` command or call again: it makes what is missing."
            )
        self._shard = lru_cache(_OPEN_SHARDS)(lambda shard: _open_shard(self.folder, self.manifest, shard))
        self._shard(0)  # holds the shapes of the manifest to those of a file
        self._check_orientation()

    def __len__(self) -> int:
        return self.manifest["num_triplets"]

    def rows(self, indices: Sequence[int] | Tensor) -> Triplets:
        """Read the triplets with the given indices, in that order, as float32.

        Each is compared with its checksum, so that a file that changed on the disk is an error and no training data.
        """
        parts = {name: torch.empty(len(indices), *shape) for name, shape in _row_shapes(self.manifest).items()}
        prompts = [""] * len(indices)
        for position in sorted(range(len(indices)), key=lambda position: indices[position]):
            index = int(indices[position])
            if not 0 <= index < len(self):
                raise IndexError(
                    f"Indices must be in [0, {len(self)}), got {index} for the triplets in {self.folder}."
                )
            number, row = divmod(index, self.manifest["triplets_per_shard"])
            shard = self._shard(number)
            for name, values in shard.checked_row(row).items():
                parts[name][position] = values
            prompts[position] = shard.header["prompts"][row]
        noise, data = parts.pop("noise"), parts.pop("data")
        return Triplets(prompts, noise, data, {name.removeprefix(_PROMPT): part for name, part in parts.items()})

    def prompt_rows(self) -> Tensor:
        """Number triplets that together have every prompt there is."""
        # Triplet i has prompt i % num_prompts.
        return torch.arange(min(self.manifest["num_prompts"], len(self)))

    def _check_orientation(self) -> None:
        """Raise if the stored noise is not spatially white with unit variance, which swapped ends would show."""
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
    """Read every shard of a folder and compare it with its checksum; raise naming all that are missing or damaged."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = []
    for shard in tqdm(range(num_shards(manifest)), desc="Verifying", unit="shard", disable=not progress):
        try:
            _open_shard(folder, manifest, shard).verify()
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        listed = "\n".join(problems[:10])
        raise ValueError(f"{len(problems)} of {num_shards(manifest)} shards in {folder} are not sound:\n{listed}")
    return TripletDataset(folder)


def require_white(noise: Tensor, what: str, remedy: str) -> None:
    """Raise if noise is not spatially white with unit variance."""
    if not _is_unit_white(noise):
        std, autocorrelation, _ = _whiteness(noise)
        raise ValueError(
            f"{what} is not white with unit variance: expected std 1 and lag-1 autocorrelation 0, got std {std:.3f}, "
            f"lag-1 autocorrelation {autocorrelation:.3f}. {remedy}"
        )


def _is_unit_white(latents: Tensor) -> bool:
    """Tell whether latents look like independent standard normal numbers, from variance and neighbours alone.

    The bounds are 0.1 or, for few numbers, six standard errors: a right set is refused about once in 10^8 times.
    Data of a trained teacher has an autocorrelation of several tenths; latents of an untrained one may be white too,
    which is why only the noise is held to this.
    """
    std, autocorrelation, pairs = _whiteness(latents)
    variance_bound = max(0.1, 6 * math.sqrt(2 / latents.numel()))
    correlation_bound = max(0.1, 6 / math.sqrt(max(pairs, 1)))
    return abs(std**2 - 1) <= variance_bound and abs(autocorrelation) <= correlation_bound


def _whiteness(latents: Tensor) -> tuple[float, float, int]:
    """Return root mean square, correlation of horizontal and vertical neighbours, and their number."""
    mean_square = latents.square().mean().item()
    across = latents[..., :, 1:] * latents[..., :, :-1]
    down = latents[..., 1:, :] * latents[..., :-1, :]
    pairs = across.numel() + down.numel()
    product = (across.sum() + down.sum()).item() / max(pairs, 1)
    return math.sqrt(mean_square), product / mean_square if mean_square else 0.0, pairs
