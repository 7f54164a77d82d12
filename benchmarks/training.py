"""Compare our trainer with a bare torch loop of the same model, data and loss: seconds per step and memory.

    python benchmarks/training.py
    python benchmarks/training.py --model sd15 --device cuda --mixed-precision bf16 --batch-size 16 --steps 20 \
        --gradient-checkpointing off on

The bare loop is a minimal hand-written loop without error handling: all triplets and prompt embeddings in memory,
AdamW, gradient clipping, an average of the weights, and nothing else. The trainer reads its triplets from shards,
samples the inputs of a step from (seed, step), supports several processes and micro-batches, checks for NaN and keeps
a log. Medians are compared. On a CPU the steps alternate, so that other load on the machine affects both, and peak
memory is measured in a separate process for each. On a GPU, which has no other load, one runs after the other, so that
their memory is separate.

The share of the peak is 3 times the operations of a forward pass per example, divided by the time and by the measured
rate of a matrix product in the same precision; recomputation by gradient checkpointing does not count.
"""

import argparse
import copy
import gc
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import disable_progress_bar
from torch.utils.flop_counter import FlopCounterMode

from machine import provenance, rates, synchronize, write_results
from models import MAX_TOKENS, MODELS, make_pipeline, unet_of
from rectified_diffusers import (
    RectifiedFlowPipeline,
    ReflowConfig,
    ReflowTrainer,
    TripletConfig,
    TripletDataset,
    bundled_checkpoint,
    generate_triplets,
)

PROMPTS = [
    f"{adjective} {noun}" for adjective in ("red", "big", "happy", "old") for noun in ("cat", "sun", "car", "hat")
]
WARM_UP = 2
LOOPS = ("ours", "bare")
Step = Callable[[int], float]


def load(args: argparse.Namespace) -> Any:
    """Load the bundled model, or build one of another shape with random weights; its U-Net stays on the CPU."""
    if args.model == "emoji":
        return RectifiedFlowPipeline.from_pretrained(str(bundled_checkpoint()), dtype=torch.float32)
    pipeline = make_pipeline(args.model, torch.float32, args.device, small=args.small)
    pipeline.unet.to("cpu")
    return pipeline


def config_of(args: argparse.Namespace, output_dir: Path, checkpointing: str) -> ReflowConfig:
    return ReflowConfig(
        output_dir=output_dir,
        batch_size=args.batch_size,
        mixed_precision=args.mixed_precision,
        gradient_checkpointing=checkpointing == "on",
        keep_checkpoints=1,
        max_steps=10**6,
        prompt_dropout=0.0,
        log_every_steps=10,
    )


def ours(pipeline: Any, dataset: TripletDataset, config: ReflowConfig) -> tuple[Step, ReflowTrainer]:
    """Return a step of the trainer, with everything that `train` does in it except checkpoints."""
    trainer = ReflowTrainer(pipeline, dataset, config)
    trainer.resume()
    trainer.begin(0)

    def step(number: int) -> float:
        loss, norm = trainer.train_step(number)
        trainer.since_line.append((loss, norm))
        if number % config.log_every_steps == 0:
            trainer.log(number)
        return loss

    return step, trainer


def bare(pipeline: Any, dataset: TripletDataset, config: ReflowConfig, device: torch.device) -> Step:
    """Return a step of the hand-written loop."""
    unet = copy.deepcopy(pipeline.unet).to(device).train().requires_grad_(True)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    triplets = dataset.rows(range(len(dataset)))
    noise, data = triplets.noise.to(device), triplets.data.to(device)
    with torch.no_grad():
        pipeline.text_encoder.to(device)
        embeds = pipeline.encode_prompt(triplets.prompts, device, 1, False)[0].float()
    parameters = list(unet.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    autocast = config.mixed_precision == "bf16"

    def step(number: int) -> float:
        rows = torch.randint(len(noise), (config.batch_size,)).to(device)
        t = torch.rand(config.batch_size).to(device)
        velocity = data[rows] - noise[rows]
        x_t = noise[rows] + t.reshape(-1, 1, 1, 1) * velocity
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            predicted = unet(x_t, 1000 * (1 - t), embeds[rows], return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted.float(), velocity)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - config.ema_decay)
        return loss.item()

    return step


def timed(step: Step, number: int, device: str) -> tuple[float, float]:
    """Return the wall and CPU seconds of a step, including the work that it queued on a GPU."""
    clock, processor = time.perf_counter(), time.process_time()
    step(number)
    synchronize(device)
    return time.perf_counter() - clock, time.process_time() - processor


def medians(times: list[tuple[float, float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*times, strict=True)]


def start(which: str, args: argparse.Namespace, triplets: Path, folder: Path, checkpointing: str) -> tuple[Step, Any]:
    """Set up one of the two loops: return its step, and the trainer if it is ours."""
    dataset, config = TripletDataset(triplets), config_of(args, folder, checkpointing)
    if which == "ours":
        return ours(load(args), dataset, config)
    return bare(load(args), dataset, config, torch.device(args.device)), None


def in_turns(args: argparse.Namespace, triplets: Path, checkpointing: str) -> dict[str, Any]:
    """Time both loops with alternating steps, and a checkpoint at the end."""
    with tempfile.TemporaryDirectory() as folder:
        steps, trainer = {}, None
        for which in LOOPS:
            steps[which], found = start(which, args, triplets, Path(folder), checkpointing)
            trainer = trainer or found
        times: dict[str, list[tuple[float, float]]] = {which: [] for which in LOOPS}
        for number in range(1, WARM_UP + args.steps + 1):
            for name in LOOPS if number % 2 else reversed(LOOPS):
                times[name].append(timed(steps[name], number, args.device))
        saving = seconds_of_saving(trainer, WARM_UP + args.steps) if args.save else None
    rows = {name: {"seconds": medians(found[WARM_UP:])} for name, found in times.items()}
    ratios = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(times["ours"], times["bare"], strict=True)]
    paired = [statistics.median(column) for column in zip(*ratios[WARM_UP:], strict=True)]
    for which, row in rows.items():
        row["memory"] = peak_memory(args, triplets, which, checkpointing)
    return {**rows, "paired": paired, "checkpoint": saving}


def seconds_of_saving(trainer: Any, step: int) -> float:
    begin = time.perf_counter()
    trainer.save(step)
    return time.perf_counter() - begin


def folder_with_room() -> str | None:
    """Return the in-memory file system if a small disk cannot hold a large model's checkpoints, else None."""
    memory, disk = Path("/dev/shm"), shutil.disk_usage(tempfile.gettempdir()).free
    return str(memory) if disk < 32e9 and memory.exists() and shutil.disk_usage(memory).free > disk else None


def alone(args: argparse.Namespace, triplets: Path, which: str, checkpointing: str) -> dict[str, Any]:
    """Time one of the two alone on a GPU, with its peak memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(dir=folder_with_room()) as folder:
        try:
            step, trainer = start(which, args, triplets, Path(folder), checkpointing)
            times = [timed(step, number, args.device) for number in range(1, WARM_UP + args.steps + 1)]
        except torch.OutOfMemoryError as error:
            return {"error": str(error)[:300]}
        row: dict[str, Any] = {"seconds": medians(times[WARM_UP:]), "memory": torch.cuda.max_memory_allocated()}
        if which == "ours" and args.save:
            row["checkpoint"] = seconds_of_saving(trainer, WARM_UP + args.steps)
    return row


def measure_memory(args: argparse.Namespace) -> None:
    """Run a few steps of one of the two and print the peak memory of this process, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        step, _ = start(args.measure, args, args.triplets, Path(folder), args.gradient_checkpointing[0])
        for number in range(1, WARM_UP + 2):
            step(number)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def peak_memory(args: argparse.Namespace, triplets: Path, which: str, checkpointing: str) -> int:
    command = [sys.executable, __file__, "--measure", which, "--triplets", str(triplets)]
    for name in ("model", "device", "mixed_precision", "batch_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--gradient-checkpointing", checkpointing, *(["--small"] if args.small else [])]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return int(json.loads(lines[-1]))


def operations_per_example(args: argparse.Namespace) -> int:
    """Count the operations of a forward and a backward pass; backward counts as twice forward."""
    cls, config = unet_of(args.model, args.small)
    with torch.device("meta"):
        unet, size = cls(**config), config["sample_size"]
        latents, embeds = torch.empty(1, 4, size, size), torch.empty(1, MAX_TOKENS, config["cross_attention_dim"])
        t = torch.zeros(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(latents, t, embeds)
    return 3 * counter.get_total_flops()


def as_markdown(args: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    peak, operations = results.get("peak"), results.get("operations")
    columns = ["s / step", "s of processor / step", "images / s", "share of the peak", "peak memory, MiB"]
    lines = ["# Our trainer beside a bare loop", ""]
    in_millions = f", {results['parameters'] / 1e6:.1f}M parameters" if "parameters" in results else ""
    lines += [
        f"Model {args.model}{in_millions}; batch {args.batch_size}, precision {args.mixed_precision}; {args.steps} "
        f"steps of each after {WARM_UP} of warm-up, "
        + ("in turns. Medians; the ratio of times is the median over pairs of neighbouring steps." * args.turns)
        + ("one loop after the other. Medians." * (not args.turns)),
        "",
    ]
    for checkpointing, found in results["checkpointing"].items():
        lines += [f"Gradient checkpointing {checkpointing}:", "", f"| | {' | '.join(columns)} |"]
        lines += ["|---|" + "---|" * len(columns)]
        for name, title in (("ours", "`ReflowTrainer`"), ("bare", "bare torch loop")):
            row = found.get(name, {})
            if "seconds" in row:
                clock, processor = row["seconds"]
                share = f"{args.batch_size * operations / clock / peak:.3f}" if peak and operations else ""
                cells = [f"{clock:.4f}", f"{processor:.4f}", f"{args.batch_size / clock:.1f}", share]
                lines.append(f"| {title} | {' | '.join(cells)} | {row['memory'] / 2**20:.0f} |")
            elif "error" in row:
                lines.append(f"| {title} | {row['error'].splitlines()[0]} |" + " |" * (len(columns) - 1))
        if all("seconds" in found.get(name, {}) for name in LOOPS):
            pairs = zip(found["ours"]["seconds"], found["bare"]["seconds"], strict=True)
            clock, processor = found.get("paired") or [a / b for a, b in pairs]
            memory = found["ours"]["memory"] / found["bare"]["memory"]
            lines.append(f"| ratio | {clock:.3f} | {processor:.3f} | {1 / clock:.3f} | | {memory:.3f} |")
        saving = found.get("checkpoint") or found.get("ours", {}).get("checkpoint")
        lines += (
            ["", f"A checkpoint takes {saving:.2f} s beside that, every 1000 steps by default.", ""]
            if saving
            else [""]
        )
    if peak:
        lines.append(f"- the peak: {peak / 1e12:.3g} TFLOP/s of a matrix product in {args.mixed_precision}")
    return lines


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_of_model = "bundled model, or a shape with random weights"
    parser.add_argument("--model", choices=("emoji", *MODELS[:2]), default="emoji", help=help_of_model)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--gradient-checkpointing", choices=("off", "on"), nargs="+", default=["off"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="also time a checkpoint")
    parser.add_argument("--small", action="store_true", help="narrow models, to test the script")
    parser.add_argument(
        "--output", type=Path, help="without suffix (default: benchmarks/results/training-MODEL-DEVICE)"
    )
    parser.add_argument("--measure", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--triplets", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.output = args.output or Path(f"benchmarks/results/training-{args.model}-{args.device}")
    args.turns = args.device == "cpu"
    return args


def make_triplets(args: argparse.Namespace, folder: Path) -> int:
    """Make the triplets of both loops with one step of the model; return the number of its parameters."""
    pipeline = load(args).to(args.device)
    config = TripletConfig(num_triplets=64, num_inference_steps=1, guidance_scale=1.0, storage_dtype="float32")
    generate_triplets(pipeline, PROMPTS, folder, config, progress=False)
    return sum(parameter.numel() for parameter in pipeline.unet.parameters())


def measure(args: argparse.Namespace, results: dict[str, Any], save: Callable[[], None]) -> None:
    """Compare the loops; call `save` after each slow measurement."""
    results["checkpointing"] = {each: {} for each in args.gradient_checkpointing}
    with tempfile.TemporaryDirectory() as folder:
        triplets = Path(folder)
        results["parameters"] = make_triplets(args, triplets)
        if args.model != "emoji":
            results["operations"] = operations_per_example(args)
            dtype = {"no": torch.float32, "bf16": torch.bfloat16}[args.mixed_precision]
            results["peak"] = rates(dtype, args.device, small=args.small)[0]
        save()
        for checkpointing, found in results["checkpointing"].items():
            if args.turns:
                found |= in_turns(args, triplets, checkpointing)
                save()
                continue
            for which in LOOPS:
                found[which] = alone(args, triplets, which, checkpointing)
                save()


def main() -> None:
    args = parse_arguments()
    disable_progress_bar()
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if args.measure:
        return measure_memory(args)
    results: dict[str, Any] = {"provenance": provenance(args.device)}
    measure(args, results, lambda: write_results(args.output, results, as_markdown(args, results), quiet=True))
    print(args.output.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
