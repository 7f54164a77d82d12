"""Transfer the style of a Stable Diffusion fine-tune to a one-step model, and remove it again.

    python examples/weight_delta.py --model XCLiu/instaflow_0_9B_from_sd_1_5 --fine-tune Lykon/dreamshaper-7 \
        --base stable-diffusion-v1-5/stable-diffusion-v1-5

The difference between the fine-tune's U-Net and its base is added to the model's U-Net. The fine-tune's VAE and text
encoder replace the model's. Pass --components without values to keep the model's own.
"""

import argparse
from pathlib import Path

import torch
from PIL.Image import Image

from rectified_diffusers import RectifiedFlowPipeline, apply_weight_delta, compute_weight_delta, swap_components

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="rectified-flow pipeline: folder or Hub id")
parser.add_argument("--fine-tune", required=True, help="fine-tune of the base: folder or Hub id")
parser.add_argument("--base", required=True, help="base model of the fine-tune: folder or Hub id")
parser.add_argument("--scale", type=float, default=1.0, help="weight of the style (default: 1)")
parser.add_argument("--components", nargs="*", default=["vae", "text_encoder"], help="components to swap in")
parser.add_argument("--prompt", default="a red apple on a table")
parser.add_argument("--output-dir", type=Path, default=Path())
arguments = parser.parse_args()

pipeline = RectifiedFlowPipeline.from_pretrained(arguments.model)
pipeline.set_progress_bar_config(disable=True)


def draw() -> Image:
    return pipeline(arguments.prompt, generator=torch.Generator().manual_seed(0)).images[0]


before = draw()
before.save(arguments.output_dir / "before.png")

# A file of one U-Net's size, made without loading either model; make it once.
delta = compute_weight_delta(arguments.fine_tune, arguments.base, arguments.output_dir / "delta.safetensors")

applied = apply_weight_delta(pipeline.unet, delta, arguments.scale)
swapped = swap_components(pipeline, arguments.fine_tune, arguments.components)
draw().save(arguments.output_dir / "after.png")

swapped.take_back()
applied.take_back()
assert draw().tobytes() == before.tobytes()  # bit for bit
