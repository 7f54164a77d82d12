"""Measure the memory of reading triplets and prompts, from a thousand to ten million of them.

    python benchmarks/triplet_memory.py work/memory --output benchmarks/results/triplet_memory.json

Writes synthetic sets of tiny latents, (4, 1, 1) in float16, with a prompt each, and reads each set in a separate
process, as training does: random rows, 64 at a time, with their checksums compared. The peak is the resident memory of
that process, including the pages of mapped files; times are CPU times. A set takes about 120 bytes of disk per
triplet. Ten million triplets take some minutes to write; they stay in the folder for the next run.
"""

import argparse
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

SIZES = (1_000, 100_000, 10_000_000)
SHAPE = (4, 1, 1)
ROWS_AT_ONCE, BATCHES = 64, 200


def write_synthetic(
    folder: Path,
    num_triplets: int,
    triplets_per_shard: int = 256,
    latent_shape: tuple[int, int, int] = SHAPE,
) -> None:
    """Write a set of triplets without a teacher: white noise, with the reversed noise as its data."""
    import torch

    from rectified_diffusers.data.generate import draw_noise
    from rectified_diffusers.data.manifest import FORMAT, Manifest
    from rectified_diffusers.data.shards import shard_path, write_shard

    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest.of(
        {
            "format": FORMAT,
            "num_triplets": num_triplets,
            "triplets_per_shard": triplets_per_shard,
            "seed": 0,
            "storage_dtype": "float16",
            "num_prompts": num_triplets,
            "latent_shape": list(latent_shape),
        },
        origin={},
    )
    for shard in range(manifest.num_shards):
        path, rows = shard_path(folder, shard), manifest.rows(shard)
        if path.exists():
            continue
        noise = draw_noise(0, shard, (rows, *latent_shape)).to(torch.float16)
        prompts = [f"a photo of number {shard * triplets_per_shard + row}, by the window" for row in range(rows)]
        header = {"shard": shard, "manifest": manifest.identity, "prompts": prompts}
        write_shard(path, {"noise": noise, "data": noise.flip(0)}, header)
    manifest.write(folder)


def peak_mib() -> float:
    """Return the peak resident memory of this process.

    Linux keeps it in /proc; `getrusage` would count the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure_triplets(folder: Path) -> dict[str, Any]:
    from rectified_diffusers.data.dataset import TripletDataset

    before, begin = peak_mib(), time.process_time()
    dataset = TripletDataset(folder)
    opened, draw = time.process_time(), random.Random(0)
    for _ in range(BATCHES):
        dataset.rows([draw.randrange(len(dataset)) for _ in range(ROWS_AT_ONCE)])
    done = time.process_time()
    return {
        "triplets": len(dataset),
        "shards": dataset.manifest.num_shards,
        "before_mib": round(before, 1),
        "peak_mib": round(peak_mib(), 1),
        "open_s": round(opened - begin, 2),
        "row_ms": round((done - opened) / BATCHES / ROWS_AT_ONCE * 1e3, 3),
    }


def measure_prompts(path: Path) -> dict[str, Any]:
    from rectified_diffusers.data.prompts import open_prompts

    before, begin = peak_mib(), time.process_time()
    prompts = open_prompts(path)
    opened, draw = time.process_time(), random.Random(0)
    for _ in range(BATCHES):
        first = draw.randrange(len(prompts))
        prompts[first : first + 256]
    done = time.process_time()
    return {
        "prompts": len(prompts),
        "before_mib": round(before, 1),
        "peak_mib": round(peak_mib(), 1),
        "open_s": round(opened - begin, 2),
        "shard_ms": round((done - opened) / BATCHES * 1e3, 3),
    }


def in_a_process(what: str, path: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, str(path), "--measure", what]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the synthetic sets")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of triplets and prompts")
    parser.add_argument("--output", type=Path, help="file of the result, as JSON")
    parser.add_argument("--measure", choices=["triplets", "prompts"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        measure = {"triplets": measure_triplets, "prompts": measure_prompts}[arguments.measure]
        print(json.dumps(measure(arguments.folder)))
        return
    rows: dict[str, list[dict[str, Any]]] = {"triplets": [], "prompts": []}
    for size in arguments.sizes:
        folder, prompts = arguments.folder / f"triplets-{size}", arguments.folder / f"prompts-{size}.txt"
        with mock.patch("os.fsync"):  # forty thousand times
            write_synthetic(folder, size)
        if not prompts.exists():
            with prompts.open("w") as file:
                file.writelines(f"a photo of number {index}, by the window\n" for index in range(size))
        for what, path in (("triplets", folder), ("prompts", prompts)):
            rows[what].append(in_a_process(what, path))
            print(what, rows[what][-1], flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/triplet_memory.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "safetensors", "rectified_diffusers")},
        **rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
