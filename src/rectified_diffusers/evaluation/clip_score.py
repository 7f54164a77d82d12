"""CLIP score of pictures and their prompts, by open_clip, where its weights can be had."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class CLIPScore:
    """The cosine between CLIP's embedding of a picture and that of its prompt (arXiv:2104.08718, without its factor).

    Figures of different models do not compare; ViT-g-14 with laion2b_s12b_b42k is what the field uses.

    Args:
        model: name of an open_clip model.
        pretrained: tag of its weights, which open_clip downloads, or a file of them; None for random ones.
    """

    def __init__(self, model: str, pretrained: str | None, device: torch.device | str = "cpu") -> None:
        try:
            import open_clip
        except ImportError as error:
            raise ImportError("the CLIP score needs open_clip: pip install open_clip_torch") from error
        try:
            network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained, device=device)
        except RuntimeError as error:  # an unknown model, unknown weights, or a download that failed
            raise ValueError(
                f"open_clip cannot load model {model!r} with weights {pretrained!r}: {error} "
                "open_clip.list_pretrained() lists what there is."
            ) from error
        self.network: Any = network.eval().requires_grad_(False)
        self.preprocess: Any = preprocess
        self.tokenizer: Any = open_clip.get_tokenizer(model)
        self.device = torch.device(device)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors `(B, J)` of images `(B, 3, H, W)` uint8, resized and cropped as the model was trained."""
        from torchvision.transforms.v2.functional import to_pil_image

        pixels = torch.stack([self.preprocess(to_pil_image(image)) for image in images.cpu()])
        return F.normalize(self.network.encode_image(pixels.to(self.device)).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Unit vectors `(len(texts), J)`."""
        parts = []
        for first in range(0, len(texts), batch_size):
            tokens = self.tokenizer(list(texts[first : first + batch_size])).to(self.device)
            parts.append(F.normalize(self.network.encode_text(tokens).float(), dim=-1).cpu())
        return torch.cat(parts)


def clip_score(image_embeds: Tensor, text_embeds: Tensor) -> float:
    """Mean cosine of pairs (picture i, prompt i), unit vectors `(N, J)` each."""
    if image_embeds.shape != text_embeds.shape or image_embeds.ndim != 2 or len(image_embeds) == 0:
        raise ValueError(
            "the CLIP score needs one embedded prompt per picture, "
            f"got {tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}."
        )
    return (image_embeds.double() * text_embeds.double()).sum(dim=1).mean().item()
