"""Train a small ControlNet for the one-step emoji model: it draws along the Canny edges it is given.

    python examples/emoji/controlnet.py --model work/one-step --data work/data --output work/controlnet

Resumable. The result is a ControlNetModel folder for RectifiedFlowControlNetPipeline, and `samples.png`: the edges of
held-out pictures, what the model draws along them, and what it draws from the same noise and prompt without them.
Needs `pip install "rectified_diffusers[controlnet]"`.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import make_image_grid
from loop import add_training_options, train
from PIL import Image
from safetensors.torch import load_file
from teacher import encode_pictures
from text import describe, read_rows, tokenize, with_article

from rectified_diffusers import RectifiedFlowControlNetPipeline, RectifiedFlowPipeline

NOISE_END = 1000.0  # what the U-Net is given at t = 0
SAMPLES = 12


def build_controlnet(pipeline: RectifiedFlowPipeline) -> ControlNetModel:
    """Copy the down half of the U-Net, beside an embedding that brings edges to the size of the latents.

    The embedding halves the picture once for each channel count after the first. The default has three halvings, for
    Stable Diffusion's VAE; that of the emoji model is 4 times smaller than its pictures: two.
    """
    halvings = pipeline.vae_scale_factor.bit_length() - 1
    controlnet = ControlNetModel.from_unet(
        pipeline.unet, conditioning_embedding_out_channels=(16, 32, 96, 256)[: halvings + 1]
    )
    controlnet.set_attn_processor(AttnProcessor())  # as in teacher.py: faster on a CPU
    return controlnet


def find_edges(images: np.ndarray) -> torch.Tensor:
    """White edges on black, (B, 3, H, W) in [0, 1], of bytes (B, 3, H, W)."""
    from controlnet_aux import CannyDetector

    canny, size = CannyDetector(), images.shape[-1]
    maps = [
        canny(image.transpose(1, 2, 0), 100, 200, detect_resolution=size, image_resolution=size) for image in images
    ]
    return torch.from_numpy(np.stack(maps)).permute(0, 3, 1, 2) / 255


class OneStepLoss:
    """|| noise + v(noise, t = 0 | prompt, edges) - data ||^2 with the edges of the real picture `data`.

    The loss of distillation by L2 (arXiv:2309.06380), but the target is a real picture and not the teacher's: it is
    the edges that say which. Prompts are dropped, so that edges alone mean something.
    """

    def __init__(
        self,
        pipeline: RectifiedFlowPipeline,
        images: torch.Tensor,
        latents: torch.Tensor,
        rows: list[dict],
        args: argparse.Namespace,
    ):
        self.pipeline, self.args = pipeline, args
        train_rows = [i for i, row in enumerate(rows) if row["split"] == "train"]
        self.images, self.latents = images[train_rows], latents[train_rows]
        self.rows = [rows[i] for i in train_rows]

    def __call__(self, module: torch.nn.Module, generator: torch.Generator, mine: slice) -> torch.Tensor:
        count = self.args.batch_size
        chosen = torch.randint(len(self.rows), (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < self.args.prompt_dropout
        captions = [describe(self.rows[i], generator) for i in chosen.tolist()]
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)][mine]
        data = self.latents[chosen][mine]
        noise = torch.randn((count, *data.shape[1:]), generator=generator)[mine]
        edges = find_edges(self.images[chosen][mine].numpy())
        device = self.pipeline.device
        predicted = self.predict(module, noise.to(device), captions, edges.to(device))
        return F.mse_loss(predicted.float(), data.to(device))

    def predict(self, controlnet: Any, noise: torch.Tensor, captions: list[str], edges: torch.Tensor) -> torch.Tensor:
        """The data at the end of the one step from `noise`."""
        token_ids = tokenize(self.pipeline.tokenizer, captions).to(noise.device)
        with torch.no_grad():
            prompt_embeds = self.pipeline.text_encoder(token_ids).last_hidden_state
        down, mid = controlnet(noise, NOISE_END, prompt_embeds, controlnet_cond=edges, return_dict=False)
        velocity = self.pipeline.unet(
            noise,
            NOISE_END,
            prompt_embeds,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
        return noise + velocity


def edge_agreement(given: torch.Tensor, found: torch.Tensor) -> float:
    """F1 of the found edge pixels against the given ones, each within one pixel; both (B, 3, H, W) in [0, 1]."""
    given, found = given[:, :1].round(), found[:, :1].round()
    near_given, near_found = (F.max_pool2d(edges, 3, stride=1, padding=1) for edges in (given, found))
    recall = (given * near_found).sum() / given.sum().clamp(min=1)
    precision = (found * near_given).sum() / found.sum().clamp(min=1)
    return (2 * precision * recall / (precision + recall).clamp(min=1e-9)).item()


@torch.no_grad()
def show(pipeline: RectifiedFlowPipeline, controlnet: ControlNetModel, images: torch.Tensor, rows: list[dict]):
    """Draw from the edges of `images` and from the same noise without them: a sheet of three rows, and a line."""
    edges = find_edges(images.numpy())
    prompts = [with_article(row["label"]) for row in rows]
    parts = {**pipeline.components, "controlnet": controlnet, "requires_safety_checker": False}
    steered_by = RectifiedFlowControlNetPipeline(**parts)
    steered_by.set_progress_bar_config(disable=True)

    def noise() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(len(prompts))]

    steered = steered_by(prompts, image=edges, generator=noise()).images
    free = pipeline(prompts, generator=noise()).images
    agreement = [
        edge_agreement(edges, find_edges(np.stack([np.asarray(image).transpose(2, 0, 1) for image in pictures])))
        for pictures in (steered, free)
    ]
    print(f"agreement with the given edges (F1): {agreement[0]:.3f}, without the ControlNet {agreement[1]:.3f}")
    given = [Image.fromarray((edge * 255).byte().permute(1, 2, 0).numpy()) for edge in edges]
    return make_image_grid([picture.resize((128, 128)) for picture in (*given, *steered, *free)], 3, len(prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the one-step model, or its Hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--prompt-dropout", type=float, default=0.3)
    add_training_options(parser, max_steps=4000, batch_size=32, learning_rate=2e-4)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    pipeline = RectifiedFlowPipeline.from_pretrained(args.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.requires_grad_(False).set_attn_processor(AttnProcessor())
    controlnet = build_controlnet(pipeline)
    images, rows = load_file(args.data / "images.safetensors")["images"], read_rows(args.data)
    latents = encode_pictures(pipeline.vae, args.data, args.output)
    held_out = [i for i, row in enumerate(rows) if row["split"] == "caption"]
    shown = held_out[:: max(1, len(held_out) // SAMPLES)][:SAMPLES]

    def save() -> None:
        controlnet.save_pretrained(args.output)
        show(pipeline, controlnet, images[shown], [rows[i] for i in shown]).save(args.output / "samples.png")

    train(controlnet, OneStepLoss(pipeline, images, latents, rows, args), save, args)


if __name__ == "__main__":
    main()
