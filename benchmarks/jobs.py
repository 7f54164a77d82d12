"""Measure one, two and four jobs on one folder of triplets: shards made twice, and the time against an even division.

    python benchmarks/jobs.py

The jobs know nothing of each other but the folder, as jobs of a cluster do. The teacher is a sleep of a stated time
for each shard, so that the jobs do not compete for the processors of this machine: what is measured is what dividing
the shards costs. The jobs are forked from a process that has imported everything. Importing and loading a teacher,
which each job of a cluster does for itself, are not part of the times; the import is measured apart.
"""

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from machine import provenance, write_page
from rectified_diffusers.data.dataset import Triplets
from rectified_diffusers.data.generate import draw_noise, write_triplets
from rectified_diffusers.data.manifest import FORMAT, Manifest

SHAPE, ROWS = (4, 64, 64), 16
JOBS = (1, 2, 4)


def manifest_of(shards: int) -> Manifest:
    settings = {"format": FORMAT, "num_triplets": shards * ROWS, "triplets_per_shard": ROWS, "seed": 0}
    rest = {"storage_dtype": "float16", "num_prompts": shards * ROWS, "latent_shape": list(SHAPE)}
    return Manifest.of({**settings, **rest}, origin={})


def work(folder: Path, shards: int, seconds: float, made: Path) -> None:
    """Make shards until all are there, as one job; note each that this job has made."""

    def batches(shard: int, indices: range) -> Iterator[Triplets]:
        with made.open("a") as file:
            file.write(f"{shard}\n")
        time.sleep(seconds)
        noise = draw_noise(0, shard, (len(indices), *SHAPE))
        yield Triplets([f"prompt {index}" for index in indices], noise, noise.flip(0))

    torch.set_num_threads(1)
    write_triplets(folder, manifest_of(shards), batches, progress=False)


def measure(jobs: int, shards: int, seconds: float, base: Path) -> tuple[float, Counter[int]]:
    """Return the seconds until all jobs have ended, and how often each shard was made."""
    forks = multiprocessing.get_context("fork")
    folder = base / f"{jobs}"
    notes = [base / f"{jobs}-{job}.made" for job in range(jobs)]
    processes = [forks.Process(target=work, args=(folder, shards, seconds, note)) for note in notes]
    start = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    took = time.perf_counter() - start
    if any(process.exitcode for process in processes):
        raise SystemExit("A job has failed.")
    return took, Counter(int(line) for note in notes if note.exists() for line in note.read_text().split())


def import_seconds() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import rectified_diffusers.data.generate"], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=10.0, help="that the teacher takes for a shard, a sleep")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result")
    args = parser.parse_args()
    facts = provenance()
    lines = [
        "# Jobs on one folder of triplets",
        "",
        f"{args.shards} shards; the teacher is a sleep of {args.seconds:g} s for each. The jobs share only the "
        "folder. They are forked from a process that has imported everything, so that the times are those of the "
        f"work and its division; the import alone took {import_seconds():.0f} s.",
        "",
        "| jobs | s | time of one job / jobs | ratio | shards made | made twice |",
        "|---|---|---|---|---|---|",
    ]
    alone = 0.0
    with tempfile.TemporaryDirectory() as base:
        for jobs in JOBS:
            took, made = measure(jobs, args.shards, args.seconds, Path(base))
            alone = alone or took
            twice = sum(count > 1 for count in made.values())
            share = alone / jobs
            lines.append(f"| {jobs} | {took:.1f} | {share:.1f} | {took / share:.3f} | {len(made)} | {twice} |")
            print(lines[-1], flush=True)
    write_page(args.output / "jobs.md", lines, facts)


if __name__ == "__main__":
    main()
