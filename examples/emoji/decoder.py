"""Train the decoder of the emoji model's VAE further, with a perceptual loss.

    python examples/emoji/decoder.py --data work/data --weights work/weights --vae work/vae --output work/decoder

The encoder does not change, so latents keep their meaning: the U-Nets of teacher and student work with the new decoder
without further training, and triplets stay valid. The loss of `vae.py`, without its KL term, plus LPIPS (VGG-16). If
the script is killed, run the same command again to resume. The result is a diffusers folder of the VAE.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from loop import add_training_options, train
from vae import loss_on, pixel_loss, read_split, save

from rectified_diffusers.training.losses import load_lpips


class DecoderLoss(torch.nn.Module):
    """L1 on pixels and on their gradients, and LPIPS, of images that are encoded without a gradient."""

    def __init__(self, vae: AutoencoderKL, lpips: torch.nn.Module, lpips_weight: float):
        super().__init__()
        self.vae, self.lpips, self.lpips_weight = vae, lpips.requires_grad_(False), lpips_weight
        for name, weight in vae.named_parameters():
            weight.requires_grad_(name.startswith(("post_quant_conv.", "decoder.")))

    def forward(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with torch.no_grad():
            latents = self.vae.encode(images).latent_dist.sample(generator)
        decoded = self.vae.decode(latents).sample.float()
        return pixel_loss(decoded, images) + self.lpips_weight * self.lpips(decoded, images).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--weights", type=Path, required=True, help="folder that weights.py wrote")
    parser.add_argument("--vae", type=Path, required=True, help="folder that vae.py wrote, or a pipeline's VAE")
    parser.add_argument("--lpips-weight", type=float, default=1.0)
    add_training_options(parser, max_steps=1500, batch_size=16, learning_rate=5e-4)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32)
    images, held_out = read_split(args.data)
    lpips = load_lpips("vgg", args.weights / "lpips_vgg16.safetensors")

    loss = DecoderLoss(vae, lpips, args.lpips_weight)
    train(loss, loss_on(images, vae, args.batch_size), lambda: save(vae, held_out, args.output), args)


if __name__ == "__main__":
    main()
