"""Feature networks of the metrics: MobileNetV2, Inception-v3 and CLIP."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MobileNetV2Features(nn.Module):
    """Compute the 1,280 pooled features of an ImageNet MobileNetV2, with ImageNet preprocessing.

    Args:
        weights: safetensors file in the layout of torchvision's `mobilenet_v2`; its classifier is not used. If None,
            torchvision downloads its own weights, IMAGENET1K_V1.
        size: side in pixels to which images are resized (bilinear with antialiasing). The network was trained at 224.
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
            raise FileNotFoundError(f"No MobileNetV2 weights at {weights}: expected a safetensors file.")
        try:
            network = mobilenet_v2(weights=MobileNet_V2_Weights.IMAGENET1K_V1 if weights is None else None)
        except URLError as error:
            raise not_downloaded("mobilenet_v2", "mobilenet_weights", error) from error
        if weights is not None:
            network.load_state_dict(load_file(weights))
        self.size = size
        self.layers = network.features.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features `(B, 1280)` float32 of images `(B, 3, H, W)` uint8, which may be on any device."""
        pixels = images.to(self.get_buffer("mean").device).float()
        shape = (self.size, self.size)
        pixels = nn.functional.interpolate(pixels, shape, mode="bilinear", antialias=True, align_corners=False)
        pixels = (pixels - self.get_buffer("mean")) / self.get_buffer("std")
        return self.layers(pixels.to(memory_format=torch.channels_last)).mean(dim=(2, 3))


def not_downloaded(model: str, option: str, error: Exception) -> OSError:
    """Return the error for weights of torchvision that cannot be downloaded."""
    return OSError(
        f"The weights of torchvision's {model} cannot be downloaded ({error}). Where there is a network, "
        f"safetensors.torch.save_file(torchvision.models.{model}(weights='IMAGENET1K_V1').state_dict(), "
        f"'{model}.safetensors'); then give {option} (--{option.replace('_', '-')} {model}.safetensors)."
    )


class InceptionV3Features(nn.Module):
    """Compute the 2,048 pooled features of the Inception-v3 that defines the FID (arXiv:1706.08500).

    The network, its resize to 299 pixels and its preprocessing come from torch-fidelity, which follows the original
    TensorFlow graph.

    Args:
        weights: safetensors file in the layout of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, which
            pytorch-fid also uses. If None, torch-fidelity downloads it.
    """

    dimensions = 2048

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as library
        except ImportError as error:
            raise ImportError("InceptionV3Features needs torch-fidelity: pip install torch-fidelity") from error
        if weights is None:
            try:
                self.network = library.FeatureExtractorInceptionV3("inception-v3", ["2048"])
            except URLError as error:
                raise OSError(
                    f"The weights of Inception-v3 cannot be downloaded ({error}). Where there is a network, fetch "
                    f"{library.URL_INCEPTION_V3} and write safetensors.torch.save_file(torch.load(path, "
                    "weights_only=True), 'inception.safetensors'); then give inception_weights "
                    "(--inception-weights inception.safetensors)."
                ) from error
        else:
            tensors = _read(Path(weights))
            # torch-fidelity unpickles a weights file without restriction. Instead, pass the tensors in place of its
            # download.
            with patch.object(library, "load_state_dict_from_url", lambda *args, **kwargs: tensors):
                self.network = library.FeatureExtractorInceptionV3("inception-v3", ["2048"])
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features `(B, 2048)` float32 of images `(B, 3, H, W)` uint8, which may be on any device."""
        return self.network(images.to(next(self.network.parameters()).device))[0]


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"No Inception-v3 weights at {path}: expected a safetensors file.")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"Inception-v3 weights must be a .safetensors file, got {path}. Convert a .pth file with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'inception.safetensors')."
        )
    tensors = load_file(path)
    if "Mixed_7c.branch_pool.conv.weight" not in tensors:
        raise ValueError(
            f"{path} does not have the layout of torch-fidelity's Inception-v3: it lacks "
            f"'Mixed_7c.branch_pool.conv.weight', it has {sorted(tensors)[:3]}."
        )
    return tensors


class CLIPScore:
    """Compute the CLIP embeddings for the CLIP score: the cosine of image and prompt embeddings.

    The score follows arXiv:2104.08718 without its factor. Scores of different CLIP models are not comparable;
    ViT-g-14 with laion2b_s12b_b42k is what the field uses.

    Args:
        model: name of an open_clip model.
        pretrained: tag of weights that open_clip downloads, or a weights file. None: random weights.
    """

    def __init__(self, model: str, pretrained: str | None, device: torch.device | str = "cpu") -> None:
        try:
            import open_clip
        except ImportError as error:
            raise ImportError("The CLIP score needs open_clip: pip install open_clip_torch") from error
        try:
            network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained, device=device)
        except RuntimeError as error:  # an unknown model, unknown weights, or a download that failed
            raise ValueError(
                f"open_clip cannot load model {model!r} with weights {pretrained!r}: {error} "
                "open_clip.list_pretrained() lists the available ones."
            ) from error
        self.network: Any = network.eval().requires_grad_(False)
        self.preprocess: Any = preprocess
        self.tokenizer: Any = open_clip.get_tokenizer(model)
        self.device = torch.device(device)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit vectors `(B, J)` of images `(B, 3, H, W)` uint8, resized and cropped as in CLIP's training."""
        from torchvision.transforms.v2.functional import to_pil_image

        pixels = torch.stack([self.preprocess(to_pil_image(image)) for image in images.cpu()])
        return F.normalize(self.network.encode_image(pixels.to(self.device)).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Return unit vectors `(len(texts), J)`."""
        parts = []
        for first in range(0, len(texts), batch_size):
            tokens = self.tokenizer(list(texts[first : first + batch_size])).to(self.device)
            parts.append(F.normalize(self.network.encode_text(tokens).float(), dim=-1).cpu())
        return torch.cat(parts)


def clip_cosines(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Return the cosine of each pair (image i, prompt i) `(N,)`, given unit vectors `(N, J)` each."""
    return (image_embeds.double() * text_embeds.double()).sum(dim=1)
