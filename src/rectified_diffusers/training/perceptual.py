"""LPIPS between the pictures that latents decode to, as a loss."""

import warnings
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rectified_diffusers.flow.loss import perceptual_loss


class DecodedDistance:
    """LPIPS of decoded latents; a gradient goes through the frozen VAE to the first of the two.

    Args:
        vae: whose latents they are, an AutoencoderKL or one of its configuration.
        network: from two batches of pictures `(B, 3, H, W)` in [-1, 1] to B distances, see `load_lpips`.
    """

    def __init__(self, vae: Any, network: nn.Module) -> None:
        self.vae, self.network = vae, network

    def decode(self, latents: Tensor) -> Tensor:
        """Decode VAE-scaled latents to pictures `(B, 3, H, W)` in about [-1, 1], float32, with their gradient."""
        config = self.vae.config
        unscaled = latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
        return self.vae.decode(unscaled.to(self.vae.dtype), return_dict=False)[0].float()

    def __call__(self, predicted_data: Tensor, data: Tensor) -> Tensor:
        """Compare latents `(B, C, H, W)` with the right ones, `(B,)`."""
        with torch.no_grad():
            images = self.decode(data)
        return perceptual_loss(self.decode(predicted_data), images, self.network)


def load_lpips(network: str, weights: Path | None) -> nn.Module:
    """Build LPIPS (arXiv:1801.03924) on AlexNet or VGG-16, frozen.

    Args:
        weights: safetensors file with the backbone's `features.*` as torchvision names them; None downloads them.
    """
    try:
        import lpips
    except ImportError as error:
        raise ImportError(
            'The losses "lpips" and "lpips_huber" need the package lpips: '
            f'pip install "rectified_diffusers[lpips]" ({error}).'
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")  # lpips spells an argument as torchvision used to
        try:
            metric = lpips.LPIPS(net=network, pnet_rand=weights is not None, verbose=False)
        except URLError as error:
            model = {"alex": "alexnet", "vgg": "vgg16"}[network]
            raise OSError(
                f"The weights of torchvision's {model} cannot be downloaded ({error}). Where there is a network, "
                f"safetensors.torch.save_file(torchvision.models.{model}(weights='DEFAULT').state_dict(), "
                f"'{model}.safetensors'); then give lpips_weights (--lpips-weights {model}.safetensors)."
            ) from error
    if weights is not None:
        _load_backbone(metric.net, Path(weights))
    return metric.requires_grad_(False).eval()


def _load_backbone(backbone: nn.Module, path: Path) -> None:
    """Load `features.*` into lpips' slices, whose layers keep their numbers: slice2.3.weight is features.3.weight."""
    weights = load_file(path)
    names = {name: f"features.{name.split('.', 1)[1]}" for name in backbone.state_dict()}
    missing = sorted(set(names.values()) - weights.keys())
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(names)} weights of the lpips backbone, first: {missing[0]!r}. "
            "Give the state dict of torchvision's alexnet or vgg16, according to lpips_network."
        )
    backbone.load_state_dict({name: weights[source] for name, source in names.items()})
