"""Tiny inputs of the commands beside the pipelines of `tests.tiny`: pictures, judges, weights, a refiner."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection

from tests.tiny import make_text_config, make_tokenizer, make_unet, make_vae

CAPTIONS = {"a red apple": "train", "the sea": "train", "a cat": "train", "two dogs": "caption"}
SIZE = 32  # pixels of the tiny pipeline's pictures
PER_CAPTION = 6


def write_pictures(folder: Path) -> None:
    """Write an imagefolder: noisy pictures of each caption, half of them in another style, one split held out."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    lines = []
    for number, (caption, split) in enumerate(CAPTIONS.items()):
        color = draw.integers(0, 200, 3)
        for i in range(PER_CAPTION):
            pixels = (color + draw.integers(0, 56, (SIZE, SIZE + 8, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}-{i}.png")
            style = "pencil" if i % 2 else "oil"
            lines.append({"file_name": f"{number}-{i}.png", "text": caption, "split": split, "style": style})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_sentence_encoder(folder: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for text in CAPTIONS for w in text.split()})]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)


def write_backbone(path: Path) -> None:
    """Write random weights of the backbone of LPIPS under torchvision's names."""
    from torchvision.models import alexnet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = alexnet(weights=None).features.state_dict(prefix="features.")
    save_file(weights, path)


def make_refiner() -> StableDiffusionXLImg2ImgPipeline:
    """Build the second text encoder alone and a U-Net told size, crop and aesthetic score: five numbers, not six."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        added: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        return StableDiffusionXLImg2ImgPipeline(
            vae=make_vae(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=CLIPTextModelWithProjection(make_text_config()).eval(),
            tokenizer_2=make_tokenizer(),
            unet=make_unet(projection_class_embeddings_input_dim=16 + 5 * 8, **added),
            scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            requires_aesthetics_score=True,
            add_watermarker=False,
        )


def settings(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's config without the entries that diffusers adds, whose order varies."""
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
