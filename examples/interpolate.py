"""Animate the interpolation between prompts, with one network evaluation per frame.

    python examples/interpolate.py "a red apple" "grinning face" "dog face" --loop --output morph.gif

The same on the command line: rectified-diffusers interpolate "a red apple" "grinning face" --loop -o morph.gif
A one-step model generates every frame from its own noise and text, so an animation costs as much as its frames.
"""

import argparse
import math
from pathlib import Path

from diffusers.utils import make_image_grid

from rectified_diffusers import RectifiedFlowPipeline, bundled_checkpoint, interpolate, save_animation

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", nargs="+", metavar="PROMPT")
parser.add_argument("--model", help="folder or Hub id (default: the bundled emoji model)")
parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one seed for all prompts, or one per prompt")
parser.add_argument("--frames", type=int, default=15, help="frames from one prompt to the next")
parser.add_argument("--loop", action="store_true", help="go back to the first prompt")
parser.add_argument("--output", type=Path, default=Path("interpolation.gif"), help=".gif, or .mp4 with ffmpeg")
arguments = parser.parse_args()

pipeline = RectifiedFlowPipeline.from_pretrained(arguments.model or bundled_checkpoint())
frames = interpolate(pipeline, arguments.prompts, arguments.seeds, arguments.frames, loop=arguments.loop)
save_animation(frames, arguments.output, frames_per_second=15)

# A still image for print: a square grid of evenly spaced frames.
side = math.isqrt(len(frames))
chosen = [frames[i * len(frames) // side**2] for i in range(side**2)]
make_image_grid(chosen, rows=side, cols=side).save(arguments.output.with_suffix(".png"))
