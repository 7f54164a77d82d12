"""Tiny pipelines of the real classes with random weights, built in a moment and without network."""

import copy
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

MAX_TOKENS = 77
MAX_T5_TOKENS = 512
MERGES = ["t h", "th e</w>", "r e", "re d</w>"]


@cache
def vocabulary() -> dict[str, int]:
    """Return the token ids: every byte inside a word, every byte at its end, the merges, start and end of text."""
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


@cache
def make_t5_tokenizer() -> T5TokenizerFast:
    """Build a T5 tokenizer of single characters, as files of `tokenizers`, which transformers 4 and 5 share."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(ord("!"), ord("~") + 1)]
    tokenizer: Any = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder, "tokenizer.json")))
        return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=MAX_T5_TOKENS)


def make_t5_encoder(width: int = 16) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(make_t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config).eval()


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


def make_sd3_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    ).eval()


def make_flux_transformer(*, guidance_embeds: bool = True) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 2, 2),
    ).eval()


def make_vae(**changes: Any) -> AutoencoderKL:
    """Build a VAE with 4 latent channels, 4 times smaller than its pictures: 8x8 latents for 32x32 pixels."""
    blocks: dict[str, Any] = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    blocks |= {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
    return AutoencoderKL(**{**blocks, **changes}).eval()


def twin(network: nn.Module, memo: dict[int, Any]) -> Any:
    """Copy a network as `copy.deepcopy(network, memo)` does, several times as fast; tuples are of numbers."""
    if id(network) in memo:
        return memo[id(network)]
    memo[id(network)] = copied = object.__new__(type(network))
    attributes = vars(copied)
    for name, value in vars(network).items():
        if name in ("_modules", "_parameters", "_buffers"):
            value = type(value)((key, _twin_of_part(part, memo)) for key, part in value.items())
        elif isinstance(value, (dict, set)) and not value:  # of hooks, of which there are twelve
            value = type(value)()
        elif not isinstance(value, (bool, int, float, str, tuple, type(None))):
            value = copy.deepcopy(value, memo)
        attributes[name] = value
    return copied


def _twin_of_part(part: Any, memo: dict[int, Any]) -> Any:
    return twin(part, memo) if isinstance(part, nn.Module) else copy.deepcopy(part, memo)


@cache
def make_networks(seed: int) -> dict[str, nn.Module]:
    """Build the networks of `make_components`, which copies them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"unet": make_unet(), "vae": make_vae(), "text_encoder": make_text_encoder()}


def make_components(seed: int = 0) -> dict[str, Any]:
    """Build every component but the scheduler; equal seeds give equal weights and leave the global RNG alone."""
    return {
        **{name: twin(network, {}) for name, network in make_networks(seed).items()},
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


def make_sd3_components(seed: int = 0) -> dict[str, Any]:
    """Build every component of a Stable Diffusion 3 pipeline but the scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = {
            "text_encoder": CLIPTextModelWithProjection(make_text_config()).eval(),
            "text_encoder_2": CLIPTextModelWithProjection(make_text_config()).eval(),
            "text_encoder_3": make_t5_encoder(width=32),
        }
        vae = make_vae(scaling_factor=1.5, shift_factor=0.06)
        transformer = make_sd3_transformer()
    tokenizers = {"tokenizer": make_tokenizer(), "tokenizer_2": make_tokenizer(), "tokenizer_3": make_t5_tokenizer()}
    return {"transformer": transformer, "vae": vae, **encoders, **tokenizers}


def make_flux_components(seed: int = 0, *, guidance_embeds: bool = True) -> dict[str, Any]:
    """Build every component of a FLUX.1 pipeline but the scheduler; dev's takes guidance as an input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = {"text_encoder": make_text_encoder(), "text_encoder_2": make_t5_encoder()}
        vae = make_vae(scaling_factor=0.36, shift_factor=0.12)
        transformer = make_flux_transformer(guidance_embeds=guidance_embeds)
    tokenizers = {"tokenizer": make_tokenizer(), "tokenizer_2": make_t5_tokenizer()}
    return {"transformer": transformer, "vae": vae, **encoders, **tokenizers}


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
    """Return the latents of a two-step run, unless `kwargs` say otherwise; the seed determines the noise."""
    kwargs = {"num_inference_steps": 2, "output_type": "latent", **kwargs}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt, generator=torch.manual_seed(seed), **kwargs).images


def make_tiny_xl_pipeline(seed: int = 0) -> Any:
    """Build RectifiedFlowXLPipeline: 32x32 pictures, 4x8x8 latents."""
    from rectified_diffusers.pipelines.stable_diffusion_xl import RectifiedFlowXLPipeline

    pipeline = RectifiedFlowXLPipeline(**make_xl_components(seed), scheduler=None, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_diffusion_scheduler(**changes: Any) -> DDIMScheduler:
    """Build Stable Diffusion's schedule."""
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
    return DDIMScheduler(**{**settings, **changes})


Kind = Literal["flow", "diffusion", "v_prediction", "zero_snr", "xl", "xl_flow", "sd3", "flux", "flux_schnell"]


def _make_flow(seed: int) -> Any:
    from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
    from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline

    return RectifiedFlowPipeline(**make_components(seed), scheduler=RectifiedFlowEulerScheduler())


def _make_diffusion(seed: int, **changes: Any) -> Any:
    return StableDiffusionPipeline(**make_components(seed), scheduler=make_diffusion_scheduler(**changes))


def _make_xl(seed: int) -> Any:
    scheduler = make_diffusion_scheduler()
    return StableDiffusionXLPipeline(**make_xl_components(seed), scheduler=scheduler, add_watermarker=False)


def _make_sd3(seed: int) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(**make_sd3_components(seed), scheduler=scheduler)


def _make_flux(seed: int, *, guidance_embeds: bool = True) -> Any:
    """Build the pipeline with the tests' image size: Flux's default is 128 latents, regardless of its networks."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_embeds)
    pipeline = FluxPipeline(**make_flux_components(seed, guidance_embeds=guidance_embeds), scheduler=scheduler)
    pipeline.default_sample_size = 8
    return pipeline


def make_tiny_pipeline(kind: Kind = "flow", seed: int = 0) -> Any:
    """Build a text-to-image pipeline of 32x32 pictures, 4x8x8 latents.

    Args:
        kind: `flow` is our pipeline, `diffusion` predicts epsilon as SD 1.5 does, `v_prediction` v as SD 2.1 does and
            `zero_snr` v on a schedule that ends in pure noise; `xl` is a diffusion model, `xl_flow` our pipeline;
            `flux` takes guidance as FLUX.1-dev does.
    """
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    makers: dict[str, Callable[[int], Any]] = {
        "flow": _make_flow,
        "diffusion": _make_diffusion,
        "v_prediction": lambda seed: _make_diffusion(seed, prediction_type="v_prediction"),
        "zero_snr": lambda seed: _make_diffusion(seed, prediction_type="v_prediction", **zero_snr),
        "xl": _make_xl,
        "xl_flow": make_tiny_xl_pipeline,
        "sd3": _make_sd3,
        "flux": _make_flux,
        "flux_schnell": lambda seed: _make_flux(seed, guidance_embeds=False),
    }
    if kind not in makers:
        raise ValueError(f"kind must be one of {', '.join(makers)}, got {kind!r}.")
    pipeline = makers[kind](seed)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
