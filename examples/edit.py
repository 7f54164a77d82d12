"""Edit an image by its prompt: invert it to its noise, then generate from that noise with another prompt.

    python examples/edit.py --model 2-rectified-flow --picture dog.png --source "dog face" --target "cat face"

The model must be a multi-step flow, such as XCLiu/2_rectified_flow_from_sd_1_5. A one-step model predicts the velocity
only at the noise end. The round-trip error shows whether the steps are enough: below 0.01 the image is reconstructed
unchanged.
"""

import argparse
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL import Image

from rectified_diffusers import RectifiedFlowPipeline, edit, round_trip_error

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="rectified-flow pipeline: folder or Hub id")
parser.add_argument("--picture", type=Path, help="image to edit (default: generated from the source prompt)")
parser.add_argument("--source", default="dog face", help="prompt of the given image")
parser.add_argument("--target", default="cat face", help="prompt of the edited image")
parser.add_argument("--steps", type=int, default=16, help="Heun steps in each direction, two evaluations each")
parser.add_argument("--guidance-scale", type=float, default=1.5, help="guidance towards the target prompt")
parser.add_argument("--strengths", type=float, nargs="+", default=[0.4, 0.6, 0.8, 1.0], help="shares of the flow")
parser.add_argument("--output", type=Path, default=Path("edited.png"))
arguments = parser.parse_args()

pipeline = RectifiedFlowPipeline.from_pretrained(arguments.model)
size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
if arguments.picture is None:
    picture = pipeline(arguments.source, num_inference_steps=arguments.steps).images[0]
else:
    picture = Image.open(arguments.picture).convert("RGB").resize((size, size))

error = round_trip_error(pipeline, picture, arguments.source, arguments.steps).item()
print(f"round-trip error with {arguments.steps} steps: {error:.1e}")

sheet = [picture]
for strength in arguments.strengths:
    sheet += edit(
        pipeline,
        picture,
        arguments.source,
        arguments.target,
        arguments.steps,
        guidance_scale=arguments.guidance_scale,
        strength=strength,
    )
make_image_grid(sheet, rows=1, cols=len(sheet)).save(arguments.output)
