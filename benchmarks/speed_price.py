"""Measure the gain and cost of each switch of `optimize` on a real model: milliseconds and image levels of 255.

    python benchmarks/speed_price.py                          # the bundled emoji model
    python benchmarks/speed_price.py --model FOLDER --device cuda

Compares each switch alone, and then all together, with the unmodified pipeline on the same noise. The largest and the
mean difference are over all images, pixels and colors.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from machine import median, provenance, seconds, write_results
from rectified_diffusers import bundled_checkpoint
from rectified_diffusers.speed.optimize import optimize

PROMPTS = ["red apple", "fox", "snowman", "pizza", "green frog", "sailboat", "crying face", "blue book"]
OFF: dict[str, Any] = {
    "dtype": None,
    "channels_last": False,
    "blockwise_attention": False,
    "fold_upsampling": False,
    "pack_weights": False,
    "fuse_qkv": False,
    "compile": False,
    "cache_prompts": False,
    "cache_times": False,
    "keep_memory": False,
}
IN_BFLOAT16 = {"blockwise_attention", "pack_weights"}  # without effect in float32


def switches(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    half = getattr(torch, args.half)
    alone = {name: {**OFF, name: True} for name in OFF if name not in IN_BFLOAT16 | {"dtype", "compile"}}
    rows = {"none": OFF, **alone, args.half: {**OFF, "dtype": half}}
    if half == torch.bfloat16 and not args.device.startswith("cuda"):
        rows |= {f"{args.half}, {name}": {**OFF, "dtype": half, name: True} for name in sorted(IN_BFLOAT16)}
    if args.compile:
        rows["compile"] = {**OFF, "compile": True}
    rows["lossless"] = {"lossless": True}
    rows["auto"] = {"compile": "auto" if args.compile else False}
    return rows


def draw(pipeline: Any, prompts: list[str]) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return np.stack([np.asarray(picture).astype(int) for picture in pipeline(prompts, generator=generators).images])


def draw_each(pipeline: Any) -> np.ndarray:
    return np.concatenate([draw(pipeline, [prompt]) for prompt in PROMPTS])


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    pipeline = DiffusionPipeline.from_pretrained(args.model).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    reference, rows = draw_each(pipeline), []
    for name, chosen in switches(args).items():
        with optimize(pipeline, **chosen):
            found = draw_each(pipeline)  # warms up as well
            one = [seconds(lambda: draw_each(pipeline), args.device) / len(PROMPTS) for _ in range(args.rounds)]
            draw(pipeline, PROMPTS)
            many = [seconds(lambda: draw(pipeline, PROMPTS), args.device) / len(PROMPTS) for _ in range(args.rounds)]
        difference = np.abs(found - reference)
        rows.append(
            {
                "switch": name,
                "ms": 1e3 * median(one),
                "ms_of_8": 1e3 * median(many),
                "largest": int(difference.max()),
                "mean": float(difference.mean()),
            }
        )
    if not np.array_equal(draw_each(pipeline), reference):
        raise RuntimeError("the restored pipeline does not draw the pictures of before")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=str(bundled_checkpoint()))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--half", choices=["bfloat16", "float16"], help="default: float16 on CUDA, else bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed_price"), help="without suffix")
    args = parser.parse_args()
    on_cuda = args.device.startswith("cuda")
    args.half = args.half or ("float16" if on_cuda else "bfloat16")
    args.compile = on_cuda if args.compile is None else args.compile
    torch.set_num_threads(args.threads)
    results = {"provenance": provenance(args.device), "rows": measure(args)}
    if args.model == str(bundled_checkpoint()):
        args.model = "the bundled model"
    lines = [f"# Gain and price of each switch: {args.model}", ""]
    lines += ["| switch | ms a picture | ms, 8 at once | largest difference | mean |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        lines.append(
            f"| {row['switch']} | {row['ms']:.1f} | {row['ms_of_8']:.1f} | {row['largest']} | {row['mean']:.4f} |"
        )
    write_results(args.output, results, lines)


if __name__ == "__main__":
    main()
