"""Simulate a training of 64 GPUs that reads its triplets from network storage: how long a step of one GPU waits.

    python benchmarks/network_storage.py work/network --steps 24 --stretch 5

One process with the loader's real worker processes stands for one of the 64 ranks. It reads real files, whose rows are
holes: the local disk has no part in it. Simulated are the network and the GPU:

- Opening a file and each read wait for a stated time; one read in a hundred, at random, waits ten times as long.
- All reads of the rank pass a link of 1/64 of the storage's bandwidth, one after the other (a token bucket without a
  burst, shared by its workers). The other 63 ranks take the rest at all times: the rank never borrows from them.
- Nothing is cached, neither the index nor the shards.
- A step computes for a stated time, a sleep, and reads 16 new random rows. The 64 ranks do not wait for each other.

`--stretch 5` makes all simulated times five times as long and divides the measured ones by five. The processor's work
for a row then counts a fifth: for a busy machine, whose load would otherwise hide what is simulated.
"""

import argparse
import multiprocessing
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from machine import provenance, write_page
from reading import ROW_BYTES, ROWS, write_shards
from rectified_diffusers.data import dataset as dataset_module
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.shards import PositionedFile
from rectified_diffusers.training.reading import RowReader

RANKS, BATCH = 64, 16
SLOW, TIMES = 0.01, 10  # share of the reads that wait longer, and how much longer
FILL = 8  # steps until the queue of four workers with two batches each is empty or steady
NEEDED = RANKS * BATCH * ROW_BYTES  # bytes of all ranks in a step


@dataclass(frozen=True)
class Case:
    """How the rows are read, and the storage: seconds of a read, and bytes per second for all ranks."""

    workers: int
    threads: int
    latency: float
    bandwidth: float

    def __str__(self) -> str:
        readers = "one after the other" if self.threads == 1 else f"{self.threads} at once"
        latency, bandwidth = f"{1000 * self.latency:g} ms", f"{self.bandwidth / 1e9:g} GB/s"
        return f"| {self.workers} | {readers} | {latency} | {bandwidth} |"


def cases() -> list[Case]:
    at_once = dataset_module._READERS
    readers = [(0, 1), (0, at_once), (4, 1), (4, at_once)]
    by_latency = [Case(*reader, latency, 2e9) for latency in (0.001, 0.005, 0.02) for reader in readers]
    by_bandwidth = [Case(4, at_once, 0.005, bandwidth) for bandwidth in (1e9, 7e8, 4e8)]
    return by_latency + by_bandwidth


class Network:
    """The share of one rank in the storage. Processes that are forked from this one share it too."""

    def __init__(self, latency: float, bandwidth: float) -> None:
        self.latency, self.bandwidth = latency, bandwidth
        self.free = multiprocessing.Value("d", 0.0)  # when the link has passed all that was asked of it
        self.bytes = multiprocessing.Value("q", 0)
        self.open, self.read = PositionedFile.__init__, PositionedFile.read

    def wait(self, count: int) -> None:
        """Wait as long as the answer of `count` bytes takes."""
        with self.free, self.bytes:
            self.free.value = max(self.free.value, time.monotonic()) + count / self.bandwidth
            self.bytes.value += count
            passed = self.free.value
        latency = self.latency * (TIMES if random.random() < SLOW else 1)
        time.sleep(max(passed - time.monotonic(), 0.0) + latency)

    def open_slowly(self, file: PositionedFile, path: Path) -> None:
        self.wait(0)
        self.open(file, path)

    def read_slowly(self, file: PositionedFile, start: int, count: int) -> bytes:
        self.wait(count)
        return self.read(file, start, count)

    def between(self) -> Any:
        """Put the network between the files and their readers, until the end of the block."""
        methods = {
            "__init__": lambda file, path: self.open_slowly(file, path),
            "read": lambda file, start, count: self.read_slowly(file, start, count),
        }
        return mock.patch.multiple(PositionedFile, **methods)


def measure(dataset: TripletDataset, case: Case, args: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds that a step waits, without the first steps, which fill the queue; and the bytes of a row."""
    generator, steps = torch.Generator().manual_seed(0), args.steps
    batches = torch.randint(len(dataset), (steps, BATCH), generator=generator).tolist()
    network = Network(case.latency * args.stretch, case.bandwidth / RANKS / args.stretch)
    reader, waits = RowReader(dataset, case.workers, torch.device("cpu")), []
    dataset._open_files()  # no shard is open
    with mock.patch.object(dataset_module, "_READERS", case.threads), network.between(), reader.ahead(batches):
        for rows in batches:
            start = time.perf_counter()
            reader.rows(rows)
            waits.append(time.perf_counter() - start)
            time.sleep(args.compute * args.stretch)
    counted = waits[FILL:]
    return sum(counted) / len(counted) / args.stretch, network.bytes.value / steps / BATCH


def report(args: argparse.Namespace, found: dict[Case, tuple[float, float]]) -> list[str]:
    lines = [
        f"# Network storage and {RANKS} GPUs, simulated",
        "",
        f"One process with the loader's real workers stands for one of {RANKS} ranks. Its files are real, their rows "
        "are holes. The storage is simulated: each read and each opening of a file waits for the latency, one in "
        f"{1 / SLOW:.0f} for {TIMES} times that; the reads of the rank share 1/{RANKS} of the bandwidth; nothing is "
        f"cached. The GPU is simulated: a step is a sleep of {args.compute} s and reads {BATCH} new rows of "
        f"{ROW_BYTES:,} bytes, from {args.shards:,} shards of {ROWS}. Not simulated: other ranks that take more or "
        "less than their share, caches, failures, and that a step of all ranks waits for the slowest.",
        "",
        f"All simulated times were {args.stretch:g} times as long, and the measured ones are divided by that: "
        f"processor time counts 1/{args.stretch:g} of what it is.",
        "",
        f"Together the ranks need {NEEDED / args.compute / 1e6:,.0f} MB/s if no step waits. {args.steps} steps for "
        f"each line, of which the first {FILL}, which fill the queue, are not counted.",
        "",
        "| workers | rows of a batch | latency | bandwidth of the storage | a step waits, s | share of the step |",
        "|---|---|---|---|---|---|",
    ]
    for case, (wait, _) in found.items():
        lines.append(f"{case} {wait:.4f} | {wait / (wait + args.compute):.1%} |")
    row = max(bytes_of_row for _, bytes_of_row in found.values())
    return [*lines, "", f"A row takes at most {row:,.0f} bytes from the storage, its entry in the index included."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="folder of the shards, made if it has no manifest; deleted at the end"
    )
    parser.add_argument("--shards", type=int, default=1000, help="25 MB on the disk for 1,000: their rows are holes")
    parser.add_argument("--steps", type=int, default=60, help="steps for each line of the table")
    parser.add_argument("--compute", type=float, default=0.13, help="seconds that a step computes")
    parser.add_argument("--stretch", type=float, default=1.0, help="how much longer all simulated times are")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result")
    args = parser.parse_args()
    facts = provenance()
    torch.set_num_threads(1)
    if not (args.folder / "manifest.json").exists():
        write_shards(args.folder, args.shards, sparse=True)
    with mock.patch.object(TripletDataset, "_check_orientation"):  # zeros are no noise
        dataset = TripletDataset(args.folder)
    random.seed(0)
    found = {}
    for case in cases():
        found[case] = measure(dataset, case, args)
        print(case, *found[case], flush=True)
    shutil.rmtree(args.folder)
    write_page(args.output / "network_storage.md", report(args, found), facts)


if __name__ == "__main__":
    main()
