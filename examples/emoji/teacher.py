"""Train the latent diffusion teacher of the emoji model: it plays the part of Stable Diffusion.

    python examples/emoji/teacher.py --data work/data --vae work/vae --output work/teacher

A U-Net on Stable Diffusion's noise schedule, trained together with its text encoder, with prompts dropped for
classifier-free guidance. Resumable; the result is a StableDiffusionPipeline folder. `--initial-model` begins with the
U-Net and the text encoder of a pipeline that is there, and leaves the text encoder as it is:

    python examples/emoji/teacher.py --data work/data --vae MODEL/vae --initial-model MODEL --output work/teacher

Two processes of one thread each are faster than one: `OMP_NUM_THREADS=1 accelerate launch --config_file
examples/accelerate_configs/cpu_2.yaml examples/emoji/teacher.py ...`
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import make_image_grid
from loop import add_training_options, train
from safetensors.torch import load_file, save_file
from text import build_text_encoder, build_tokenizer, describe, read_rows, tokenize
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer
from vae import as_input

from rectified_diffusers.export.stock import fold_sign

PROMPTS = (
    *("a red apple", "grinning face", "dog face", "rocket", "a pizza", "heart", "cat", "house"),
    *("a blue fish", "christmas tree", "soccer ball", "birthday cake", "sun", "umbrella", "car", "ghost"),
)
FLUENT = ("fluent", "flat", "3d")


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 224),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        cross_attention_dim=192,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    # On a CPU and at most 64 positions the plain product is faster backwards than the fused kernel.
    unet.set_attn_processor(AttnProcessor())
    return unet


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, data: Path, output: Path) -> torch.Tensor:
    """VAE-scaled latents (N, 4, 16, 16) of every picture, computed once and kept in `output`."""
    path = output / "latents.safetensors"
    if not path.exists():
        images = load_file(data / "images.safetensors")["images"]
        batches = tqdm(images.split(64), desc="encode")
        with torch.autocast(vae.device.type, torch.bfloat16):
            modes = [vae.encode(as_input(batch).to(vae.device)).latent_dist.mode().float().cpu() for batch in batches]
        output.mkdir(parents=True, exist_ok=True)
        save_file({"latents": (torch.cat(modes) * vae.config.scaling_factor).contiguous()}, path)
    return load_file(path)["latents"]


def start_from(folder: Path) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """U-Net and text encoder of a pipeline, the latter frozen, in float32.

    Of a rectified flow the sign of the U-Net's last layer is turned: it predicts data - noise, and a diffusion model
    alpha * noise - sigma * data.
    """
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").float()
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").float().requires_grad_(False)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    if scheduler.get("prediction_type") == "flow_prediction":
        unet = fold_sign(unet)
    unet.set_attn_processor(AttnProcessor())
    return unet, text_encoder


class TextToPrediction(torch.nn.Module):
    """U-Net and text encoder as one module, since they are trained together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return self.unet(x_t, timesteps, self.text_encoder(token_ids).last_hidden_state).sample


class DiffusionLoss:
    """v-prediction, alpha * noise - sigma * data, with dropped prompts; all timesteps count the same.

    The prompt decides colour and shape at high noise. There v is the picture, and epsilon the input, which says
    nothing of it: even weighted by SNR^(-1/2), epsilon learns the picture far more slowly there.
    """

    def __init__(self, tokenizer: CLIPTokenizer, latents: torch.Tensor, rows: list[dict], args: argparse.Namespace):
        self.tokenizer, self.args, self.schedule = tokenizer, args, noise_schedule()
        train_rows = [i for i, row in enumerate(rows) if row["split"] == "train"]
        self.latents, self.rows = latents[train_rows], [rows[i] for i in train_rows]
        # Three renderings of one design count as one.
        self.weights = torch.tensor([1 / 3 if row["style"] in FLUENT else 1.0 for row in self.rows])

    def __call__(self, module: torch.nn.Module, generator: torch.Generator, mine: slice) -> torch.Tensor:
        count = self.args.batch_size
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        dropped = torch.rand(count, generator=generator) < self.args.prompt_dropout
        captions = [describe(self.rows[i], generator) for i in chosen.tolist()]
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        data = self.latents[chosen]
        noise = torch.randn(data.shape, generator=generator)
        timesteps = torch.randint(self.schedule.config.num_train_timesteps, (count,), generator=generator)
        x_t = self.schedule.add_noise(data, noise, timesteps)
        target = self.schedule.get_velocity(data, noise, timesteps)

        device = next(module.parameters()).device
        token_ids = tokenize(self.tokenizer, captions[mine]).to(device)
        predicted = module(x_t[mine].to(device), timesteps[mine].to(device), token_ids).float()
        return (predicted - target[mine].to(device)).square().mean()


def noise_schedule() -> DDPMScheduler:
    """The schedule of Stable Diffusion, with the prediction of its 2.x at 768 pixels."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options of `train_teacher`, from the command line if no arguments are given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--vae", type=Path, required=True, help="folder that vae.py or decoder.py wrote")
    parser.add_argument(
        "--initial-model", type=Path, help="folder of a pipeline to begin with; from nothing if not set"
    )
    parser.add_argument("--prompt-dropout", type=float, default=0.1)
    add_training_options(parser, max_steps=40_000, batch_size=32, learning_rate=5e-4)
    return parser.parse_args(arguments)


def train_teacher(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKL.from_pretrained(args.vae).to(device)
    latents = encode_pictures(vae, args.data, args.output)
    if args.initial_model:
        tokenizer = CLIPTokenizer.from_pretrained(args.initial_model, subfolder="tokenizer")
        module = TextToPrediction(*start_from(args.initial_model))
    else:
        tokenizer = build_tokenizer(args.data, args.output / "tokenizer")
        module = TextToPrediction(build_unet(), build_text_encoder(tokenizer))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=module.text_encoder,
        tokenizer=tokenizer,
        unet=module.unet,
        scheduler=DPMSolverMultistepScheduler.from_config(noise_schedule().config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def save() -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        with torch.no_grad():
            images = pipeline(list(PROMPTS), num_inference_steps=25, guidance_scale=4.0, generator=generators).images
        make_image_grid([image.resize((128, 128)) for image in images], 2, 8).save(args.output / "samples.png")
        pipeline.save_pretrained(args.output)

    train(module, DiffusionLoss(tokenizer, latents, read_rows(args.data), args), save, args)


if __name__ == "__main__":
    train_teacher(parse_arguments())
