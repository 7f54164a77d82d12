"""Triplets (prompt, noise, data): made by a teacher, stored in shards, read by index.

A folder of triplets holds `manifest.json`, which says what made them, and the shards. A shard follows from the
manifest and its number alone, so a run that was stopped goes on with the shards that are missing.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.prompts import check_prompts
from rectified_diffusers.data.shards import Shard, remove_partial_files, shard_path, write_atomically, write_shard
from rectified_diffusers.data.teacher import Teacher

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
_FORMAT = 1
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # ours -> safetensors'
_OPEN_SHARDS = 64  # files and mappings that a dataset holds at once
_INSPECTED_ROWS = 32  # in the check of a dataset when it is opened


@dataclass(frozen=True)
class Triplets:
    """Prompts with the noise and the data that a teacher coupled: `(B, C, H, W)` each, VAE-scaled latents."""

    prompts: list[str]
    noise: Tensor
    data: Tensor

    def __post_init__(self) -> None:
        if self.noise.shape != self.data.shape or len(self.noise) != len(self.prompts):
            raise ValueError(
                f"Triplets need noise and data of one shape and a prompt for each, got {len(self.prompts)} prompts, "
                f"noise {tuple(self.noise.shape)} and data {tuple(self.data.shape)}."
            )

    def __len__(self) -> int:
        return len(self.prompts)


def generate_triplets(
    teacher: Any, prompts: Sequence[str], output_dir: str | Path, config: TripletConfig, progress: bool = True
) -> "TripletDataset":
    """Solve the teacher's ODE from noise to data for every prompt and store the triplets in shards.

    Triplet i has prompt `prompts[i % len(prompts)]`; the noise of shard k is drawn from (seed, k). Run again with the
    same settings, it goes on with the shards that are missing; with other settings it raises. The batch size is no
    such setting: it changes the data by rounding errors of the teacher at most, and the noise not at all.

    Args:
        teacher: a diffusers text-to-image pipeline, epsilon, v or flow; it is not changed.
    """
    prompts = check_prompts(prompts)
    adapted = Teacher.of(teacher, config)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial_files(folder)
    manifest = _settle_manifest(folder, _make_manifest(adapted, prompts, config))
    missing = [shard for shard in range(_num_shards(manifest)) if not _is_there(folder, manifest, shard)]
    done = config.num_triplets - sum(_rows_of(manifest, shard) for shard in missing)
    with tqdm(
        total=config.num_triplets, initial=done, desc="Triplets", unit="image", disable=not progress
    ) as progress_bar:
        for shard in missing:
            triplets = _make_shard(adapted, prompts, manifest, shard, progress_bar)
            header = {"shard": shard, "manifest": _identity(manifest), "prompts": triplets.prompts}
            write_shard(shard_path(folder, shard), {"noise": triplets.noise, "data": triplets.data}, header)
    return TripletDataset(folder)


def draw_noise(seed: int, shard: int, shape: tuple[int, ...]) -> Tensor:
    """Draw the noise of one shard, a function of (seed, shard) on every machine: a CPU generator, float32."""
    digest = hashlib.blake2b(f"{seed}/{shard}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(shape, generator=generator)


def _make_shard(
    teacher: Teacher, prompts: Sequence[str], manifest: dict[str, Any], shard: int, progress_bar: Any
) -> Triplets:
    """Make the triplets of one shard. The noise of a short last shard is the beginning of a whole one's."""
    first, rows = shard * manifest["triplets_per_shard"], _rows_of(manifest, shard)
    shape = (manifest["triplets_per_shard"], *manifest["latent_shape"])
    noise = teacher.round(draw_noise(manifest["seed"], shard, shape)[:rows])
    own_prompts = [prompts[index % len(prompts)] for index in range(first, first + rows)]
    data = torch.empty_like(noise)
    for start in range(0, rows, teacher.config.batch_size):
        batch = slice(start, start + teacher.config.batch_size)
        data[batch] = teacher(own_prompts[batch], noise[batch])
        _check_finite(data[batch], own_prompts[batch], shard)
        progress_bar.update(len(own_prompts[batch]))
    return Triplets(own_prompts, noise, data)


def _check_finite(data: Tensor, prompts: Sequence[str], shard: int) -> None:
    for prompt, latents in zip(prompts, data, strict=True):
        if not latents.isfinite().all():
            raise ValueError(
                f"The teacher's data for prompt {prompt!r} in shard {shard} is not finite in {data.dtype}. "
                "Load the teacher in float32 or bfloat16, or set another storage_dtype; finished shards are kept."
            )


def _make_manifest(teacher: Teacher, prompts: Sequence[str], config: TripletConfig) -> dict[str, Any]:
    """Write down all that decides the triplets, and under `made_with` what helps to find it again."""
    prompts_digest = hashlib.sha256()
    for prompt in prompts:
        prompts_digest.update(json.dumps(prompt).encode() + b"\n")
    return {
        "format": _FORMAT,
        "num_triplets": config.num_triplets,
        "triplets_per_shard": config.triplets_per_shard,
        "seed": config.seed,
        "storage_dtype": config.storage_dtype,
        "num_prompts": len(prompts),
        "prompts_sha256": prompts_digest.hexdigest(),
        **teacher.settings(),
        "made_with": teacher.provenance(),
    }


def _settle_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a new folder, or hold this run to the one that is there and return that."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())
        return manifest
    found = read_manifest(folder)
    differing = _first_difference(
        {key: value for key, value in found.items() if key != "made_with"},
        {key: value for key, value in manifest.items() if key != "made_with"},
    )
    if differing:
        key, there, here = differing
        raise ValueError(
            f"The triplets in {folder} were made with other settings: expected {key} = {there!r}, got {here!r}. "
            f"Use the settings in {path} to go on, or choose another output_dir."
        )
    # Every triplet is what its teacher answered, whatever release computed it: releases differ in rounding, and
    # refusing would cost a long run its shards for an upgrade. A moved teacher folder is the same teacher.
    differing = _first_difference(found["made_with"], manifest["made_with"])
    if differing:
        key, there, here = differing
        logger.warning("The triplets in %s were begun with %s = %r, now it is %r; going on.", folder, key, there, here)
    return found


def _first_difference(found: dict[str, Any], expected: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the dotted key, the value found and the one expected where two manifests first differ.

    Inside a nested object, such as a solver's config, keys that one side lacks are options of another release.
    """
    for key in [*found, *(key for key in expected if key not in found)]:
        there, here = found.get(key), expected.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            nested = _first_difference(
                {name: there[name] for name in there if name in here},
                {name: here[name] for name in there if name in here},
            )
            if nested:
                return f"{key}.{nested[0]}", nested[1], nested[2]
        elif there != here:
            return key, there, here
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what made the triplets in a folder."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; give a folder that generate_triplets has written.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        written = manifest["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no manifest of triplets ({error!r}); restore it or make the folder again."
        ) from error
    if written != _FORMAT:
        raise ValueError(f"{path} has format {written!r}, expected {_FORMAT}; read it with the release that wrote it.")
    return manifest


def _identity(manifest: dict[str, Any]) -> str:
    """Return a SHA-256 that ties shards to the settings of their manifest."""
    settings = {key: value for key, value in manifest.items() if key != "made_with"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _num_shards(manifest: dict[str, Any]) -> int:
    return math.ceil(manifest["num_triplets"] / manifest["triplets_per_shard"])


def _rows_of(manifest: dict[str, Any], shard: int) -> int:
    return min(manifest["triplets_per_shard"], manifest["num_triplets"] - shard * manifest["triplets_per_shard"])


def _is_there(folder: Path, manifest: dict[str, Any], shard: int) -> bool:
    """Tell whether a shard is present and complete; a damaged one raises."""
    if not shard_path(folder, shard).exists():
        return False
    _open_shard(folder, manifest, shard)
    return True


def _open_shard(folder: Path, manifest: dict[str, Any], shard: int) -> Shard:
    """Open a shard and check that it is the one that the manifest speaks of, without reading its rows."""
    opened = Shard.open(shard_path(folder, shard))
    rows = _rows_of(manifest, shard)
    layout = (_DTYPES[manifest["storage_dtype"]], (rows, *manifest["latent_shape"]))
    expected = (shard, _identity(manifest), rows, {"noise": layout, "data": layout})
    header = opened.header
    found = (header.get("shard"), header.get("manifest"), len(header.get("prompts", ())), opened.layout())
    for name, here, there in zip(("number", "manifest", "number of prompts", "layout"), expected, found, strict=True):
        if here != there:
            raise ValueError(
                f"{opened.path} does not belong to the manifest beside it: expected {name} {here!r}, got {there!r}. "
                "Delete it and make it again with generate_triplets."
            )
    return opened


class TripletDataset:
    """Triplets in a folder, read when asked for; memory does not grow with their number."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        names = {path.name for path in self.folder.iterdir()}
        shards = range(_num_shards(self.manifest))
        missing = [shard for shard in shards if shard_path(self.folder, shard).name not in names]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(shards)} shards are missing in {self.folder}, first: "
                f"{shard_path(self.folder, missing[0]).name}. Run the same `rectified-diffusers triplets` command or "
                "generate_triplets call again: it makes what is missing."
            )
        self._shard = lru_cache(_OPEN_SHARDS)(lambda shard: _open_shard(self.folder, self.manifest, shard))
        self._check_orientation()

    def __len__(self) -> int:
        return self.manifest["num_triplets"]

    def rows(self, indices: Sequence[int] | Tensor) -> Triplets:
        """Read the triplets with the given indices, in that order, as float32."""
        shape = (len(indices), *self.manifest["latent_shape"])
        noise, data, prompts = torch.empty(shape), torch.empty(shape), [""] * len(indices)
        for position in sorted(range(len(indices)), key=lambda position: indices[position]):
            index = int(indices[position])
            if not 0 <= index < len(self):
                raise IndexError(
                    f"Indices must be in [0, {len(self)}), got {index} for the triplets in {self.folder}."
                )
            number, row = divmod(index, self.manifest["triplets_per_shard"])
            shard = self._shard(number)
            noise[position], data[position] = shard.row("noise", row), shard.row("data", row)
            prompts[position] = shard.header["prompts"][row]
        return Triplets(prompts, noise, data)

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
        raise ValueError(
            f"The stored noise in {self.folder} is not white with unit variance: expected std 1 and lag-1 "
            f"autocorrelation 0, got {found}. Make the triplets again with generate_triplets."
        )


def verify_triplets(folder: str | Path, progress: bool = False) -> TripletDataset:
    """Read every shard of a folder and compare it with its checksum; raise naming all that are missing or damaged."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = []
    for shard in tqdm(range(_num_shards(manifest)), desc="Verifying", unit="shard", disable=not progress):
        try:
            _open_shard(folder, manifest, shard).verify()
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        listed = "\n".join(problems[:10])
        raise ValueError(f"{len(problems)} of {_num_shards(manifest)} shards in {folder} are not sound:\n{listed}")
    return TripletDataset(folder)


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
