"""Tiny pipelines of the real classes with random weights, built in a moment and without network."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 77
MERGES = ["t h", "th e</w>", "r e", "re d</w>"]


@cache
def vocabulary() -> dict[str, int]:
    """Give the token ids: every byte inside a word, every byte at its end, the merges, start and end of text."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in MERGES)]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


@cache
def make_tokenizer() -> CLIPTokenizer:
    """Build a byte-level CLIPTokenizer from files, the one way that transformers 4 and 5 share."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary()))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def make_text_encoder() -> CLIPTextModel:
    tokens = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokens["<|startoftext|>"],
        eos_token_id=tokens["<|endoftext|>"],
        pad_token_id=tokens["<|endoftext|>"],
    )
    return CLIPTextModel(config).eval()


def make_unet(in_channels: int = 4) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    return unet.eval()


def make_vae() -> AutoencoderKL:
    """Build a VAE with 4 latent channels, 4 times smaller than its pictures: 8x8 latents for 32x32 pixels."""
    blocks: dict[str, Any] = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    vae = AutoencoderKL(**blocks, latent_channels=4, layers_per_block=1, norm_num_groups=4, sample_size=32)
    return vae.eval()


def make_components(seed: int = 0) -> dict[str, Any]:
    """Build every component but the scheduler; equal seeds give equal weights and leave the global RNG alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = {"unet": make_unet(), "vae": make_vae(), "text_encoder": make_text_encoder()}
    return {
        **models,
        "tokenizer": make_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def make_tiny_pipeline(kind: Literal["flow", "diffusion"] = "flow", seed: int = 0) -> StableDiffusionPipeline:
    """Build a text-to-image pipeline of 32x32 pictures, 4x8x8 latents; `diffusion` predicts epsilon as SD 1.5 does."""
    components = make_components(seed)
    if kind == "flow":
        from rectified_diffusers.pipelines import RectifiedFlowPipeline
        from rectified_diffusers.schedulers import RectifiedFlowEulerScheduler

        components["scheduler"] = RectifiedFlowEulerScheduler()
        pipeline = RectifiedFlowPipeline(**components)
    elif kind == "diffusion":
        components["scheduler"] = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        )
        pipeline = StableDiffusionPipeline(**components)
    else:
        raise ValueError(f"kind must be 'flow' or 'diffusion', got {kind!r}.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
