"""Tiny inputs of the commands, created without the package, so that they do not depend on a version."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torchvision.models import mobilenet_v2
from transformers.utils.logging import disable_progress_bar

from tests.tiny import make_tiny_controlnet, make_tiny_pipeline, make_unet
from tests.tiny_inputs import CAPTIONS, make_refiner, write_backbone, write_pictures, write_sentence_encoder

MODELS: dict[str, Any] = {
    "teacher": "diffusion",
    "v-teacher": "v_prediction",
    "xl": "xl",
    "sd3": "sd3",
    "flux": "flux",
}


def make_inputs(folder: Path) -> None:
    """Write all inputs into a new folder."""
    disable_progress_bar()
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    for name, kind in MODELS.items():
        make_tiny_pipeline(kind).save_pretrained(folder / name)
    wide = make_tiny_pipeline("v_prediction")
    wide.register_modules(unet=make_unet(block_out_channels=(48, 64)))  # what --plain-unet needs
    wide.save_pretrained(folder / "v-teacher")
    make_refiner().save_pretrained(folder / "refiner")
    make_tiny_controlnet(make_tiny_pipeline("diffusion").unet).save_pretrained(folder / "controlnet")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in CAPTIONS))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in CAPTIONS))
    write_pictures(folder / "pictures")
    write_backbone(folder / "alexnet.safetensors")
    write_sentence_encoder(folder / "sentences")
    save_file(mobilenet_v2(weights=None).state_dict(), folder / "mobilenet.safetensors")
    (folder / "alignment").mkdir()
    sizes = {"image": (4, 1280), "text": (4, 8)}  # into 4 dimensions, from MobileNetV2's and the sentence encoder's
    judge = {f"{name}.weight": torch.randn(*size) for name, size in sizes.items()}
    judge |= {f"{name}.bias": torch.zeros(4) for name in sizes} | {"log_scale": torch.tensor(2.0)}
    save_file(judge, folder / "alignment" / "alignment.safetensors")
    settings = {"image_size": 32, "unseen_style": "pencil"}
    (folder / "alignment" / "alignment.json").write_text(json.dumps(settings))
