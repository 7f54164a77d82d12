"""Train a LoRA for a rectified flow on captioned pictures, in the shape of diffusers' train_text_to_image_lora.py.

    accelerate launch examples/fine_tuning/text_to_image_lora.py --model XCLiu/2_rectified_flow_from_sd_1_5 \
        --train-data-dir pictures --output-dir lora --mixed-precision bf16

The folder holds pictures and metadata.jsonl, a line {"file_name": "a.png", "text": "a red apple"} for each
(pip install datasets). The output folder holds pytorch_lora_weights.safetensors, which every Stable Diffusion pipeline
of diffusers loads: `pipeline.load_lora_weights("lora")`. docs/fine_tuning.md says which models to start from.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tqdm import tqdm

from rectified_diffusers import FlowObjective, RectifiedFlowPipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="rectified-flow pipeline: folder or Hub id")
parser.add_argument("--train-data-dir", required=True, help="folder of pictures and metadata.jsonl")
parser.add_argument("--output-dir", required=True, help="where the LoRA is saved")
parser.add_argument("--resolution", type=int, help="side of the pictures in pixels; the model's own if not given")
parser.add_argument("--train-batch-size", type=int, default=4, help="pictures per forward pass of a process")
parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
parser.add_argument("--max-train-steps", type=int, default=1000)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--rank", type=int, default=4, help="rank of the LoRA")
parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

accelerator = Accelerator(
    gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision
)
set_seed(args.seed, device_specific=True)
pipeline = RectifiedFlowPipeline.from_pretrained(args.model)
unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
for model in (unet, vae, text_encoder):
    model.requires_grad_(False).to(accelerator.device)
attention = ["to_k", "to_q", "to_v", "to_out.0"]
unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=attention))
cast_training_params(unet)  # float32, whatever the model was stored in
lora_layers = [parameter for parameter in unet.train().parameters() if parameter.requires_grad]
side = args.resolution or unet.config.sample_size * pipeline.vae_scale_factor


def collate(examples):
    images = [example["image"].convert("RGB") for example in examples]
    pixels = torch.cat([pipeline.image_processor.preprocess(image, side, side, "crop") for image in images])
    texts = [example["text"] for example in examples]
    ids = pipeline.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return {"pixel_values": pixels, "input_ids": ids}


dataset = load_dataset("imagefolder", data_dir=args.train_data_dir, split="train")
dataloader = torch.utils.data.DataLoader(dataset, args.train_batch_size, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW(lora_layers, lr=args.learning_rate)
lr_scheduler = get_scheduler("constant", optimizer)
unet, optimizer, dataloader, lr_scheduler = accelerator.prepare(unet, optimizer, dataloader, lr_scheduler)

objective = FlowObjective()
progress_bar = tqdm(total=args.max_train_steps, disable=not accelerator.is_local_main_process)
while progress_bar.n < args.max_train_steps:
    for batch in dataloader:
        with accelerator.accumulate(unet):
            with torch.no_grad():
                latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
                prompt_embeds = text_encoder(batch["input_ids"])[0]
            flow = objective.prepare(noise=torch.randn_like(latents), data=latents)
            with accelerator.autocast():
                prediction = unet(flow.x_t, flow.timesteps, prompt_embeds).sample
            loss = objective.loss(prediction, flow)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(lora_layers, 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            progress_bar.update()
            progress_bar.set_postfix(loss=loss.item())
        if progress_bar.n == args.max_train_steps:
            break

accelerator.wait_for_everyone()
if accelerator.is_main_process:
    trained = accelerator.unwrap_model(unet)
    layers, settings = get_peft_model_state_dict(trained), trained.peft_config["default"].to_dict()
    pipeline.save_lora_weights(args.output_dir, unet_lora_layers=layers, unet_lora_adapter_metadata=settings)
accelerator.end_training()
