"""Compare `generate_triplets` with a bare loop over the same teacher: triplets per second and peak memory.

    python benchmarks/triplets.py
    python benchmarks/triplets.py --teacher sd15 --device cuda --dtype float16 --batch 16 --triplets 64 --shard 32

The teacher is the bundled model, a folder, or a Stable Diffusion of random weights in the shape of 1.5 or XL.

The bare loop is a minimal hand-written loop without error handling: it generates latents with the pipeline, batch
after batch, and keeps them in a list. Ours samples noise from (seed, shard), checks the results, and writes shards
with checksums to disk. The two alternate, so that other load on the machine affects both. Medians are compared, of
wall time and of CPU time, which other load does not lengthen. Peak memory is measured in a separate process for each
on a CPU, and in the timed runs on a GPU. The results so far are written after each run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from machine import provenance, synchronize, write_results
from models import make_pipeline
from rectified_diffusers import TripletConfig, bundled_checkpoint, generate_triplets, register
from triplet_memory import peak_mib

PROMPTS = [
    f"{adjective} {noun}" for adjective in ("red", "big", "old") for noun in ("cat", "sun", "car", "hat", "cup")
]
SHAPES = ("sd15", "sdxl")


def load(arguments: argparse.Namespace) -> Any:
    dtype = getattr(torch, arguments.dtype)
    if arguments.teacher in SHAPES:
        return make_pipeline(arguments.teacher, dtype, arguments.device, diffusion=True, small=arguments.small)
    register()
    teacher = arguments.teacher or str(bundled_checkpoint())
    pipeline = DiffusionPipeline.from_pretrained(teacher).to(arguments.device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def bare(pipeline: Any, arguments: argparse.Namespace) -> None:
    size = pipeline.unet.config.sample_size
    shape = (arguments.batch, pipeline.unet.config.in_channels, size, size)
    kept = []
    for start in range(0, arguments.triplets, arguments.batch):
        noise = torch.randn(shape)
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(start, start + arguments.batch)]
        result = pipeline(
            prompts,
            latents=noise.to(arguments.device, pipeline.unet.dtype),
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            output_type="latent",
        )
        kept.append((noise, result.images.cpu()))


def ours(pipeline: Any, arguments: argparse.Namespace) -> None:
    config = TripletConfig(
        num_triplets=arguments.triplets,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        solver="teacher",
        batch_size=arguments.batch,
        triplets_per_shard=arguments.shard,
    )
    with tempfile.TemporaryDirectory() as folder:
        generate_triplets(pipeline, PROMPTS, folder, config, progress=False)


WAYS: dict[str, Callable[[Any, argparse.Namespace], None]] = {"bare": bare, "ours": ours}


def timed(way: str, pipeline: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return wall seconds, CPU seconds, and the peak GPU memory in MiB."""
    on_cuda = arguments.device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    clock, processor = time.perf_counter(), time.process_time()
    WAYS[way](pipeline, arguments)
    synchronize(arguments.device)
    spent = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}
    return spent | ({"peak_gpu_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1)} if on_cuda else {})


def peak_of(way: str) -> float:
    """Run one loop in a separate process and return its peak memory in MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", way]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def warm_up(pipeline: Any, arguments: argparse.Namespace) -> None:
    """Run each loop once; on a GPU, for one batch of two steps."""
    brief = {"triplets": arguments.batch, "steps": 2} if arguments.device.startswith("cuda") else {}
    for way in WAYS:
        timed(way, pipeline, argparse.Namespace(**{**vars(arguments), **brief}))


def summary(runs: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return triplets per second of each loop that has run, and how much slower ours is."""
    rows: dict[str, Any] = {}
    for way, found in runs.items():
        if found:
            clock, processor = (statistics.median(run[each] for run in found) for each in ("clock", "processor"))
            rows[way] = {
                "triplets_per_s": round(arguments.triplets / clock, 3),
                "triplets_per_processor_s": round(arguments.triplets / processor, 3),
                **{name: value for name, value in found[-1].items() if name == "peak_gpu_mib"},
            }
            rows[way]["seconds"] = clock, processor
    if len(rows) == len(WAYS):
        for i, each in enumerate(("clock", "processor")):
            rows[f"slower_by_{each}"] = round(rows["ours"]["seconds"][i] / rows["bare"]["seconds"][i] - 1, 4)
    return rows


def as_markdown(results: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    columns = ["triplets_per_s", "triplets_per_processor_s", "peak_mib", "peak_gpu_mib"]
    lines = ["# Triplets per second", ""]
    lines += [f"| | {' | '.join(name.replace('_', ' ') for name in columns)} |", "|---|" + "---|" * len(columns)]
    for way in WAYS:
        if way in results:
            lines.append(f"| {way} | {' | '.join(str(results[way].get(name, '')) for name in columns)} |")
    slower = [f"- ours is slower by {results[n]:.2%} {n.split('_')[-1]}" for n in results if n.startswith("slower")]
    return [
        *lines,
        "",
        *slower,
        f"- teacher {arguments.teacher or 'bundled'}, {arguments.dtype}, {arguments.steps} steps, guidance "
        f"{arguments.guidance}, batch {arguments.batch}, {arguments.triplets} triplets a run",
    ]


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help=f"folder of a pipeline, or {' or '.join(SHAPES)} (default: bundled model)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--triplets", type=int, default=32)
    parser.add_argument("--shard", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a narrow teacher, to test the script")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/triplets"), help="without suffix")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.triplets % arguments.batch:
        parser.error("--triplets must be a multiple of --batch, for the bare loop")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    pipeline = load(arguments)
    if arguments.only:
        timed(arguments.only, pipeline, arguments)
        print(json.dumps(round(peak_mib(), 1)))
        return
    results: dict[str, Any] = {"provenance": provenance(arguments.device)}
    warm_up(pipeline, arguments)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for repeat in range(arguments.repeats):
        for way in sorted(WAYS, reverse=bool(repeat % 2)):
            runs[way].append(timed(way, pipeline, arguments))
            print(way, runs[way][-1], flush=True)
            results |= summary(runs, arguments)
            write_results(arguments.output, results, as_markdown(results, arguments), quiet=True)
    if not arguments.device.startswith("cuda"):
        for way in WAYS:
            results[way]["peak_mib"] = peak_of(way)
    write_results(arguments.output, results, as_markdown(results, arguments))


if __name__ == "__main__":
    main()
