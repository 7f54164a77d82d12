"""Frechet distance between two sets of images: features, their mean and covariance, the distance.

The features are any callable on uint8 images; Inception-v3 makes the distance the FID (arXiv:1706.08500), the
MobileNetV2 here makes it one that a CPU can afford. Figures of different features or sample sizes do not compare.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

Features = Callable[[Tensor], Tensor]
"""Images `(B, 3, H, W)` uint8 to features `(B, D)`."""


class FeatureStatistics:
    """Mean and covariance of features that come batch by batch, accumulated in float64.

    Batches are merged as in Chan, Golub and LeVeque (1983): sums of squares about the running mean, so that a large
    mean costs no digits.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Take in features `(B, D)` of any device and floating dtype."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be (B, {len(self.mean)}), got {tuple(features.shape)}.")
        if not torch.isfinite(features).all():
            raise ValueError("features must be finite, got NaN or infinity: look at the images and the extractor.")
        if len(features) == 0:
            return
        features = features.detach().to("cpu", torch.float64)
        total = self.count + len(features)
        batch_mean = features.mean(dim=0)
        centred = features - batch_mean
        shift = batch_mean - self.mean
        self._scatter += centred.T @ centred + shift.outer(shift) * (self.count * len(features) / total)
        self.mean = self.mean + shift * (len(features) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance `(D, D)`, float64."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}.")
        return self._scatter / (self.count - 1)


def statistics_of(features: Iterable[Tensor]) -> FeatureStatistics:
    """Accumulate batches of features `(B, D)`."""
    statistics = None
    for batch in features:
        statistics = statistics or FeatureStatistics(batch.shape[-1])
        statistics.update(batch)
    if statistics is None:
        raise ValueError("statistics need at least one batch of features, got none.")
    return statistics


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians with these means and covariances.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2), Eq. (6) of arXiv:1706.08500. The last trace is the sum of the
    singular values of C1^(1/2) C2^(1/2): it needs no root of a product that is not symmetric, and fewer images than
    dimensions (a singular covariance) cost no digits. Never negative: what rounding leaves below 0 is returned as 0.
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(
            f"both sets need features of one size, got {len(first.mean)} and {len(second.mean)}: "
            "use the same extractor for both."
        )
    cross = torch.linalg.svdvals(_square_root(first.covariance) @ _square_root(second.covariance)).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * cross
    return max(0.0, distance.item())


def _square_root(covariance: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix; eigenvalues below 0 are rounding and count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


class MobileNetV2Features(nn.Module):
    """The 1,280 pooled features of an ImageNet MobileNetV2, in ImageNet preprocessing.

    Args:
        weights: safetensors file in the layout of torchvision's `mobilenet_v2`; the classifier in it is not used.
            None: torchvision downloads its own, IMAGENET1K_V1.
        size: pixels to which images are resized, bilinear with antialiasing. 224 is what the network was trained on.
    """

    dimensions = 1280

    def __init__(self, weights: Path | None, size: int = 224) -> None:
        super().__init__()
        try:
            from torchvision.models import MobileNet_V2_Weights, mobilenet_v2
        except ImportError as error:
            raise ImportError("MobileNetV2Features needs torchvision: pip install torchvision") from error
        from safetensors.torch import load_file

        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"no MobileNetV2 weights at {weights}: expected a safetensors file.")
        try:
            network = mobilenet_v2(weights=MobileNet_V2_Weights.IMAGENET1K_V1 if weights is None else None)
        except URLError as error:
            raise OSError(
                f"The weights of torchvision's mobilenet_v2 cannot be downloaded ({error}). Where there is a network, "
                "safetensors.torch.save_file(torchvision.models.mobilenet_v2(weights='IMAGENET1K_V1').state_dict(), "
                "'mobilenet.safetensors'); then give mobilenet_weights (--mobilenet-weights mobilenet.safetensors)."
            ) from error
        if weights is not None:
            network.load_state_dict(load_file(weights))
        self.size = size
        self.layers = network.features.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, 1280)` float32 of images `(B, 3, H, W)` uint8, on the CPU or wherever the module is."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}.")
        pixels = images.to(self.get_buffer("mean").device).float()
        shape = (self.size, self.size)
        pixels = nn.functional.interpolate(pixels, shape, mode="bilinear", antialias=True, align_corners=False)
        pixels = (pixels - self.get_buffer("mean")) / self.get_buffer("std")
        return self.layers(pixels.to(memory_format=torch.channels_last)).mean(dim=(2, 3))
