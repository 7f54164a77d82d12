"""Triplets per second of `generate_triplets` beside a bare loop over the same teacher, in one run, and peak memory.

    python benchmarks/triplets.py
    python benchmarks/triplets.py --teacher SD15_FOLDER --device cuda --dtype float16 --triplets 512 --shard 256

The bare loop asks the pipeline for latents, batch after batch, and keeps them in a list: what one writes by hand when
nothing may fail. Ours draws noise by (seed, shard), checks what comes back, and writes shards with checksums to the
disk. The two alternate, so that whatever else the machine does meets both, and medians are compared, of the clock and
of the processor's time, which other work on the machine does not lengthen. Peak memory is of a process for each.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rectified_diffusers import TripletConfig, bundled_checkpoint, generate_triplets, register
from rectified_diffusers.loading import dtype_option
from triplet_memory import peak_mib

PROMPTS = [
    f"{adjective} {noun}" for adjective in ("red", "big", "old") for noun in ("cat", "sun", "car", "hat", "cup")
]


def load(arguments: argparse.Namespace) -> Any:
    register()
    dtype = dtype_option(getattr(torch, arguments.dtype))
    pipeline = DiffusionPipeline.from_pretrained(arguments.teacher, **dtype).to(arguments.device)
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


def timed(way: str, pipeline: Any, arguments: argparse.Namespace) -> tuple[float, float]:
    """Give seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    WAYS[way](pipeline, arguments)
    return time.perf_counter() - clock, time.process_time() - processor


def peak_of(way: str) -> dict[str, float]:
    """Run one way in a process of its own and give its peaks of memory in MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", way]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(bundled_checkpoint()), help="pipeline with a U-Net")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--triplets", type=int, default=32)
    parser.add_argument("--shard", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file of the result, as JSON")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.triplets % arguments.batch:
        parser.error("--triplets must be a multiple of --batch, for the bare loop")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    pipeline = load(arguments)
    if arguments.only:
        timed(arguments.only, pipeline, arguments)
        gpu = torch.cuda.max_memory_allocated() / 2**20 if arguments.device.startswith("cuda") else 0.0
        print(json.dumps({"peak_mib": round(peak_mib(), 1), "peak_gpu_mib": round(gpu, 1)}))
        return
    for way in WAYS:  # to warm up
        timed(way, pipeline, arguments)
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for repeat in range(arguments.repeats):
        for way in sorted(WAYS, reverse=bool(repeat % 2)):
            seconds[way].append(timed(way, pipeline, arguments))
            print(way, *(f"{value:.2f} s" for value in seconds[way][-1]), flush=True)
    medians = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in seconds.items()}
    result = {
        "command": " ".join(["python", "benchmarks/triplets.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "rectified_diffusers")},
        **{
            way: {
                "triplets_per_s": round(arguments.triplets / medians[way][0], 3),
                "triplets_per_processor_s": round(arguments.triplets / medians[way][1], 3),
                **peak_of(way),
            }
            for way in WAYS
        },
        "slower_by_clock": round(medians["ours"][0] / medians["bare"][0] - 1, 4),
        "slower_by_processor": round(medians["ours"][1] / medians["bare"][1] - 1, 4),
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
