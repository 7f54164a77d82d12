"""Pipelines for the speed benchmarks: Stable Diffusion 1.5, InstaFlow-1.7B and SDXL shapes with random weights.

Speed does not depend on the weights, so nothing is downloaded; the tokenizer is also built here. Models are allocated
on their device without the initialization of their classes, which takes most of a minute on a CPU.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rectified_diffusers import RectifiedFlowPipeline, RectifiedFlowXLPipeline, StackedUNet

MODELS = ("sd15", "stacked", "sdxl")
MAX_TOKENS = 77
SD_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
XL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
TEXT_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}
TEXT_G: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
# Narrow models that run quickly on a CPU, to test the scripts.
SMALL_UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}
SMALL_XL_UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 32, 32),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
SMALL_TEXT: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "projection_dim": 32,
}


def vocabulary() -> dict[str, int]:
    """Return the token ids: every byte inside a word, every byte at its end, start and end of text."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


def make_tokenizer() -> CLIPTokenizer:
    """Build a CLIPTokenizer of single bytes. Its words do not matter for speed; the 77 tokens do."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def make(cls: Any, dtype: torch.dtype, device: str, *args: Any, **config: Any) -> Any:
    """Build a model with random weights of the usual scale, without its slow initialization."""
    with torch.device("meta"):
        model = cls(*args, **config)
    model = model.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.01)
            else:
                parameter.uniform_(-1, 1).mul_(parameter[0].numel() ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return model


def unet_of(model: str, small: bool) -> tuple[Any, dict[str, Any]]:
    """Return class and config of a model's U-Net."""
    if model == "sdxl":
        return UNet2DConditionModel, XL_UNET | (SMALL_XL_UNET if small else {})
    return (StackedUNet if model == "stacked" else UNet2DConditionModel), SD_UNET | (SMALL_UNET if small else {})


def vae_config(small: bool) -> dict[str, Any]:
    widths = (32, 32, 32, 32) if small else (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return {"block_out_channels": widths, "layers_per_block": 2, "latent_channels": 4, "sample_size": 512, **blocks}


def text_config(config: dict[str, Any], small: bool) -> CLIPTextConfig:
    ends = {"bos_token_id": len(vocabulary()) - 2, "eos_token_id": len(vocabulary()) - 1}
    return CLIPTextConfig(**(SMALL_TEXT if small else config), **ends, pad_token_id=ends["eos_token_id"])


def make_pipeline(model: str, dtype: torch.dtype, device: str, *, diffusion: bool = False, small: bool = False) -> Any:
    """Build a text-to-image pipeline of random weights on a device.

    Args:
        model: one of `MODELS`.
        diffusion: Stable Diffusion with DPM-Solver++; otherwise our one-step pipeline.
        small: narrow models, to try a script.
    """
    on = (dtype, device)
    unet, config = unet_of(model, small)
    tokenizer = make_tokenizer()
    components: dict[str, Any] = {
        "unet": make(unet, *on, **config),
        "vae": make(AutoencoderKL, *on, **vae_config(small)),
        "text_encoder": make(CLIPTextModel, *on, text_config(TEXT_L, small)),
        "tokenizer": tokenizer,
        "scheduler": None,
    }
    if diffusion:
        components["scheduler"] = DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        )
    if model == "sdxl":
        second = make(CLIPTextModelWithProjection, *on, text_config(TEXT_G, small))
        components |= {"text_encoder_2": second, "tokenizer_2": tokenizer}
        cls = StableDiffusionXLPipeline if diffusion else RectifiedFlowXLPipeline
        pipeline = cls(**components, add_watermarker=False)
    else:
        cls = StableDiffusionPipeline if diffusion else RectifiedFlowPipeline
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = cls(**components, **unused)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
