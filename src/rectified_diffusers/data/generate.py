"""Generate triplets: the teacher samples data from noise for each prompt, shard by shard. Resumable."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from tqdm.auto import tqdm

from rectified_diffusers.checks import require_type
from rectified_diffusers.data.claims import Claims
from rectified_diffusers.data.config import StoredTripletConfig, TripletConfig
from rectified_diffusers.data.dataset import TripletDataset, Triplets, open_shard
from rectified_diffusers.data.manifest import FORMAT, MANIFEST_NAME, PROMPT, Manifest, settle_manifest
from rectified_diffusers.data.prompts import check_prompts, prompts_sha256
from rectified_diffusers.data.shards import holds_shards, shard_path, write_shard
from rectified_diffusers.data.teacher import Teacher
from rectified_diffusers.distributed import join_processes
from rectified_diffusers.files import lock, remove_leftovers, require_space
from rectified_diffusers.seeds import generator_of

_WAIT = 0.5  # seconds between two looks for the shards of other processes
_VERIFYING_THREADS = min(4, os.cpu_count() or 1)
_DAMAGED = 2  # the flag of a damaged shard

Batches = Callable[[int, range], Iterable[Triplets]]
"""Generates the triplets of a shard, batch by batch, from the shard number and the indices of its triplets."""


def generate_triplets(
    teacher: Any, prompts: Sequence[str], output_dir: str | Path, config: TripletConfig, progress: bool = True
) -> TripletDataset:
    """Solve the teacher's ODE from noise to data for every prompt and store the triplets in shards.

    Triplet i has prompt `prompts[i % len(prompts)]`. The noise of shard k is sampled from (seed, k). A second call
    with the same settings generates the missing shards; a call with different settings raises. The batch size may
    differ: it changes the data by at most the teacher's rounding errors, and does not change the noise.

    Processes of `accelerate launch`, and several runs in the same folder, divide the missing shards: each claims the
    next one that is free. The files do not depend on the number of processes.

    Args:
        teacher: a diffusers text-to-image pipeline (epsilon, v or flow prediction) on the device of this process. It
            is not modified.
        prompts: a list, or the result of `open_prompts`.

    Example:
        ```python
        config = TripletConfig(num_triplets=8, num_inference_steps=25)
        triplets = generate_triplets(teacher, open_prompts("prompts.txt"), "triplets", config)
        print(triplets.rows([0]).prompts)
        ```
    """
    require_type("config", config, TripletConfig, "Make one: TripletConfig(num_triplets=1000).")
    prompts = check_prompts(prompts)
    adapted = Teacher.of(teacher, config)

    def batches(shard: int, indices: range) -> Iterator[Triplets]:
        # The noise of a short last shard is the first part of the noise of a full shard.
        drawn = draw_noise(config.seed, shard, (config.triplets_per_shard, *adapted.latent_shape))
        noise = adapted.round(drawn[: len(indices)])
        for start in range(0, len(indices), config.batch_size):
            batch = slice(start, start + config.batch_size)
            own = [prompts[index % len(prompts)] for index in indices[batch]]
            embeddings = adapted.encode(own) if config.store_text_embeddings else {}
            yield Triplets(own, noise[batch], adapted(own, noise[batch]), embeddings)

    manifest = make_manifest(adapted, config, len(prompts), prompts_sha256(prompts))
    return write_triplets(output_dir, manifest, batches, progress)


def write_triplets(output_dir: str | Path, manifest: Manifest, batches: Batches, progress: bool) -> TripletDataset:
    """Generate the missing shards of a folder together with all processes that do so, and return the dataset."""
    folder = Path(output_dir)
    processes = join_processes()
    with processes.main_process_first():
        is_new = processes.is_main_process and not (folder / MANIFEST_NAME).exists()
        folder.mkdir(parents=True, exist_ok=True)
        if processes.is_main_process:
            with lock(folder) as nobody_writes:
                if nobody_writes:
                    remove_leftovers(folder)
    with lock(folder, shared=True):  # from here on, nobody removes our temporary files
        with processes.main_process_first():
            manifest = settle_manifest(folder, manifest)  # every process must match it
        missing = _missing_shards(folder, manifest, processes)
        done = manifest.num_triplets - sum(map(manifest.rows, missing))
        hidden = not (progress and processes.is_main_process)
        bar = tqdm(total=manifest.num_triplets, initial=done, desc="Triplets", unit="image", disable=hidden)
        with bar as progress_bar, _settings_can_change(folder, is_new):
            _make_shards(folder, manifest, missing, batches, progress_bar)
    processes.wait_for_everyone()
    return TripletDataset(folder)


def _make_shards(folder: Path, manifest: Manifest, missing: list[int], batches: Batches, progress_bar: Any) -> None:
    """Make the missing shards that no other process makes, and wait for those that others make."""
    claims, missing = Claims(folder), list(missing)

    def make_next() -> bool:
        """Make the first shard that is free; return whether there was one."""
        for shard in list(missing):
            if shard_path(folder, shard).exists():  # made by another process
                progress_bar.update(manifest.rows(shard))
                missing.remove(shard)
                continue
            with claims.claim(shard) as free:
                if free and not shard_path(folder, shard).exists():
                    _make_shard(folder, manifest, shard, batches, progress_bar)
                    missing.remove(shard)
                    return True
        return False

    while missing:
        if not make_next() and missing:
            time.sleep(_WAIT)


@contextmanager
def _settings_can_change(folder: Path, is_new: bool) -> Iterator[None]:
    """Remove the manifest of a new folder if its first triplets are rejected, so that the settings can change."""
    try:
        yield
    except ValueError:
        if is_new and not holds_shards(folder):
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
        raise


def _missing_shards(folder: Path, manifest: Manifest, processes: PartialState) -> list[int]:
    """Return the missing shards; raise OSError if the disk has no room for them, ValueError if a shard is damaged.

    Each process verifies its part of the shards. The flags are 1 for shards that are there and 2 for damaged ones.
    """
    count = manifest.num_shards
    flags = torch.zeros(count, dtype=torch.int32)
    mine = range(processes.process_index, count, processes.num_processes)
    with ThreadPoolExecutor(_VERIFYING_THREADS) as pool:  # hashing releases the interpreter
        for shard, flag in zip(mine, pool.map(lambda shard: _flag(folder, manifest, shard), mine), strict=True):
            flags[shard] = flag
    found: Any = reduce(flags.to(processes.device), "sum")
    for shard in (found == _DAMAGED).nonzero().flatten().tolist():
        open_shard(folder, manifest, shard).verify()  # raises in every process
    missing = (found == 0).nonzero().flatten().tolist()
    if processes.is_main_process:
        values = sum(map(math.prod, manifest.row_shapes.values())) * sum(map(manifest.rows, missing))
        size = values * getattr(torch, manifest.storage_dtype).itemsize
        require_space(folder, size, f"the {len(missing)} shards to write")
    return missing


def draw_noise(seed: int, shard: int, shape: tuple[int, ...]) -> Tensor:
    """Return the float32 noise of one shard, from a CPU generator: the same on every machine for (seed, shard)."""
    return torch.randn(shape, generator=generator_of(seed, shard))


def _make_shard(folder: Path, manifest: Manifest, shard: int, batches: Batches, progress_bar: Any) -> None:
    """Generate the triplets of one shard and write them."""
    first, rows = shard * manifest.triplets_per_shard, manifest.rows(shard)
    dtype = getattr(torch, manifest.storage_dtype)
    tensors = {name: torch.empty(rows, *shape, dtype=dtype) for name, shape in manifest.row_shapes.items()}
    prompts: list[str] = []
    for made in batches(shard, range(first, first + rows)):
        place = slice(len(prompts), len(prompts) + len(made))
        embeddings = {f"{PROMPT}{name}": part for name, part in made.text_embeddings.items()}
        for name, part in {"noise": made.noise, "data": made.data, **embeddings}.items():
            tensors[name][place] = part
            _check_finite(name, tensors[name][place], made.prompts, shard)
        prompts += made.prompts
        progress_bar.update(len(made))
    header = {"shard": shard, "manifest": manifest.identity, "prompts": prompts}
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
) -> Manifest:
    """Return a manifest with all settings that determine the triplets, and their origin.

    Args:
        num_prompts: number of prompts. The first `num_prompts` triplets contain all of them.
        sha256: SHA-256 of the prompts.
        more: further settings that determine the triplets, or that override the teacher's.
    """
    embeddings = teacher.encode(["a"]) if config.store_text_embeddings else {}
    settings = {
        "format": FORMAT,
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
    return Manifest.of(settings, teacher.provenance())


def _flag(folder: Path, manifest: Manifest, shard: int) -> int:
    """Return 0 for a shard that is missing, 1 for one that equals its checksum, and `_DAMAGED` for any other."""
    if not shard_path(folder, shard).exists():
        return 0
    try:
        open_shard(folder, manifest, shard).verify()
    except (ValueError, OSError):
        return _DAMAGED
    return 1
