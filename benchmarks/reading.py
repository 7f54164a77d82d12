"""Measure reading of random rows from many shards: bytes and seconds of a row, and how long a step waits.

    python benchmarks/reading.py work/reading --shards 1000
    python benchmarks/reading.py work/reading --shards 12500 --sparse --output benchmarks/results/reading_sparse

The shards are synthetic, in the shapes of Stable Diffusion 1.5 at 512x512: 256 rows of 65,536 bytes each, with their
prompts. `--sparse` writes only the headers: the rows are holes, which the file system gives as zeros without the disk.
"before" is the reading of commit a930979: a memory map and a header parsed for each opened shard, 64 kept open, within
the step. It is kept here alone. "after" is `TripletDataset` and `RowReader`.

Each measurement runs in its own process. "cold" drops the shards and the index from the page cache with
`posix_fadvise`; "warm" reads the same rows once more. Bytes are `read_bytes` of /proc/self/io, which counts what
the disk was asked for, read-ahead included. A step computes for a stated time, a sleep, and reads 64 new rows.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from machine import provenance, write_results
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.index import INDEX_NAME
from rectified_diffusers.data.manifest import FORMAT, Manifest
from rectified_diffusers.data.shards import Shard, shard_path, write_shard
from rectified_diffusers.training.reading import RowReader

SHAPE, ROWS, BATCH = (4, 64, 64), 256, 64
ROW_BYTES = 2 * 2 * 4 * 64 * 64
OPEN_SHARDS = 64
WORKERS = (0, 1, 2, 4)
Read = Callable[[list[int]], object]


def manifest_of(shards: int) -> Manifest:
    settings = {"format": FORMAT, "num_triplets": shards * ROWS, "triplets_per_shard": ROWS, "seed": 0}
    rest = {"storage_dtype": "float16", "num_prompts": shards * ROWS, "latent_shape": list(SHAPE)}
    return Manifest.of({**settings, **rest}, origin={})


def write_shards(folder: Path, shards: int, sparse: bool) -> None:
    """Write a folder of triplets. All shards have the same rows, hashed once, and differ in their prompts' numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest, generator = manifest_of(shards), torch.Generator().manual_seed(0)
    noise = torch.zeros(ROWS, *SHAPE) if sparse else torch.randn(ROWS, *SHAPE, generator=generator)
    template = folder / "template"
    write_shard(template, {"noise": noise.half(), "data": noise.flip(0).half()}, {"manifest": manifest.identity})
    header, content = Shard.open(template).header, template.read_bytes()[-ROWS * ROW_BYTES :]
    half = len(content) // 2
    entries = {
        name: {"dtype": "F16", "shape": [ROWS, *SHAPE], "data_offsets": [start, start + half]}
        for name, start in (("data", 0), ("noise", half))
    }
    template.unlink()
    for shard in range(shards):
        numbers = range(shard * ROWS, (shard + 1) * ROWS)
        prompts = [f"a photograph of astronaut number {number:08d} riding a horse" for number in numbers]
        line = json.dumps({**header, "shard": shard, "prompts": prompts}, sort_keys=True)
        metadata = {"rectified_diffusers": f"{line}\n{zlib.crc32(line.encode()):08x}"}
        text = json.dumps({"__metadata__": metadata, **entries}).encode()
        text += b" " * (-len(text) % 8)
        with shard_path(folder, shard).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                file.truncate(8 + len(text) + len(content))
            else:
                file.write(content)
    manifest.write(folder)
    os.sync()


def drop_caches(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def reading_before(folder: Path, shards: int) -> Read:
    """Return the reading of rows as it was: memory maps, a header parsed whenever a shard is opened."""
    from safetensors import safe_open

    def open_shard(shard: int) -> tuple[Any, dict[str, Any]]:
        file: Any = safe_open(shard_path(folder, shard), framework="pt")
        line, _, checksum = file.metadata()["rectified_diffusers"].partition("\n")
        assert checksum == f"{zlib.crc32(line.encode()):08x}"
        return file, json.loads(line)

    opened = lru_cache(OPEN_SHARDS)(open_shard)

    def read(rows: Sequence[int]) -> object:
        parts, prompts = {name: torch.empty(len(rows), *SHAPE) for name in ("data", "noise")}, [""] * len(rows)
        for position in sorted(range(len(rows)), key=lambda position: rows[position]):
            file, header = opened(rows[position] // ROWS)
            row, checksum = rows[position] % ROWS, 0
            for name, part in parts.items():
                value = file.get_slice(name)[row]
                checksum = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy(), checksum)
                part[position] = value
            assert checksum == header["rows_crc32"][row]
            prompts[position] = header["prompts"][row]
        return prompts, parts

    return read


def reading_after(folder: Path, shards: int) -> Read:
    return _dataset(folder).rows


def _dataset(folder: Path) -> TripletDataset:
    """Open the dataset, and write its index if there is none; shards of zeros fail the check of the noise."""
    with mock.patch.object(TripletDataset, "_check_orientation"):
        return TripletDataset(folder)


def batches_of(count: int, shards: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shards * ROWS, (count, BATCH), generator=generator).tolist()


def measure_rows(folder: Path, shards: int, which: str, count: int) -> dict[str, float]:
    """Return bytes and seconds of a row, cold and warm."""
    read = {"before": reading_before, "after": reading_after}[which](folder, shards)
    read([0])
    batches, result = batches_of(count, shards, seed=1), {}
    drop_caches(folder)
    for state in ("cold", "warm"):
        begun, start, work = bytes_read(), time.perf_counter(), time.process_time()
        for rows in batches:
            read(rows)
        result[f"{state} bytes"] = (bytes_read() - begun) / count / BATCH
        result[f"{state} seconds"] = (time.perf_counter() - start) / count / BATCH
        result[f"{state} processor"] = (time.process_time() - work) / count / BATCH
    return result


def measure_steps(folder: Path, shards: int, which: str, workers: int, steps: int, compute: float) -> dict[str, float]:
    """Return the share of a step that waits for its rows, cold: without the first steps, which fill the queue."""
    batches, fill = batches_of(steps, shards, seed=2), max(2, steps // 5)
    dataset = _dataset(folder)
    before, reader = reading_before(folder, shards), RowReader(dataset, workers, torch.device("cpu"))
    read: Read = before if which == "before" else lambda rows: reader.rows(rows)
    drop_caches(folder)
    waits = []
    with reader.ahead(batches):
        for rows in batches:
            start = time.perf_counter()
            read(rows)
            waits.append(time.perf_counter() - start)
            time.sleep(compute)
    wait = sum(waits[fill:]) / len(waits[fill:])
    return {"wait": wait, "share": wait / (wait + compute)}


def in_a_process(arguments: argparse.Namespace, measure: str) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--measure", measure]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def open_seconds(folder: Path) -> dict[str, float]:
    """Return the seconds of opening the dataset cold, without and with its index, and the size of the index."""
    (folder / INDEX_NAME).unlink(missing_ok=True)
    result = {}
    for name in ("open without index", "open with index"):
        drop_caches(folder)
        start = time.perf_counter()
        _dataset(folder)
        result[name] = time.perf_counter() - start
    return {**result, "index bytes": (folder / INDEX_NAME).stat().st_size}


def report(arguments: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    kind = "sparse: headers only, rows are holes" if arguments.sparse else "real"
    lines = [
        f"# Reading rows of {arguments.shards:,} shards",
        "",
        f"{arguments.shards:,} shards of {ROWS} rows ({kind}), {ROW_BYTES:,} bytes a row; "
        f"{arguments.batches * BATCH:,} random rows. Bytes are "
        "exact. Seconds are those of a machine with the load stated below.",
        "",
        "| | before | after | after / before |",
        "|---|---|---|---|",
    ]
    for state in ("cold", "warm"):
        for what, digits, unit in (("bytes", 0, "bytes"), ("seconds", 6, "s"), ("processor", 6, "s of processor")):
            before, after = (results[which][f"{state} {what}"] for which in ("before", "after"))
            ratio = f"{after / before:.3f}" if before else ""
            lines.append(f"| a row, {state}, {unit} | {before:,.{digits}f} | {after:,.{digits}f} | {ratio} |")
    before, after = (results[which]["cold bytes"] / ROW_BYTES for which in ("before", "after"))
    lines += [
        f"| bytes read for each byte of a row, cold | {before:.2f} | {after:.2f} | |",
        "",
        f"A step: {BATCH} new rows, cold, and {arguments.compute} s of computing (a sleep).",
        "",
        "| reading | waits, s | share of the step |",
        "|---|---|---|",
    ]
    for name, values in results["steps"].items():
        lines.append(f"| {name} | {values['wait']:.4f} | {values['share']:.1%} |")
    opening = results["opening"]
    return [
        *lines,
        "",
        f"Opening the folder cold: {opening['open without index']:.2f} s when it writes its index "
        f"({opening['index bytes']:,} bytes), {opening['open with index']:.2f} s when it has one.",
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the shards; made if it has no manifest")
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--sparse", action="store_true", help="write only the headers of the shards")
    parser.add_argument("--batches", type=int, default=20, help=f"batches of {BATCH} rows to read")
    parser.add_argument("--steps", type=int, default=40, help="steps for each number of workers")
    parser.add_argument("--compute", type=float, default=0.13, help="seconds that a step computes")
    parser.add_argument("--delete", action="store_true", help="delete the shards afterwards")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/reading"), help="path without suffix")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    folder, shards, steps = arguments.folder, arguments.shards, arguments.steps
    if arguments.measure:
        kind, which, workers = arguments.measure.split()
        if kind == "rows":
            found = measure_rows(folder, shards, which, arguments.batches)
        elif kind == "steps":
            found = measure_steps(folder, shards, which, int(workers), steps, arguments.compute)
        else:
            found = open_seconds(folder)
        print(json.dumps(found))
        return
    results: dict[str, Any] = {"provenance": provenance()}
    if not (folder / "manifest.json").exists():
        needed, free = shards * ROWS * (0 if arguments.sparse else ROW_BYTES), shutil.disk_usage(folder.parent).free
        if free < 1.2 * needed:
            raise SystemExit(f"{needed:,} bytes are needed and {free:,} are free: lower --shards.")
        write_shards(folder, shards, arguments.sparse)
    results["opening"] = in_a_process(arguments, "opening - 0")
    for which in ("before", "after"):
        results[which] = in_a_process(arguments, f"rows {which} 0")
    results["steps"] = {"before, within the step": in_a_process(arguments, "steps before 0")}
    for workers in WORKERS:
        results["steps"][f"after, {workers} workers"] = in_a_process(arguments, f"steps after {workers}")
    write_results(arguments.output, results, report(arguments, results))
    if arguments.delete:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
