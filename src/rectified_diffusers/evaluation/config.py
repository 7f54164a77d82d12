"""Options of an evaluation. Does not import torch, so that `--help` is fast."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rectified_diffusers.options import check_options, option

_AT_LEAST_ONE = ("straightness_bins", "batch_size", "feature_size")
_AT_LEAST_ZERO = ("diversity_prompts", "straightness_prompts")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Options of `evaluate`.

    Example:
        ```python
        pictures, config = read_pictures("pictures", size=512), EvaluationConfig(num_pictures=500, seeds=(0, 1))
        evaluation = evaluate(pipeline, pictures, "metrics-500", config, name="flow")
        ```
    """

    steps: tuple[int, ...] = option((1,), "Numbers of sampling steps, each a row of the table.")
    guidance_scale: float = option(1.0, "Guidance scale; 1 is no guidance, as one-step models expect.")
    seeds: tuple[int, ...] = option(
        (0, 1, 2), "Seeds of captions, real images and noise; confidence intervals are over the seeds."
    )
    num_pictures: int = option(1000, "Images per seed for seen captions, compared with as many real images.")
    num_held_out: int | None = option(
        None, "Images per seed for held-out captions; none uses as many as there are pairs of real images."
    )
    seen_split: str = option("train", "Split of the captions that the models were trained on.")
    held_out_split: str = option(
        "caption", "Split of the captions held out from training; may be absent from the data."
    )
    features: Literal["mobilenet_v2", "inception_v3"] = option(
        "mobilenet_v2", "Features of the Frechet and kernel distances; with inception_v3 these are FID and KID."
    )
    feature_size: int = option(224, "Size in pixels of the images for MobileNetV2; Inception-v3 always uses 299.")
    mobilenet_weights: Path | None = option(
        None, "Safetensors file in the layout of torchvision's mobilenet_v2; downloaded by torchvision if not set."
    )
    inception_weights: Path | None = option(
        None, "Safetensors file in the layout of torch-fidelity's Inception-v3; downloaded by it if not set."
    )
    alignment: Path | None = option(
        None, "Folder of the alignment scorer that examples/emoji/alignment.py trained; without it, no R-precision."
    )
    sentence_encoder: str = option(
        "sentence-transformers/all-MiniLM-L6-v2",
        "Folder or Hub id of the text encoder that the alignment scorer was trained with.",
    )
    clip_model: str | None = option(None, "open_clip model of the CLIP score, such as ViT-g-14; not set: no score.")
    clip_pretrained: str = option("laion2b_s12b_b42k", "Weights of the CLIP model: a tag of open_clip, or a file.")
    diversity_prompts: int = option(32, "Captions for which diversity is measured; 0 turns it off.")
    diversity_pictures: int = option(4, "Images per caption for diversity.")
    straightness_prompts: int = option(32, "Paths per seed for S(Z), with more than one step; 0 turns it off.")
    straightness_steps: int = option(100, "Euler steps of S(Z), a multiple of straightness_bins.")
    straightness_bins: int = option(10, "Number of bins of t for S(Z).")
    batch_size: int = option(16, "Images generated at once; their noise does not depend on it.")

    def __post_init__(self) -> None:
        check_options(self)
        for name in _AT_LEAST_ONE:
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in _AT_LEAST_ZERO:
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("steps", "seeds"):
            values, low = getattr(self, name), 1 if name == "steps" else 0
            sound = values and len(set(values)) == len(values) and min(values) >= low
            _require(self, name, bool(sound), f"one or more different numbers of at least {low}")
        _require(self, "num_pictures", self.num_pictures >= 2, "at least 2")
        _require(self, "num_held_out", self.num_held_out is None or self.num_held_out >= 2, "at least 2 or none")
        _require(self, "diversity_pictures", self.diversity_pictures >= 2, "at least 2")
        finite = math.isfinite(self.guidance_scale) and self.guidance_scale >= 0
        _require(self, "guidance_scale", finite, "a finite number of at least 0")
        multiple = self.straightness_steps >= 2 and self.straightness_steps % self.straightness_bins == 0
        _require(self, "straightness_steps", multiple, f"at least 2 and a multiple of {self.straightness_bins} bins")


def _require(config: EvaluationConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {getattr(config, name)!r}.")
