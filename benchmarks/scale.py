"""Compute the numbers of docs/scale.md that need no GPU: count operations, measure bytes and reading speed.

    python benchmarks/scale.py

torch counts the operations on the exact shapes of Stable Diffusion 1.5 at 512x512, without weights (device meta).
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from machine import provenance, write_page
from rectified_diffusers.data.shards import Shard, shard_path, write_shard

LATENTS = (4, 64, 64)
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def count_operations() -> dict[str, float]:
    """Count the floating-point operations of a forward pass for one image; a multiply-add is two operations."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae, text = AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**TEXT))
        latents, embeds = torch.empty(1, *LATENTS), torch.empty(1, 77, 768)
        calls = {
            "U-Net": lambda: unet(latents, torch.empty(1), embeds),
            "VAE decoder": lambda: vae.decode(latents),
            "text encoder": lambda: text(torch.zeros(1, 77, dtype=torch.long)),
        }
        counts = {}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            counts[name] = float(counter.get_total_flops())
    counts["parameters"] = float(sum(parameter.numel() for parameter in unet.parameters()))
    return counts


def measure_reading(rows: int, shards: int) -> tuple[float, float]:
    """Write shards of synthetic triplets; return bytes per triplet and triplets read per second, in random order."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = ["a photograph of an astronaut riding a horse on the moon, detailed"] * rows
        for i in range(shards):
            ends = {name: torch.randn(rows, *LATENTS).half() for name in ("noise", "data")}
            write_shard(shard_path(Path(folder), i), ends, {"shard": i, "manifest": "", "prompts": prompts})
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / (rows * shards)
        opened = [Shard.open(shard_path(Path(folder), i)) for i in range(shards)]
        order = torch.randperm(rows * shards, generator=torch.Generator().manual_seed(0)).tolist()
        start = time.process_time()
        for index in order:
            shard, row = opened[index // rows], index % rows
            {name: part.float() for name, part in shard.checked_row(row).items()}
        return size, len(order) / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result")
    args = parser.parse_args()
    facts, counts = provenance(), count_operations()
    size, rate = measure_reading(rows=256, shards=4)
    lines = ["# Figures for docs/scale.md", "", "| | |", "|---|---|"]
    for name in ("U-Net", "VAE decoder", "text encoder"):
        lines.append(f"| {name}, one forward pass | {counts[name] / 1e12:.3f} TFLOP |")
    lines += [
        f"| U-Net, parameters | {counts['parameters']:,.0f} |",
        f"| bytes per triplet on disk, float16 | {size:,.0f} |",
        f"| triplets read per second of one processor, random order, in the cache | {rate:,.0f} |",
    ]
    write_page(args.output / "scale.md", lines, facts)


if __name__ == "__main__":
    main()
