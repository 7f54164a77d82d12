"""Tiny pipelines of diffusers' families, with random weights, to be adapted without a line of code for each.

Every builder returns a pipeline and the options of its call that make the smallest image.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from tests.models_any.text import make_chat_tokenizer, make_language_model
from tests.tiny import make_diffusion_scheduler, make_t5_encoder, make_t5_tokenizer, make_tiny_pipeline, make_vae

Built = tuple[Any, dict[str, Any]]
SMALL = {"height": 32, "width": 32}
VIDEO = {"height": 16, "width": 16, "num_frames": 9}


def fill(network: nn.Module) -> Any:
    """Give a value to weights that start at zero, so that every input has an effect, and to those not initialized."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            if not bool(weight.any()) or not bool(weight.isfinite().all()):
                weight.normal_(std=0.1, generator=generator)
    return network.eval()


def flow(**changes: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**changes)


def t5(width: int = 32) -> dict[str, Any]:
    return {"text_encoder": make_t5_encoder(width), "tokenizer": make_t5_tokenizer()}


def language_model(model: str, config: str, **changes: Any) -> dict[str, Any]:
    made = make_language_model(getattr(transformers, model), getattr(transformers, config), **changes)
    return {"text_encoder": made, "tokenizer": make_chat_tokenizer()}


def aura_flow() -> Built:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(transformer=fill(transformer), vae=make_vae(), scheduler=flow(), **t5()), SMALL


def chroma() -> Built:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    vae = make_vae(shift_factor=0.1)
    return diffusers.ChromaPipeline(transformer=fill(transformer), vae=vae, scheduler=flow(), **t5()), SMALL


def sana(scheduler: Any = None) -> Built:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=8,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    text = language_model("Gemma2Model", "Gemma2Config")
    pipeline = diffusers.SanaPipeline(
        transformer=fill(transformer), vae=vae.eval(), scheduler=scheduler or flow(shift=3.0), **text
    )
    return pipeline, {**SMALL, "use_resolution_binning": False, "complex_human_instruction": None}


def sana_multistep() -> Built:
    """Sana as it is published: DPM-Solver++ along the sigmas of a flow."""
    return sana(
        diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
        )
    )


def lumina2() -> Built:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )
    text = language_model("Gemma2Model", "Gemma2Config")
    vae = make_vae(shift_factor=0.1)
    return diffusers.Lumina2Pipeline(transformer=fill(transformer), vae=vae, scheduler=flow(), **text), SMALL


def z_image() -> Built:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[600, 32, 32],
    )
    with torch.no_grad():  # not initialized by diffusers
        transformer.x_pad_token.zero_()
        transformer.cap_pad_token.zero_()
    text = language_model("Qwen3Model", "Qwen3Config")
    vae = make_vae(shift_factor=0.1)
    return diffusers.ZImagePipeline(transformer=fill(transformer), vae=vae, scheduler=flow(shift=3.0), **text), SMALL


def flux2_klein() -> Built:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    text = language_model("Qwen3ForCausalLM", "Qwen3Config")
    pipeline = diffusers.Flux2KleinPipeline(transformer=fill(transformer), vae=vae.eval(), scheduler=flow(), **text)
    return pipeline, {"height": 16, "width": 16, "text_encoder_out_layers": (1, 2)}


def ovis_image() -> Built:
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    text = language_model("Qwen3Model", "Qwen3Config")
    vae = make_vae(shift_factor=0.1)
    pipeline = diffusers.OvisImagePipeline(
        transformer=fill(transformer), vae=vae, scheduler=flow(use_dynamic_shifting=True), **text
    )
    return pipeline, SMALL


def cogview4() -> Built:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    scheduler = flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    text = language_model("GlmModel", "GlmConfig") | {"tokenizer": make_chat_tokenizer(start="<bos>")}
    return diffusers.CogView4Pipeline(
        transformer=fill(transformer), vae=make_vae(), scheduler=scheduler, **text
    ), SMALL


def ltx_video() -> Built:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    return diffusers.LTXPipeline(transformer=fill(transformer), vae=vae.eval(), scheduler=flow(), **t5()), {
        **SMALL,
        "num_frames": 5,
    }


def wan(scheduler: Any = None) -> Built:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
    )
    vae = diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipeline = diffusers.WanPipeline(
        transformer=fill(transformer), vae=vae.eval(), scheduler=scheduler or flow(shift=7.0), **t5()
    )
    return pipeline, {**VIDEO, "num_frames": 5}


def wan_multistep() -> Built:
    """Wan as it is published: UniPC along the sigmas of a flow."""
    return wan(
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    )


def pixart_sigma() -> Built:
    """A diffusion model that also predicts a variance."""
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=8,
        use_additional_conditions=False,
    )
    scheduler = make_diffusion_scheduler()
    pipeline = diffusers.PixArtSigmaPipeline(
        transformer=fill(transformer), vae=make_vae(), scheduler=scheduler, **t5()
    )
    return pipeline, {**SMALL, "use_resolution_binning": False, "clean_caption": False}


def sdxl_euler() -> Built:
    """A diffusion model whose own scheduler scales its samples."""
    pipeline = make_tiny_pipeline("xl")
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    return pipeline, SMALL


FLOWS: dict[str, Callable[[], Built]] = {
    "sd3": lambda: (make_tiny_pipeline("sd3"), SMALL),
    "flux": lambda: (make_tiny_pipeline("flux"), SMALL),
    "flux_schnell": lambda: (make_tiny_pipeline("flux_schnell"), SMALL),
    "rectified_flow": lambda: (make_tiny_pipeline("flow"), SMALL),
    "aura_flow": aura_flow,
    "chroma": chroma,
    "sana": sana,
    "sana_multistep": sana_multistep,
    "lumina2": lumina2,
    "z_image": z_image,
    "flux2_klein": flux2_klein,
    "ovis_image": ovis_image,
    "cogview4": cogview4,
    "ltx_video": ltx_video,
    "wan": wan,
    "wan_multistep": wan_multistep,
}
DIFFUSIONS: dict[str, Callable[[], Built]] = {
    "sd": lambda: (make_tiny_pipeline("diffusion"), SMALL),
    "sd_v_prediction": lambda: (make_tiny_pipeline("v_prediction"), SMALL),
    "sdxl": lambda: (make_tiny_pipeline("xl"), SMALL),
    "sdxl_euler": sdxl_euler,
    "pixart_sigma": pixart_sigma,
}


def build(name: str) -> Built:
    """Build a family with the same weights each time; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {**FLOWS, **DIFFUSIONS}[name]()
