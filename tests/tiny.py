"""Tiny pipelines of the real classes with random weights, built in a moment and without network."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

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


def make_text_config() -> CLIPTextConfig:
    tokens = vocabulary()
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokens["<|startoftext|>"],
        eos_token_id=tokens["<|endoftext|>"],
        pad_token_id=tokens["<|endoftext|>"],
        projection_dim=16,
    )


def make_text_encoder() -> CLIPTextModel:
    return CLIPTextModel(make_text_config()).eval()


def make_unet(in_channels: int = 4, **changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": in_channels,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**{**settings, **changes}).eval()


def make_xl_unet() -> UNet2DConditionModel:
    """Build a U-Net of SDXL's inputs: two text encoders side by side, pooled text and six numbers with the time."""
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return make_unet(cross_attention_dim=32, projection_class_embeddings_input_dim=16 + 6 * 8, **added)


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


def make_xl_components(seed: int = 0) -> dict[str, Any]:
    """Build every component of a Stable Diffusion XL pipeline but the scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = {"unet": make_xl_unet(), "vae": make_vae(), "text_encoder": make_text_encoder()}
        text_encoder_2 = CLIPTextModelWithProjection(make_text_config()).eval()
    tokenizers = {"tokenizer": make_tokenizer(), "tokenizer_2": make_tokenizer()}
    return {**models, **tokenizers, "text_encoder_2": text_encoder_2}


def make_tiny_controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """Build a ControlNet for a tiny U-Net and 32x32 pictures; its zero convolutions are random, so that it steers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8))
        with torch.no_grad():
            for weight in (parameter for parameter in controlnet.parameters() if not parameter.any()):
                weight.normal_(std=0.2)
    return controlnet.eval()


def make_tiny_adapter(seed: int = 0) -> T2IAdapter:
    """Build a T2I-Adapter for `make_adapter_unet` and 32x32 pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=4).eval()


def make_adapter_unet(seed: int = 0) -> UNet2DConditionModel:
    """Build a U-Net in Stable Diffusion's order, attention first: a T2I-Adapter relies on it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )


def make_vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=16,
    )


def make_image_encoder(seed: int = 0) -> CLIPVisionModelWithProjection:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPVisionModelWithProjection(make_vision_config()).eval()


def make_feature_extractor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def make_safety_checker(*, flags: bool, seed: int = 0) -> StableDiffusionSafetyChecker:
    """Build a safety checker that flags every picture, or none."""
    text, vision = make_text_config(), make_vision_config()
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        checker = StableDiffusionSafetyChecker(config)
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        thresholds.data.fill_(-2 if flags else 2)  # of cosines
    return checker.eval()


def make_ip_adapter_weights(unet: UNet2DConditionModel, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Build an IP-Adapter of 4 image tokens, in the two-part layout of its published files."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width = unet.config["cross_attention_dim"]
    layers: dict[str, Tensor] = {}
    attention = [(name, module) for name, module in unet.attn_processors.items() if name.endswith("attn2.processor")]
    modules = dict(unet.named_modules())
    for i, (name, _) in enumerate(attention):
        inner = modules[name.removesuffix(".processor")].to_k.out_features
        layers[f"{2 * i + 1}.to_k_ip.weight"] = random(inner, width)
        layers[f"{2 * i + 1}.to_v_ip.weight"] = random(inner, width)
    projection = {
        "proj.weight": random(4 * width, 16),
        "proj.bias": random(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def sample(pipeline: Any, seed: int = 0, prompt: Any = "a red apple", **kwargs: Any) -> Any:
    """Give the latents of a run of two steps, or what `kwargs` ask for; the noise follows from the seed."""
    kwargs = {"num_inference_steps": 2, "output_type": "latent", **kwargs}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt, generator=torch.manual_seed(seed), **kwargs).images


def make_tiny_xl_pipeline(seed: int = 0) -> Any:
    """Build RectifiedFlowXLPipeline: 32x32 pictures, 4x8x8 latents."""
    from rectified_diffusers.pipelines_xl import RectifiedFlowXLPipeline

    pipeline = RectifiedFlowXLPipeline(**make_xl_components(seed), scheduler=None, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
