"""Measure the host memory of a training's setup and of a resume, for 1, 2 and 4 processes, with and without FSDP.

    python benchmarks/memory.py --name after
    PYTHONPATH=OTHER_CHECKOUT/src python benchmarks/memory.py --name before

Results of both names are kept, with the commit of the package that was measured. The processes are forks, on the CPU.
Each has a pipeline with the U-Net of the bundled model, made wider, in memory; that is not counted. What is counted is
the peak of the resident memory above it, in sizes of the network: in `setup` of building the trainer, in `resume` of
building it and loading a checkpoint. Every process first does the same with a smaller U-Net, so that code that is
loaded at the first call is not counted.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import socket
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.distributed.fsdp
import torch.distributed.tensor
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType

import rectified_diffusers
from machine import provenance, write_results
from rectified_diffusers import (
    RectifiedFlowPipeline,
    ReflowConfig,
    ReflowTrainer,
    TripletDataset,
    bundled_checkpoint,
)
from triplet_memory import write_synthetic

FORKS = multiprocessing.get_context("fork")
FSDP = Path(__file__).parents[1] / "examples" / "accelerate_configs" / "fsdp.yaml"
CASES = ((1, False), (2, False), (4, False), (2, True), (4, True))
PHASES = "setup", "resume"
WARM_UP = 0.5  # width of the smaller U-Net
_M_MMAP_THRESHOLD = -3  # of malloc.h
_MCL_ALL_ON_FAULT = 7  # of sys/mman.h: all pages, now and later, from their first use


def make_unet(bundled, factor):
    """Return a U-Net like the bundled one, wider by a factor, with random weights that are the same each time."""
    torch.manual_seed(0)
    channels = [int(factor * channels) for channels in bundled.config["block_out_channels"]]
    return type(bundled).from_config({**bundled.config, "block_out_channels": channels})


def make_trainer(pipeline, triplets, folder):
    options = {"batch_size": 4, "mixed_precision": "no", "max_steps": 2, "save_every_steps": 1, "num_workers": 0}
    return ReflowTrainer(pipeline, TripletDataset(triplets), ReflowConfig(output_dir=folder, **options))


def write_checkpoint(pipeline, folder, triplets, factor):
    """Train one step on one process."""
    pipeline.register_modules(unet=make_unet(pipeline.unet, factor))
    trainer = make_trainer(pipeline, triplets, folder)
    with trainer.writer:
        trainer.resume()
        trainer.begin(0)
        trainer.since_line.append(trainer.train_step(1))
        trainer.save(1)


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def measure(pipeline, triplets, folder):
    """Return the peaks of this process's resident memory above what it has before, in sizes of the network."""
    size = sum(weight.nbytes for weight in pipeline.unet.parameters())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    trainer = make_trainer(pipeline, triplets, folder)
    setup = resident("VmHWM") - before
    assert trainer.resume() == 1
    resume = resident("VmHWM") - before
    trainer.accelerator.wait_for_everyone()
    return setup / size, resume / size


def process(rank, environment, pipeline, triplets, checkpoints, factor, results):
    """Measure in one process of a group, once for the smaller U-Net and once for that of the result."""
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    if ctypes.CDLL(None).mlockall(_MCL_ALL_ON_FAULT):
        raise SystemExit("Expected the right to lock memory, so that none is swapped out. See `ulimit -l`.")
    if "ACCELERATE_USE_FSDP" in environment:  # accelerate turns to it on GPUs only; torch's FSDP2 runs on CPUs
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    bundled = pipeline.unet
    for each in (WARM_UP, factor):
        pipeline.register_modules(unet=make_unet(bundled, each))
        peaks = measure(pipeline, triplets, checkpoints / str(each))
    results.put(peaks)


def environment_of(count, sharded):
    """Return the variables that `accelerate launch` sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    known["MASTER_PORT"] = str(port)
    if sharded:
        options = yaml.safe_load(FSDP.read_text())["fsdp_config"]
        known |= {"ACCELERATE_USE_FSDP": "true", **{name.upper(): str(value) for name, value in options.items()}}
    return known


def run(count, sharded, *arguments):
    """Return the peaks of all processes of a group."""
    results, environment = FORKS.SimpleQueue(), environment_of(count, sharded)
    processes = [FORKS.Process(target=process, args=(i, environment, *arguments, results)) for i in range(count)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    if any(each.exitcode for each in processes):
        raise SystemExit(f"Expected all processes to end, got {[each.exitcode for each in processes]}. See above.")
    return [results.get() for _ in processes]


def in_fork(function, *arguments):
    """Call a function in a process of its own, whose memory and process group end with it."""
    child = FORKS.Process(target=function, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0


def measured_commit():
    folder = str(Path(rectified_diffusers.__file__).parent)
    words = (["rev-parse", "HEAD"], ["status", "--porcelain", "."])
    commit, changes = (
        subprocess.run(["git", "-C", folder, *each], capture_output=True, text=True).stdout.strip() for each in words
    )
    return commit + (" with changes" if changes else "")


def label(count, sharded):
    return f"{count}{' with FSDP' if sharded else ''}"


def lines_of(runs):
    lines = ["# Host memory of a training's setup and resume", "", "Peak of a process above the loaded pipeline, in"]
    lines += ["sizes of the network; the process with the highest. Values can be 0.15 below the sum of the tensors,"]
    lines += ["probably because what the smaller U-Net held is freed meanwhile.", ""]
    names = [f"{phase}, {name}" for phase in PHASES for name in runs]
    lines += [f"| processes | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for count, sharded in CASES:
        cells = []
        for phase in PHASES:
            for found in runs.values():
                peaks = found["peaks"].get(f"{phase} {label(count, sharded)}")
                cells.append(f"{max(peaks):.2f}" if peaks else "")
        lines.append(f"| {label(count, sharded)} | {' | '.join(cells)} |")
    lines.append("")
    for name, found in runs.items():
        lines.append(f"{name}: commit {found['commit']}, U-Net of {found['megabytes']:.0f} MB.")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="after", help="column of the table; its earlier values are replaced")
    parser.add_argument("--factor", type=float, default=1.0, help="width of the U-Net's layers; 1 is 55 MB")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory"), help="files of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)  # before the forks
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)  # freed tensors leave the resident memory at once
    pipeline = RectifiedFlowPipeline.from_pretrained(str(bundled_checkpoint()), dtype=torch.float32)
    facts, saved = provenance(), args.output.with_suffix(".json")
    runs = json.loads(saved.read_text())["runs"] if saved.exists() else {}
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        triplets, checkpoints = Path(folder, "triplets"), Path(folder, "checkpoints")
        write_synthetic(triplets, 16, latent_shape=(4, 16, 16))
        for factor in (WARM_UP, args.factor):
            in_fork(write_checkpoint, pipeline, checkpoints / str(factor), triplets, factor)
        for count, sharded in CASES:
            found = run(count, sharded, pipeline, triplets, checkpoints, args.factor)
            for phase, values in zip(PHASES, zip(*found, strict=True), strict=True):
                peaks[f"{phase} {label(count, sharded)}"] = values
            print(count, sharded, found, flush=True)
    size = sum(weight.nbytes for weight in make_unet(pipeline.unet, args.factor).parameters()) / 1e6
    runs[args.name] = {"commit": measured_commit(), "megabytes": size, "peaks": peaks, "provenance": facts}
    write_results(args.output, {"runs": runs, "provenance": facts}, lines_of(runs))


if __name__ == "__main__":
    main()
