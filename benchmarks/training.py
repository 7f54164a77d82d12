"""Our trainer beside a bare torch loop of the same model, data and loss, in one run: seconds per step and memory.

    python benchmarks/training.py
    python benchmarks/training.py --model sd15 --device cuda --mixed-precision bf16 --batch-size 16 --steps 100

The bare loop is what one writes by hand when nothing may fail: all triplets and prompt embeddings in memory, AdamW,
gradient clipping, an average of the weights, and no more. The trainer reads its triplets from shards, draws what a
step sees from (seed, step), knows processes and micro-batches, looks for NaN and keeps a log. Steps alternate, so that
whatever else the machine does meets both; medians are compared. Peak memory is measured in a process for each.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.logging import disable_progress_bar
from transformers import CLIPTextConfig, CLIPTextModel

from machine import provenance
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
Step = Callable[[int], float]


def make_pipeline(model: str) -> RectifiedFlowPipeline:
    """Load the bundled model, or put a U-Net of Stable Diffusion 1.5's shape with random weights in its place."""
    pipeline = RectifiedFlowPipeline.from_pretrained(str(bundled_checkpoint()), dtype=torch.float32)
    if model == "sd15":
        torch.manual_seed(0)
        pipeline.register_modules(unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768))
        vocabulary = pipeline.text_encoder.config.vocab_size
        pipeline.register_modules(text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, hidden_size=768)))
    return pipeline


def config_of(args: argparse.Namespace, output_dir: Path) -> ReflowConfig:
    return ReflowConfig(
        output_dir=output_dir,
        batch_size=args.batch_size,
        mixed_precision=args.mixed_precision,
        max_steps=10**6,
        prompt_dropout=0.0,
        log_every_steps=10,
    )


def ours(pipeline: RectifiedFlowPipeline, dataset: TripletDataset, config: ReflowConfig) -> tuple[Step, ReflowTrainer]:
    """Give a step of the trainer, with all that `train` does in it but checkpoints."""
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


def bare(pipeline: RectifiedFlowPipeline, dataset: TripletDataset, config: ReflowConfig, device: torch.device) -> Step:
    """Give a step of a loop written by hand."""
    unet = UNet2DConditionModel.from_config(pipeline.unet.config)
    unet.load_state_dict(pipeline.unet.state_dict())
    unet.to(device).train()
    triplets = dataset.rows(range(len(dataset)))
    noise, data = triplets.noise.to(device), triplets.data.to(device)
    with torch.no_grad():
        embeds = pipeline.to(device).encode_prompt(triplets.prompts, device, 1, False)[0].float()
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


def timed(step: Step, number: int) -> tuple[float, float]:
    """Give the seconds of a step by the clock and by the processor; the loss it ends with waits for the device."""
    clock, processor = time.perf_counter(), time.process_time()
    step(number)
    return time.perf_counter() - clock, time.process_time() - processor


def compare(args: argparse.Namespace, triplets: Path) -> dict[str, Any]:
    """Time both in turns, each step of one beside a step of the other, and a checkpoint at the end."""
    with tempfile.TemporaryDirectory() as folder:
        dataset, config = TripletDataset(triplets), config_of(args, Path(folder))
        our_step, trainer = ours(make_pipeline(args.model), dataset, config)
        steps = {"ours": our_step, "bare": bare(make_pipeline(args.model), dataset, config, trainer.device)}
        times: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
        for number in range(1, WARM_UP + args.steps + 1):
            for name in ("ours", "bare") if number % 2 else ("bare", "ours"):
                times[name].append(timed(steps[name], number))
        start = time.perf_counter()
        trainer.save(WARM_UP + args.steps)
        saving = time.perf_counter() - start
    medians = {
        name: [statistics.median(column) for column in zip(*rows[WARM_UP:], strict=True)]
        for name, rows in times.items()
    }
    ratios = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(times["ours"], times["bare"], strict=True)]
    paired = [statistics.median(column) for column in zip(*ratios[WARM_UP:], strict=True)]
    parameters = sum(parameter.numel() for parameter in trainer.parameters)
    return {"seconds": medians, "paired": paired, "checkpoint": saving, "parameters": parameters}


def measure_memory(args: argparse.Namespace, triplets: Path) -> None:
    """Run a few steps of one of the two and print the peak memory of this process, in bytes."""
    pipeline, dataset = make_pipeline(args.model), TripletDataset(triplets)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(args, Path(folder))
        device = torch.device(args.device)
        step = (
            ours(pipeline, dataset, config)[0] if args.measure == "ours" else bare(pipeline, dataset, config, device)
        )
        for number in range(1, WARM_UP + 2):
            step(number)
    on_gpu = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    print(json.dumps(on_gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def peak_memory(args: argparse.Namespace, triplets: Path, which: str) -> int:
    command = [sys.executable, __file__, "--measure", which, "--triplets", str(triplets)]
    for name in ("model", "device", "mixed_precision", "batch_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return int(json.loads(lines[-1]))


def where_and_when(device: str) -> list[str]:
    """Lines with the command, and under it commit, hardware, load, date, versions."""
    facts = provenance(device)
    command = facts.pop("command")
    return [f"    {command}", "", "; ".join(f"{name} {value}" for name, value in facts.items()) + "."]


def as_markdown(args: argparse.Namespace, result: dict[str, Any], memory: dict[str, int]) -> str:
    rows = []
    for name, title in (("ours", "`ReflowTrainer`"), ("bare", "bare torch loop")):
        clock, processor = result["seconds"][name]
        rows.append(f"| {title} | {clock:.4f} | {processor:.4f} | {memory[name] / 2**20:.0f} |")
    clock, processor = result["paired"]
    rows.append(f"| ratio | {clock:.3f} | {processor:.3f} | {memory['ours'] / memory['bare']:.3f} |")
    return "\n".join(
        [
            "# Our trainer beside a bare loop",
            "",
            f"Model {args.model}, {result['parameters'] / 1e6:.1f}M parameters; batch {args.batch_size}, precision "
            f"{args.mixed_precision}; {args.steps} steps of each, in turns after {WARM_UP} of warm-up. Medians; the "
            "ratio of times is the median over pairs of neighbouring steps.",
            "",
            "| | s / step | s of processor / step | peak memory, MiB |",
            "|---|---|---|---|",
            *rows,
            "",
            f"A checkpoint takes {result['checkpoint']:.2f} s beside that, every 1000 steps by default.",
            "",
            *where_and_when(args.device),
            "",
        ]
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("emoji", "sd15"), default="emoji", help="bundled model, or SD 1.5's shape")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result")
    parser.add_argument("--measure", choices=("ours", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--triplets", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    disable_progress_bar()
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if args.measure:
        return measure_memory(args, args.triplets)
    with tempfile.TemporaryDirectory() as folder:
        triplets, pipeline = Path(folder), make_pipeline(args.model).to(args.device)
        config = TripletConfig(num_triplets=64, num_inference_steps=1, guidance_scale=1.0, storage_dtype="float32")
        generate_triplets(pipeline, PROMPTS, triplets, config, progress=False)
        del pipeline
        memory = {which: peak_memory(args, triplets, which) for which in ("ours", "bare")}
        text = as_markdown(args, compare(args, triplets), memory)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"training-{args.model}-{args.device}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
