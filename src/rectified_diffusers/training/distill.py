"""Distillation: one step from noise to data, on pairs that a rectified flow made."""

import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from rectified_diffusers.data.triplets import TripletDataset, Triplets
from rectified_diffusers.flow.loss import endpoint_loss, perceptual_loss
from rectified_diffusers.flow.time_density import FixedTime
from rectified_diffusers.training.config import DistillConfig
from rectified_diffusers.training.trainer import Trainer


class DistillTrainer(Trainer[DistillConfig]):
    """Fit data_hat = noise + v(noise, t = 0) to the data of a 2-Rectified Flow: InstaFlow's last stage.

    The paper (arXiv:2309.06380) trains with `loss="l2"` first and then, from the result, with `loss="lpips"`.
    """

    network: nn.Module
    time_density = FixedTime(0.0)
    validation_steps = (1,)

    def __init__(self, pipeline: StableDiffusionPipeline, dataset: TripletDataset, config: DistillConfig) -> None:
        super().__init__(pipeline, dataset, config)
        if config.loss == "lpips":
            self.network = load_lpips(config.lpips_network, config.lpips_weights).to(self.device)

    def compute_loss(self, batch: Triplets, t: Tensor) -> Tensor:
        predicted_data = batch.noise + self.predict_velocity(batch.noise, t, batch.prompts)
        if self.config.loss != "lpips":
            return endpoint_loss(predicted_data, batch.data, self.config.loss)
        with torch.no_grad():
            images = self.decode(batch.data)
        return perceptual_loss(self.decode(predicted_data), images, self.network)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode VAE-scaled latents to pictures `(B, 3, H, W)` in about [-1, 1], float32, with their gradient."""
        vae = self.pipeline.vae
        unscaled = latents / vae.config["scaling_factor"]
        return vae.decode(unscaled.to(vae.dtype), return_dict=False)[0].float()


def load_lpips(network: str, weights: Path | None) -> nn.Module:
    """Build LPIPS (arXiv:1801.03924) on AlexNet or VGG-16, frozen.

    Args:
        weights: safetensors file with the backbone's `features.*` as torchvision names them; None downloads them.
    """
    try:
        import lpips
    except ImportError as error:
        raise ImportError(
            f'loss="lpips" needs the package lpips: pip install "rectified_diffusers[lpips]" ({error}).'
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")  # lpips spells an argument as torchvision used to
        metric = lpips.LPIPS(net=network, pnet_rand=weights is not None, verbose=False)
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
