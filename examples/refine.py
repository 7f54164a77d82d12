"""Generate an image in one step at 512 pixels, upscale it, and refine it at 1024 with Stable Diffusion XL's refiner.

    python examples/refine.py --model XCLiu/instaflow_0_9B_from_sd_1_5 --prompt "a fox in the snow" --output fox.png

The same on the command line: rectified-diffusers generate "a fox in the snow" --refine -o fox.png --model ...
Generate many images quickly in one step, then refine the best one. Strength 0.3 of 50 steps runs the refiner 15 times.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL.Image import Resampling

from rectified_diffusers import RectifiedFlowPipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="one-step pipeline: folder or Hub id")
parser.add_argument("--refiner", default="stabilityai/stable-diffusion-xl-refiner-1.0", help="folder or Hub id")
parser.add_argument("--prompt", default="a fox in the snow, sharp focus, detailed fur")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--strength", type=float, default=0.3, help="share of the refiner's steps to run")
parser.add_argument("--steps", type=int, default=50, help="steps of the refiner at strength 1")
parser.add_argument("--output", type=Path, default=Path("refined.png"))
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
precision = torch.float16 if device == "cuda" else torch.float32

pipeline = RectifiedFlowPipeline.from_pretrained(arguments.model).to(device, precision)
picture = pipeline(arguments.prompt, generator=torch.Generator().manual_seed(arguments.seed)).images[0]
picture.save(arguments.output.with_stem(f"{arguments.output.stem}-one-step"))
del pipeline  # frees its memory for the refiner

refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(arguments.refiner).to(device, precision)
refined = refiner(
    arguments.prompt,
    image=picture.resize((2 * picture.width, 2 * picture.height), Resampling.LANCZOS),
    strength=arguments.strength,
    num_inference_steps=arguments.steps,
    generator=torch.Generator().manual_seed(arguments.seed),
).images[0]
refined.save(arguments.output)
