"""Stack LoRAs on a one-step model with the standard diffusers methods, and remove them again.

    python examples/lora_stacking.py --model XCLiu/instaflow_0_9B_from_sd_1_5 \
        --lora style.safetensors=0.8 detail.safetensors=0.5 character.safetensors=0.7

Files in diffusers' layout and in kohya's (CivitAI) both load. The output image shows the model alone, with each LoRA,
and with all of them. LoRAs trained on Stable Diffusion 1.5 fit a model that was made from it.
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL.Image import Image

from rectified_diffusers import RectifiedFlowPipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="rectified-flow pipeline: folder or Hub id")
parser.add_argument("--lora", nargs="+", required=True, metavar="FILE=WEIGHT", help="LoRA file and its weight")
parser.add_argument("--prompt", default="a red apple on a table")
parser.add_argument("--output", type=Path, default=Path("lora_stacking.png"))
arguments = parser.parse_args()

pipeline = RectifiedFlowPipeline.from_pretrained(arguments.model)
pipeline.set_progress_bar_config(disable=True)


def draw() -> Image:
    return pipeline(arguments.prompt, generator=torch.Generator().manual_seed(0)).images[0]


pictures = [draw()]

weights = {}
for text in arguments.lora:
    file, equals, weight = text.rpartition("=")
    if not equals:
        parser.error(f"expected FILE=WEIGHT, such as {text}=0.8, got {text}")
    name = f"lora_{len(weights)}"  # PEFT allows no dots in a name
    pipeline.load_lora_weights(str(Path(file).parent), weight_name=Path(file).name, adapter_name=name)
    weights[name] = float(weight)

for name, weight in weights.items():
    pipeline.set_adapters(name, weight)
    pictures.append(draw())
pipeline.set_adapters(list(weights), list(weights.values()))
pictures.append(draw())

# To save a model with the LoRAs fused into its weights, do it here:
#     pipeline.fuse_lora(components=["unet", "text_encoder"])
#     pipeline.unload_lora_weights()
#     pipeline.save_pretrained(folder)
pipeline.unload_lora_weights()
assert draw().tobytes() == pictures[0].tobytes()  # bit for bit: nothing was added to the weights

make_image_grid(pictures, 1, len(pictures)).save(arguments.output)
