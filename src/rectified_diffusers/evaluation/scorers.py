"""Scorer networks for images, loaded on first use and named after everything that their features depend on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.digests import digest_of, hash_file
from rectified_diffusers.evaluation.alignment import AlignmentModel, SentenceFeatures, retrieval
from rectified_diffusers.evaluation.config import EvaluationConfig
from rectified_diffusers.evaluation.features import CLIPScore, InceptionV3Features, MobileNetV2Features, clip_cosines
from rectified_diffusers.evaluation.gallery import Gallery, cached

CANDIDATES = 100


class Scorer:
    """Compute image features with a network that is loaded on first use. Cached features do not load it."""

    def __init__(self, name: str, load: Callable[[], Callable[[Tensor], Tensor]], progress: bool) -> None:
        self.name, self._load, self.progress = name, load, progress

    @cached_property
    def _network(self) -> Callable[[Tensor], Tensor]:
        return self._load()

    def see(self, gallery: Gallery) -> Tensor:
        """Return the features `(N, D)` of a gallery."""
        return gallery.see(self.name, lambda images: self._network(images), self.progress)


def mobilenet_scorer(weights: Path | None, size: int, device: Any, progress: bool) -> Scorer:
    name = f"mobilenet_v2-{size}-{_name_of(weights)}"
    return Scorer(name, lambda: MobileNetV2Features(weights, size).to(device), progress)


def inception_scorer(weights: Path | None, device: Any, progress: bool) -> Scorer:
    return Scorer(f"inception_v3-{_name_of(weights)}", lambda: InceptionV3Features(weights).to(device), progress)


class AlignmentScorer:
    """The scorer trained by examples/emoji/alignment.py: retrieves an image's caption among all captions of the data.

    Attributes:
        unseen_style: the image style that the scorer was not trained on; empty if its folder names none.
    """

    def __init__(self, config: EvaluationConfig, captions: Sequence[str], work: Path, device: Any, bar: bool) -> None:
        folder = Path(config.alignment or "")
        self.model = AlignmentModel.load(folder / "alignment.safetensors")
        card = json.loads((folder / "alignment.json").read_text(encoding="utf-8"))
        self.unseen_style: str = card.get("unseen_style", "")
        self.scorer = mobilenet_scorer(config.mobilenet_weights, card["image_size"], device, bar)
        self.captions = sorted(set(captions))
        self.numbers = {caption: i for i, caption in enumerate(self.captions)}
        self.candidates = min(CANDIDATES, len(self.captions))
        path = work / f"texts-{digest_of([config.sentence_encoder, self.captions])}.safetensors"
        make = lambda: {"features": SentenceFeatures(config.sentence_encoder)(self.captions)}  # noqa: E731
        with torch.no_grad():
            self.texts = self.model.embed_texts(cached(path, make)["features"])
        self.name = f"{self.scorer.name}-{_name_of(folder / 'alignment.safetensors')}"

    @torch.no_grad()
    def wins(self, gallery: Gallery, prompts: Sequence[str]) -> Tensor:
        """Return the probability that an image retrieves its caption `(N,)`; the mean is the R-precision."""
        numbers = torch.tensor([self.numbers[prompt] for prompt in prompts])
        images = self.model.embed_images(self.scorer.see(gallery))
        return retrieval(images, self.texts, numbers, self.candidates).wins


class CLIPScorer:
    """Compute the CLIP score of images and their prompts."""

    def __init__(self, config: EvaluationConfig, device: Any, progress: bool) -> None:
        self.model, self.pretrained, self.device = config.clip_model or "", config.clip_pretrained, device
        weights = self.pretrained if not Path(self.pretrained).is_file() else _name_of(Path(self.pretrained))
        self.name = f"clip-{self.model}-{weights}".replace("/", "-")
        self.scorer = Scorer(self.name, lambda: self._clip.embed_images, progress)

    @cached_property
    def _clip(self) -> CLIPScore:
        return CLIPScore(self.model, self.pretrained, self.device)

    def cosines(self, gallery: Gallery, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image and its prompt `(N,)`; the mean is the CLIP score."""
        return clip_cosines(self.scorer.see(gallery), self._clip.embed_texts(prompts))


class Scorers:
    """All scorers that an evaluation is configured with."""

    def __init__(
        self, config: EvaluationConfig, captions: Sequence[str], work: Path, device: Any, progress: bool
    ) -> None:
        self.main = (
            inception_scorer(config.inception_weights, device, progress)
            if config.features == "inception_v3"
            else mobilenet_scorer(config.mobilenet_weights, config.feature_size, device, progress)
        )
        self.alignment = AlignmentScorer(config, captions, work, device, progress) if config.alignment else None
        self.clip = CLIPScorer(config, device, progress) if config.clip_model else None

    def names(self) -> dict[str, str | None]:
        """Return the names of the scorers that the metrics depend on."""
        return {
            "features": self.main.name,
            "alignment": self.alignment and self.alignment.name,
            "clip": self.clip and self.clip.name,
        }


def _name_of(weights: Path | None) -> str:
    """Return a digest of a weights file, or `published` for None: the weights that a library downloads."""
    if weights is None:
        return "published"
    if not Path(weights).is_file():
        raise FileNotFoundError(f"No weights at {weights}: expected a safetensors file.")
    return hash_file(Path(weights), hashlib.blake2b(digest_size=4)).hexdigest()
