"""Train the small AutoencoderKL of the emoji model: 64x64 pictures to 16x16x4 latents.

    python examples/emoji/vae.py --data work/data --output work/vae

Kill it and run the same command again: it goes on from the last checkpoint. The result is a diffusers folder.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from loop import add_training_options, train
from safetensors.torch import load_file
from text import read_rows
from torchvision.utils import save_image


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
    )


def gradients(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring pixels, across and down."""
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]


def pixel_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return the L1 distance of images plus that of their gradients."""
    loss = F.l1_loss(decoded, images)
    for ours, theirs in zip(gradients(decoded), gradients(images), strict=True):
        loss = loss + F.l1_loss(ours, theirs)
    return loss


class AutoencoderLoss(torch.nn.Module):
    """L1 on pixels and on their gradients (edges are what one sees in an emoji), and the KL term."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.sample(generator)).sample.float()
        return pixel_loss(decoded, images) + self.kl_weight * posterior.kl().mean() / images[0].numel()


def read_split(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images `(N, 3, 64, 64)` uint8 of the training split, and those of the others."""
    images, rows = load_file(data / "images.safetensors")["images"], read_rows(data)
    trained = torch.tensor([row["split"] == "train" for row in rows])
    return images[trained], images[~trained]


@torch.no_grad()
def set_scale(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Set the scaling factor, with which latents have a standard deviation of 1."""
    batches = [as_input(batch).to(vae.device) for batch in images[:2048].split(64)]
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in batches])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))


@torch.no_grad()
def save(vae: AutoencoderKL, held_out: torch.Tensor, output: Path) -> None:
    """Write the VAE, print its held-out error, and draw images beside their copies."""
    originals = as_input(held_out[:256])
    copies = torch.cat([vae(batch.to(vae.device)).sample.clamp(-1, 1).cpu() for batch in originals.split(64)])
    error = F.mse_loss(copies / 2, originals / 2)
    print(f"held-out PSNR {-10 * error.log10().item():.2f} dB, scaling factor {vae.config.scaling_factor}")
    vae.save_pretrained(output)
    sheet = torch.stack([originals[:64], copies[:64]], dim=1).flatten(0, 1)
    save_image(sheet / 2 + 0.5, output / "reconstructions.png", nrow=16)


def as_input(images: torch.Tensor) -> torch.Tensor:
    """Bytes to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def loss_on(
    images: torch.Tensor, vae: AutoencoderKL, batch_size: int
) -> Callable[[torch.nn.Module, torch.Generator, slice], torch.Tensor]:
    """Return the function for `train` that draws a batch of the images and computes a module's loss on it."""

    def loss_of_batch(module: torch.nn.Module, generator: torch.Generator, mine: slice) -> torch.Tensor:
        chosen = torch.randint(len(images), (batch_size,), generator=generator)[mine]
        return module(as_input(images[chosen]).to(vae.device), generator)

    return loss_of_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--kl-weight", type=float, default=1e-3)
    add_training_options(parser, max_steps=6000, batch_size=16, learning_rate=1e-3)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = build_vae()
    images, held_out = read_split(args.data)

    def save_with_scale() -> None:
        set_scale(vae, images)
        save(vae, held_out, args.output)

    train(AutoencoderLoss(vae, args.kl_weight), loss_on(images, vae, args.batch_size), save_with_scale, args)


if __name__ == "__main__":
    main()
