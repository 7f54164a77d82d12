"""Measure how long steps stop for a checkpoint: written at once, as before, and in the background.

    torchrun --nproc-per-node 2 benchmarks/checkpoints.py --gigabytes 3

Each process holds the same tensors, as without FSDP. Before, the first process wrote all files and read them again for
their digests while the others waited. The steps between two checkpoints are sleeps of a stated length.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor

from machine import provenance, write_page
from rectified_diffusers.distributed import Peers, training_accelerator
from rectified_diffusers.files import write_atomically
from rectified_diffusers.training.checkpoint_reading import StoredCheckpoint, checkpoint_path
from rectified_diffusers.training.checkpoint_writing import CheckpointWriter
from rectified_diffusers.training.parts import file_digest

FILES = ("unet", "ema", "optimizer")
STEP = 0.13  # seconds of computing in a step, here a sleep


def make_tensors(size: float) -> dict[str, dict[str, Tensor]]:
    """Return tensors of 16 MB in three files, the last as large as the first two together."""
    count = int(size * 1e9 / 2**24)
    shares = {"unet": count // 4, "ema": count // 4, "optimizer": count // 2}
    return {
        f"{file}.safetensors": {f"{file}.{i}": torch.full((2**22,), float(i)) for i in range(shares[file])}
        for file in FILES
    }


def write_at_once(path: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write as before checkpoints were written in the background: every file, then its digest from the disk."""

    def write(temporary: Path) -> None:
        temporary.mkdir()
        for name, named in tensors.items():
            save_file(named, temporary / name)
        (temporary / "state.json").write_text(str([file_digest(temporary / name) for name in tensors]))

    write_atomically(path, write)


def measure_steps(
    save: Callable[[int], Any], wait: Callable[[], Any], saves: int, steps: int
) -> tuple[list[float], float]:
    """Return the time beyond its sleep that each step with a save took, and the longest of the other steps."""
    stops, others = [], 0.0
    for number in range(saves):
        for step in range(steps):
            start = time.perf_counter()
            time.sleep(STEP)
            if step == 0:
                save(number)
            wait()
            beyond = time.perf_counter() - start - STEP
            stops += [beyond] if step == 0 else []
            others = max(others, beyond if step else 0.0)
    return stops, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of a checkpoint")
    parser.add_argument("--saves", type=int, default=3, help="number of checkpoints of each kind")
    parser.add_argument("--steps", type=int, default=150, help="steps from one checkpoint to the next")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not set")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    accelerator = training_accelerator("no")
    peers, barrier = Peers.connect(), accelerator.wait_for_everyone
    folder = Path(broadcast_object_list([tempfile.mkdtemp(dir=args.folder)])[0])
    tensors = make_tensors(args.gigabytes)

    def save_at_once(number: int) -> None:
        if accelerator.is_main_process:
            write_at_once(checkpoint_path(folder / "before", 1), tensors)
        barrier()

    before, _ = measure_steps(save_at_once, barrier, args.saves, 1)
    shutil.rmtree(folder / "before", ignore_errors=True)
    barrier()
    with CheckpointWriter(folder, 1, peers, lambda: None) as writer:
        writer.reserve(tensors)  # as a training does after its first step
        measure_steps(lambda number: None, barrier, 1, args.steps)
        after, others = measure_steps(lambda number: writer.save(number, tensors, {}), barrier, args.saves, args.steps)
    stored = StoredCheckpoint(checkpoint_path(folder, args.saves - 1), peers)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the memory begins anew
    before_load, start = (process_bytes("status", "VmRSS"), process_bytes("io", "rchar")), time.perf_counter()
    stored.load(tensors)
    loading = time.perf_counter() - start
    peak, read = process_bytes("status", "VmHWM") - before_load[0], process_bytes("io", "rchar") - before_load[1]
    loads = peers.exchange((read, peak))
    if accelerator.is_main_process:
        shutil.rmtree(folder)
        report(args, peers.count, before, after, others, loading, loads)


def process_bytes(file: str, name: str) -> int:
    """Return a value of this process that the system counts, in bytes."""
    lines = Path("/proc/self", file).read_text().splitlines()
    value = next(line.split()[1:] for line in lines if line.startswith(f"{name}:"))
    return int(value[0]) * (1024 if value[1:] == ["kB"] else 1)


def report(
    args: Any,
    count: int,
    before: list[float],
    after: list[float],
    others: float,
    loading: float,
    loads: list[tuple[int, int]],
) -> None:
    ratio = max(after) / min(before)
    seconds = {
        "before: all files by one process, each read again for its digest": before,
        "now: a copy to memory that was allocated during the first steps": after,
    }
    lines = [f"# Checkpoints of {args.gigabytes:g} GB on {count} processes", ""]
    lines += [f"| a step with a checkpoint stops for, seconds | {' | '.join(str(i + 1) for i in range(args.saves))} |"]
    lines += ["|---" * (args.saves + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |" for name, values in seconds.items()]
    lines += [
        "",
        f"The longest stop now is {ratio:.3f} of the shortest before. While a checkpoint "
        f"is written, a step of {STEP} s takes at most {others:.2f} s longer. Loading takes {loading:.1f} s. "
        f"A process reads at most {max(read for read, _ in loads) / 1e9:.2f} GB and takes at most "
        f"{max(peak for _, peak in loads) / 1e9:.2f} GB of memory above what it has.",
    ]
    write_page(args.output / "checkpoints.md", lines, provenance())


if __name__ == "__main__":
    main()
