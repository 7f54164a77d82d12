"""DMD2's discriminator (arXiv:2405.14867): a small head on the middle of a U-Net that looks at noisy data anyway."""

from typing import Any

import torch
from torch import Tensor, nn


class Discriminator(nn.Module):
    """Tell real noisy data from a student's by what the middle block of a U-Net makes of it: above 0 is real.

    It becomes a part of the U-Net, `unet.discriminator`, is trained along with it, and is asked whenever the U-Net is:
    `logits` `(B,)`, float32, are those of the last forward pass. As the U-Net knows time and prompt, so does the head.
    It takes pictures of any size.

    Args:
        unet: any U-Net with a `mid_block`, as those of diffusers have it.
        seed: of its first weights; equal seeds begin equally.
    """

    logits: Tensor

    def __init__(self, unet: Any, seed: int) -> None:
        super().__init__()
        if getattr(unet, "mid_block", None) is None:
            raise ValueError(
                f"The discriminator sits on the middle block of a U-Net, which {type(unet).__name__} does not have. "
                "Train without real triplets."
            )
        channels, groups = unet.config["block_out_channels"][-1], unet.config["norm_num_groups"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, channels, 3, stride=2, padding=1),
                nn.GroupNorm(groups, channels),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(channels, 1),
            )
        self.to(next(unet.parameters()).device)
        unet.mid_block.register_forward_hook(lambda module, inputs, features: self(features))
        unet.discriminator = self

    def forward(self, features: Tensor) -> None:
        self.logits = self.layers(features)[:, 0].float()
