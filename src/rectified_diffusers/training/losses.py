"""Losses of the trainers: flow losses on latents and perceptual losses on decoded images."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rectified_diffusers.evaluation.features import not_downloaded
from rectified_diffusers.flow.interpolation import per_example
from rectified_diffusers.flow.loss import pseudo_huber, velocity_loss
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.training.config import TrainerConfig


class DecodedDistance:
    """LPIPS of decoded latents; the gradient flows through the frozen VAE to the first of the two.

    Args:
        decode: maps latents to images `(B, 3, H, W)` in about [-1, 1], float32, see `Denoiser.decode_pixels`.
        network: maps two batches of images `(B, 3, H, W)` in [-1, 1] to B distances, see `load_lpips`.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], network: nn.Module) -> None:
        self.decode, self.network = decode, network

    def __call__(self, predicted_data: Tensor, data: Tensor) -> Tensor:
        """Return the distances `(B,)` between predicted and target latents `(B, ...)`."""
        with torch.no_grad():
            images = self.decode(data)
        return self.network(self.decode(predicted_data), images).reshape(len(images))


def load_lpips(network: str, weights: Path | None) -> nn.Module:
    """Build LPIPS (arXiv:1801.03924) on AlexNet or VGG-16, with frozen weights.

    Args:
        weights: safetensors file with the backbone's `features.*` by torchvision's names; None downloads them.
    """
    try:
        import lpips
    except ImportError as error:
        raise ImportError(
            'The losses "lpips" and "lpips_huber" need the package lpips: '
            f'pip install "rectified_diffusers[lpips]" ({error}).'
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")  # lpips uses a deprecated argument name
        try:
            metric = lpips.LPIPS(net=network, pnet_rand=weights is not None, verbose=False)
        except URLError as error:
            raise not_downloaded({"alex": "alexnet", "vgg": "vgg16"}[network], "lpips_weights", error) from error
    if weights is not None:
        _load_backbone(metric.net, Path(weights))
    return metric.requires_grad_(False).eval()


def _load_backbone(backbone: nn.Module, path: Path) -> None:
    """Load `features.*` into lpips' slices. Layer numbers stay the same: slice2.3.weight is features.3.weight."""
    weights = load_file(path)
    names = {name: f"features.{name.split('.', 1)[1]}" for name in backbone.state_dict()}
    missing = sorted(set(names.values()) - weights.keys())
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(names)} weights of the lpips backbone, first: {missing[0]!r}. "
            "Give the state dict of torchvision's alexnet or vgg16, according to lpips_network."
        )
    backbone.load_state_dict({name: weights[source] for name, source in names.items()})


TrainingLoss = Literal["l2", "pseudo_huber", "lpips", "lpips_huber"]


@dataclass(frozen=True)
class FlowLoss:
    """Compute the loss of a predicted velocity against the target at x_t, one value per example.

    - l2, pseudo_huber: see `flow.loss.velocity_loss`.
    - lpips: LPIPS between the decoded data_hat = x_t + (1 - t) * velocity of both, as in InstaFlow's last stage.
    - lpips_huber: w * pseudo_huber(velocities) / d + lpips, with d dimensions, from 2-RF++ (arXiv:2405.20320; the
      division is in its authors' code).

    2-RF++ trains on all of [0, 1] with w = t: near the data the images hardly depend on the velocity; near the noise
    they depend on it fully. Losses at a few fixed times, such as t = 0 alone in distillation, use w = 1 instead;
    otherwise lpips_huber would equal lpips at t = 0.
    """

    kind: TrainingLoss
    decoded: DecodedDistance | None = None
    weigh_by_time: bool = False

    @classmethod
    def of(
        cls,
        kind: TrainingLoss,
        config: TrainerConfig,
        denoiser: Denoiser,
        device: torch.device,
        weigh_by_time: bool = False,
    ) -> "FlowLoss":
        """Return the loss, with LPIPS loaded to the device if the loss uses it and the pipeline decodes to images."""
        if kind not in ("lpips", "lpips_huber"):
            return cls(kind)
        decode = denoiser.decode_pixels
        with torch.no_grad():
            images = decode(torch.zeros(1, *denoiser.latent_shape, device=device))
        if images.ndim != 4:
            raise ValueError(
                f"LPIPS compares images (B, 3, H, W), got a decoded shape of {tuple(images.shape)} from "
                f'{type(denoiser.pipeline).__name__}. Set loss="l2" or "pseudo_huber", not {kind!r}.'
            )
        network = load_lpips(config.lpips_network, config.lpips_weights).to(device)
        return cls(kind, DecodedDistance(decode, network), weigh_by_time)

    def __call__(self, predicted: Tensor, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the loss of each example, `(B,)`.

        Args:
            predicted, velocity, x_t: `(B, ...)`.
            t: `(B,)` in [0, 1].
        """
        if self.decoded is None:
            return velocity_loss(predicted, velocity, self.kind)  # pyright: ignore[reportArgumentType]
        remaining = per_example(1 - t, x_t)
        perceptual = self.decoded(x_t + remaining * predicted, x_t + remaining * velocity)
        if self.kind == "lpips":
            return perceptual
        huber = pseudo_huber(predicted - velocity) / x_t[0].numel()
        return (t * huber if self.weigh_by_time else huber) + perceptual
