"""Distil a rectified flow into InstaFlow-1.7B's network: two copies of its U-Net in series, trained for one step.

    rectified-diffusers triplets --teacher XCLiu/2_rectified_flow_from_sd_1_5 --solver teacher --guidance-scale 1.5 \
        --prompts prompts.txt --num-triplets 100000 --output triplets
    python examples/stacked_unet.py --model XCLiu/2_rectified_flow_from_sd_1_5 --triplets triplets --output stacked
    rectified-diffusers generate "a red apple" --model stacked -o apple.png

A run that was stopped goes on when the command is repeated. The paper's settings are batch 64 for 110,000 steps with
the L2 loss, then from the result batch 320 for 2,500 steps with --loss lpips; 1.7 billion parameters want gradient
checkpointing and several GPUs (accelerate launch examples/stacked_unet.py ...).
"""

import argparse
from pathlib import Path

from rectified_diffusers import DistillConfig, DistillTrainer, RectifiedFlowPipeline, StackedUNet, TripletDataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="rectified-flow pipeline, or one that this script made")
parser.add_argument("--triplets", type=Path, required=True, help="folder of the model's own triplets")
parser.add_argument("--output", type=Path, required=True, help="folder of the trained pipeline")
parser.add_argument("--loss", default="l2", choices=("l2", "lpips"))
parser.add_argument("--max-steps", type=int, default=110_000)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--learning-rate", type=float, default=1e-5, help="the paper does not state its own")
parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16", "fp16"))
arguments = parser.parse_args()

pipeline = RectifiedFlowPipeline.from_pretrained(arguments.model)
if not isinstance(pipeline.unet, StackedUNet):
    pipeline.unet = StackedUNet.from_unet(pipeline.unet)
parameters = sum(weight.numel() for weight in pipeline.unet.parameters())
print(f"{parameters:,} parameters")

config = DistillConfig(
    output_dir=arguments.output,
    loss=arguments.loss,
    max_steps=arguments.max_steps,
    batch_size=arguments.batch_size,
    learning_rate=arguments.learning_rate,
    mixed_precision=arguments.mixed_precision,
    gradient_checkpointing=True,
)
DistillTrainer(pipeline, TripletDataset(arguments.triplets), config).train()
