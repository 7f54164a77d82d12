"""Measure whether an image shows its caption: two linear layers into a joint space, and retrieval of the caption.

A substitute for the CLIP score where no CLIP model is available: frozen image and text features, and one linear layer
for each, which examples/emoji/alignment.py trains on real images. Report the metric as "alignment (R-precision)",
never as "CLIP score".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rectified_diffusers.files import write_atomically
from rectified_diffusers.loading.errors import remedies


class AlignmentModel(nn.Module):
    """Map image features and text features to unit vectors in a joint space, with one linear layer for each.

    Args:
        image_dimensions: size of the image features, 1,280 for MobileNetV2.
        text_dimensions: size of the text features, 384 for MiniLM.
        joint_dimensions: size of the joint space.
    """

    def __init__(self, image_dimensions: int, text_dimensions: int, joint_dimensions: int = 256) -> None:
        super().__init__()
        self.image = nn.Linear(image_dimensions, joint_dimensions)
        self.text = nn.Linear(text_dimensions, joint_dimensions)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's initial value, arXiv:2103.00020

    def embed_images(self, features: Tensor) -> Tensor:
        """Return unit vectors `(B, J)` of image features `(B, D)`."""
        return F.normalize(self.image(features.float()), dim=-1)

    def embed_texts(self, features: Tensor) -> Tensor:
        """Return unit vectors `(B, J)` of text features `(B, D)`."""
        return F.normalize(self.text(features.float()), dim=-1)

    def save(self, path: Path) -> None:
        """Write the weights as safetensors. `load` infers the sizes from them."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        write_atomically(Path(path), lambda partial: save_file(tensors, partial))

    @classmethod
    def load(cls, path: Path) -> "AlignmentModel":
        """Load a model that `save` wrote."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"No alignment model at {path}. Train one with examples/emoji/alignment.py.")
        weights = load_file(path)
        missing = {"image.weight", "text.weight"} - weights.keys()
        if missing:
            raise ValueError(f"{path} is not an alignment model: it lacks {sorted(missing)}.")
        (joint, images), (_, texts) = weights["image.weight"].shape, weights["text.weight"].shape
        model = cls(images, texts, joint)
        model.load_state_dict(weights)
        return model.eval()


@dataclass(frozen=True)
class Retrieval:
    """How often the true caption ranks first: among all texts, and among randomly sampled candidates.

    `wins` has the probability of the latter for each image `(N,)`; its mean is `r_precision`.
    """

    recall_at_1: float
    r_precision: float
    candidates: int
    texts: int
    wins: Tensor


def retrieval(image_embeds: Tensor, text_embeds: Tensor, captions: Tensor, candidates: int = 100) -> Retrieval:
    """Compute how often an image is closest to its own caption.

    R-precision (arXiv:1711.10485) ranks the true text among c = `candidates` texts: itself and random others. It is
    computed exactly, without sampling. If k of the M - 1 other texts beat the true text of an image, the true text
    wins against c - 1 random ones with probability C(M - 1 - k, c - 1) / C(M - 1, c - 1). The mean of these
    probabilities is the value that sampling would estimate. A tie counts as beaten.

    Args:
        image_embeds: unit vectors `(N, J)`.
        text_embeds: unit vectors of the distinct captions `(M, J)`, M >= candidates.
        captions: for each image, the row of `text_embeds` that it was generated for `(N,)`, integers.
    """
    if not 2 <= candidates <= len(text_embeds):
        raise ValueError(f"candidates must be from 2 to the {len(text_embeds)} texts, got {candidates}.")
    scores = image_embeds.double() @ text_embeds.double().T
    true = scores.gather(1, captions[:, None])
    beaten_by = (scores >= true).sum(dim=1) - 1  # k; the true text equals itself
    others, drawn = len(text_embeds) - 1, candidates - 1
    spare = (others - drawn - beaten_by).double()  # log C(n - k, c) / C(n, c), by gamma functions
    log_wins = (others - beaten_by + 1.0).double().lgamma() - (spare.clamp(min=0) + 1).lgamma()
    log_all = math.lgamma(others + 1) - math.lgamma(others - drawn + 1)
    wins = torch.where(spare >= 0, (log_wins - log_all).exp(), 0.0).clamp(max=1)
    recall = (beaten_by == 0).double().mean()
    return Retrieval(recall.item(), min(1.0, wins.mean().item()), candidates, len(text_embeds), wins)


class SentenceFeatures:
    """Map sentences to the mean over tokens of a text encoder's last hidden states, e.g. all-MiniLM-L6-v2.

    Args:
        model: folder or Hub id for `transformers.AutoModel.from_pretrained`.
    """

    def __init__(self, model: str | Path, batch_size: int = 64) -> None:
        from transformers import AutoModel, AutoTokenizer

        with remedies(str(model)):
            self.tokenizer = AutoTokenizer.from_pretrained(str(model))
            self.network = AutoModel.from_pretrained(str(model), use_safetensors=True).eval()
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return features `(len(texts), D)` float32."""
        parts = []
        for first in range(0, len(texts), self.batch_size):
            batch = list(texts[first : first + self.batch_size])
            tokens = self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(self.network.device)
            hidden = self.network(**tokens).last_hidden_state  # (B, tokens, D)
            mask = tokens["attention_mask"][..., None]
            parts.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
        return torch.cat(parts)
