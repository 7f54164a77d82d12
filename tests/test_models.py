"""The Stacked U-Net: equal to its two U-Nets by hand, and at home wherever diffusers takes a U-Net."""

import json
import logging
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from rectified_diffusers.models.stacked_unet import StackedUNet
from rectified_diffusers.models.velocity_unet import DiffusionVelocityUNet
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowImg2ImgPipeline, RectifiedFlowPipeline
from rectified_diffusers.training.config import DistillConfig, ReflowConfig
from rectified_diffusers.training.distill import DistillTrainer
from rectified_diffusers.training.reflow import ReflowTrainer
from tests.tiny import make_components, make_unet
from tests.training.helpers import SHORT, make_dataset

pytestmark = pytest.mark.usefixtures("plain_charts")
EXAMPLE = Path(__file__).parent.parent / "examples" / "stacked_unet.py"
SD15: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
    "sample_size": 64,
}


def make_pair(**changes: Any) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """Build two U-Nets of one shape, with norms that do something."""
    unets = make_unet(**changes), make_unet(**changes)
    for unet in unets:
        for weight in unet.parameters():
            if weight.ndim == 1:
                torch.nn.init.normal_(weight, mean=0.5, std=0.2)
    return unets


def make_stack() -> StackedUNet:
    return StackedUNet.from_unet(*make_pair())


def make_inputs(height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Sample x_t, timesteps and text embeddings for two examples."""
    return torch.randn(2, 4, height, width), torch.tensor([1000.0, 370.5]), torch.randn(2, 5, 16)


def by_hand(first: Any, second: Any, x_t: Tensor, *args: Any, residuals: Any = None, **conditions: Any) -> Tensor:
    """Run two whole U-Nets: what the first gives to its output layers is put where the second's conv_in ends."""
    caught: list[Tensor] = []
    hooks = [
        first.conv_norm_out.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0])),
        second.conv_in.register_forward_hook(lambda module, inputs, output: caught[0]),
    ]
    try:
        first(x_t, *args, **conditions, **(residuals or {}))
        return second(x_t, *args, **conditions).sample
    finally:
        for hook in hooks:
            hook.remove()


def make_pipeline(unet: UNet2DConditionModel) -> Any:
    parts = {**make_components(), "unet": unet, "scheduler": RectifiedFlowEulerScheduler()}
    pipeline = RectifiedFlowPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, **options: Any) -> Tensor:
    return pipeline("a cat", generator=torch.manual_seed(5), output_type="latent", **options).images


# ---------------------------------------------------------------------------------------------- the network


def test_parameters_of_stable_diffusion_1_5():
    with torch.device("meta"):
        assert sum(weight.numel() for weight in StackedUNet(**SD15).parameters()) == 1_719_017_924


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (2, 2), (9, 7)], ids=str)
def test_equals_the_two_unets_by_hand(size):
    first, second = make_pair()
    inputs = make_inputs(*size)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    output = StackedUNet.from_unet(first, second)(*inputs, encoder_attention_mask=mask).sample
    assert torch.equal(output, by_hand(first, second, *inputs, encoder_attention_mask=mask))
    assert not torch.allclose(output, by_hand(second, first, *inputs, encoder_attention_mask=mask))


@torch.no_grad()
def test_equals_the_two_unets_by_hand_with_sdxl_conditions():
    first, second = make_pair(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 16
    )
    conditions = {"added_cond_kwargs": {"text_embeds": torch.randn(2, 16), "time_ids": torch.rand(2, 6)}}
    stack, inputs = StackedUNet.from_unet(first, second), make_inputs()
    assert torch.equal(stack(*inputs, **conditions).sample, by_hand(first, second, *inputs, **conditions))
    assert stack.add_embedding.linear_1.in_features == 40, "SDXL pipelines read it"


@torch.no_grad()
def test_a_diffusions_velocity_is_stacked_inside_its_conversion(tmp_path):
    """The two halves see what the one U-Net sees, and their answer is read as that one's is."""
    pair = make_pair()
    first, second = (DiffusionVelocityUNet.from_unet(unet, DDIMScheduler()) for unet in pair)
    stack = StackedUNet.from_unet(first, second)
    sample, _, told = make_inputs()
    t = torch.tensor([0.3, 0.9])
    as_flow = first.as_flow
    expected = as_flow.velocity(by_hand(*pair, *as_flow.network_input(sample, t), told), sample, t)
    stack.save_pretrained(tmp_path)
    loaded = StackedUNet.from_pretrained(tmp_path)
    assert loaded.config["diffusion_schedule"] == first.config["diffusion_schedule"]
    for model in (stack, loaded):
        found = model(sample, 1000 * (1 - t), told).sample
        torch.testing.assert_close(found, expected)
        assert torch.equal(model(sample, 1000 * (1 - t), told, return_dict=False)[0], found)
    with pytest.raises(ValueError, match=r"got a DiffusionVelocityUNet with .* and a UNet2DConditionModel with None"):
        StackedUNet.from_unet(first, pair[1])
    with pytest.raises(ValueError, match=r"the schedule and the prediction_type, got \{'beta_start': 0.1\}"):
        StackedUNet.from_config({**pair[0].config, "diffusion_schedule": {"beta_start": 0.1}})


@torch.no_grad()
def test_the_latents_are_centred_once():
    (first, second), inputs = make_pair(center_input_sample=True), make_inputs()
    assert torch.equal(StackedUNet.from_unet(first, second)(*inputs).sample, by_hand(first, second, *inputs))


@torch.no_grad()
def test_both_halves_see_time_and_text():
    first, second = make_pair()
    x_t, timestep, text = make_inputs()
    calls = []
    stack = StackedUNet.from_unet(first, second)
    for half in (stack, stack.second):
        half.time_embedding.register_forward_hook(lambda *_: calls.append("time"))
        half.mid_block.attentions[0].register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
    stack(x_t, timestep, text)
    assert calls[::2] == ["time", "time"]
    assert calls[1] is text
    assert calls[3] is text


def test_from_unet_copies():
    unet = make_unet().to(torch.bfloat16)
    stack = StackedUNet.from_unet(unet)
    weights = unet.state_dict()
    for name, weight in stack.state_dict().items():
        assert torch.equal(weight, weights[name.removeprefix("second.")])
        assert weight.dtype == torch.bfloat16
    assert {name.split(".")[0] for name in weights} - {name.split(".")[0] for name in stack.state_dict()} == {
        "conv_norm_out",
        "conv_out",
    }
    assert not stack.training
    with torch.no_grad():
        stack.time_embedding.linear_1.weight.zero_()
    assert unet.time_embedding.linear_1.weight.any()
    assert stack.second.time_embedding.linear_1.weight.any(), "the halves share weights"


def test_config_is_that_of_the_unet():
    unet = make_unet()
    config = StackedUNet.from_unet(unet).config
    public = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    assert {name: config[name] for name in public} == public


# ---------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_stacked_is_refused():
    other, _ = make_pair(cross_attention_dim=8)
    with pytest.raises(ValueError, match=r"'second\.down_blocks.*attn2.to_k.weight' of shape \(16, 16\).* \(16, 8\)"):
        StackedUNet.from_unet(make_unet(), other)
    with pytest.raises(ValueError, match="Stack two plain U-Nets of one config"):
        StackedUNet.from_unet(make_stack())
    tuned = make_unet()
    tuned.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="with no LoRA attached"):
        StackedUNet.from_unet(tuned)
    with pytest.raises(ValueError, match="addition_embed_type='image_hint' adds an image"):
        StackedUNet(addition_embed_type="image_hint", encoder_hid_dim=8, encoder_hid_dim_type="image_proj")
    with pytest.raises(TypeError, match="layers_per_blok"):
        StackedUNet(layers_per_blok=2)


def test_what_is_made_for_one_unet_is_refused():
    stack = make_stack()
    with pytest.raises(ValueError, match="cannot use an IP-Adapter, which has weights for the layers of one U-Net"):
        stack._load_ip_adapter_weights([{}])
    with pytest.raises(TypeError, match=r"takes weights by name, got str\. Load a file with the pipeline's"):
        stack.load_lora_adapter("folder")


# ---------------------------------------------------------------------------------------------- files, pipelines


@torch.no_grad()
def test_save_and_load(tmp_path):
    stack, inputs = make_stack(), make_inputs()
    stack.save_pretrained(tmp_path)
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == stack.state_dict().keys()
    assert torch.equal(StackedUNet.from_pretrained(tmp_path)(*inputs).sample, stack(*inputs).sample)


@torch.no_grad()
def test_from_pipe_carries_the_stack():
    pipeline = make_pipeline(make_stack())
    assert RectifiedFlowImg2ImgPipeline.from_pipe(pipeline).unet is pipeline.unet


def test_pipeline(tmp_path, caplog):
    pipeline = make_pipeline(make_stack())
    latents = sample(pipeline, num_inference_steps=2, guidance_scale=1.5, height=32, width=48)
    assert latents.shape == (1, 4, 8, 12)
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(5))
    text, _ = pipeline.encode_prompt("a cat", "cpu", 1, False)
    velocity = pipeline.unet(noise, torch.tensor(1000.0), text).sample
    assert torch.equal(sample(pipeline), noise + velocity)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["rectified_diffusers", "StackedUNet"]
    library = logging.getLogger("diffusers")
    library.addHandler(caplog.handler)
    try:
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
    finally:
        library.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records if "unet" in record.message.lower()] == []
    assert type(loaded.unet) is StackedUNet
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded), sample(pipeline))


@torch.no_grad()
def test_controlnet_residuals_go_into_the_first_half():
    first, second = make_pair()
    stack, (x_t, timestep, text) = StackedUNet.from_unet(first, second), make_inputs()
    controlnet = ControlNetModel.from_unet(stack, conditioning_embedding_out_channels=(8, 8, 8)).eval()
    assert torch.equal(controlnet.mid_block.resnets[0].conv1.weight, first.mid_block.resnets[0].conv1.weight)
    for weight in controlnet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    down, mid = controlnet(x_t, timestep, text, torch.randn(2, 3, 32, 32), return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    output = stack(x_t, timestep, text, **residuals).sample
    assert torch.equal(output, by_hand(first, second, x_t, timestep, text, residuals=residuals))
    assert not torch.allclose(output, stack(x_t, timestep, text).sample)
    parts = {**make_components(), "unet": stack, "controlnet": controlnet, "scheduler": RectifiedFlowEulerScheduler()}
    pipeline = StableDiffusionControlNetPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    images = [sample(pipeline, image=Image.new("RGB", (32, 32), color)) for color in ("white", "black")]
    assert not torch.allclose(*images)


@torch.no_grad()
def test_adapter_residuals_go_into_the_first_half():
    first, second = make_pair()
    stack, inputs = StackedUNet.from_unet(first, second), make_inputs()
    states = [torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4)]

    def residuals() -> dict[str, Any]:  # the U-Net empties the list and adds in place
        return {"down_intrablock_additional_residuals": [state.clone() for state in states]}

    expected = by_hand(first, second, *inputs, residuals=residuals())
    assert torch.equal(stack(*inputs, **residuals()).sample, expected)


# ---------------------------------------------------------------------------------------------- LoRA


def make_lora(
    unet: UNet2DConditionModel, layers: tuple[str, ...] = ("to_q", "to_out.0", "conv1", "conv_in", "conv_out"), seed=0
) -> dict[str, Tensor]:
    """Sample a LoRA of rank 2, named as in a pipeline's file."""
    tuned = type(unet).from_config(unet.config)
    tuned.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(layers)))
    generator = torch.Generator().manual_seed(seed)
    weights = get_peft_model_state_dict(tuned)
    return {f"unet.{name}": 0.3 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}


def add_by_hand(unet: UNet2DConditionModel, lora: dict[str, Tensor], scale: float = 1.0) -> UNet2DConditionModel:
    """Add scale * up * down to the weights of a copy of a U-Net."""
    tuned = type(unet).from_config(unet.config).eval()
    weights = dict(unet.state_dict())
    for name in {key.rsplit(".lora_", 1)[0] for key in lora}:
        down, up = lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"]
        target = f"{name.removeprefix('unet.')}.weight"
        weights[target] = weights[target] + scale * (up.flatten(1) @ down.flatten(1)).reshape(weights[target].shape)
    tuned.load_state_dict(weights)
    return tuned


@torch.no_grad()
def test_a_plain_lora_goes_onto_both_halves():
    first, second = make_pair()
    stack, inputs = StackedUNet.from_unet(first, second), make_inputs()
    plain = stack(*inputs).sample
    lora = make_lora(first)
    pipeline = make_pipeline(stack)
    pipeline.load_lora_weights(lora, adapter_name="style")
    expected = by_hand(add_by_hand(first, lora), add_by_hand(second, lora), *inputs)
    torch.testing.assert_close(stack(*inputs).sample, expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 0.01
    pipeline.set_adapters("style", 0.5)
    half = by_hand(add_by_hand(first, lora, 0.5), add_by_hand(second, lora, 0.5), *inputs)
    torch.testing.assert_close(stack(*inputs).sample, half, atol=1e-5, rtol=1e-5)
    pipeline.fuse_lora()
    torch.testing.assert_close(stack(*inputs).sample, half, atol=1e-5, rtol=1e-5)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(stack(*inputs).sample, plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_scale_of_a_call_reaches_both_halves():
    first, second = make_pair()
    inputs, scale, lora = make_inputs(), {"cross_attention_kwargs": {"scale": 0.3}}, make_lora(first)
    stack = StackedUNet.from_unet(first, second)
    for unet in (first, second, stack):
        make_pipeline(unet).load_lora_weights(lora)
    whole, scaled = stack(*inputs).sample, stack(*inputs, **scale).sample
    assert not torch.allclose(scaled, whole)
    torch.testing.assert_close(scaled, by_hand(first, second, *inputs, **scale), atol=1e-5, rtol=1e-5)
    assert torch.equal(stack(*inputs).sample, whole), "the scale of one call stays"


@torch.no_grad()
def test_an_unloaded_lora_leaves_no_trace():
    stack, inputs = make_stack(), make_inputs()
    plain, pipeline = stack(*inputs).sample, make_pipeline(stack)
    pipeline.load_lora_weights(make_lora(make_unet()))
    assert not torch.equal(stack(*inputs).sample, plain)
    pipeline.unload_lora_weights()
    assert torch.equal(stack(*inputs).sample, plain)


@torch.no_grad()
def test_a_lora_of_the_stack_keeps_its_halves_apart(tmp_path):
    stack, inputs = make_stack(), make_inputs()
    lora = make_lora(stack)
    assert any(name.startswith("unet.second.") for name in lora)
    expected = add_by_hand(stack, lora)(*inputs).sample
    make_pipeline(stack).load_lora_weights(lora)
    torch.testing.assert_close(stack(*inputs).sample, expected, atol=1e-5, rtol=1e-5)
    RectifiedFlowPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(stack, adapter_name="default_0")
    )
    fresh = StackedUNet.from_config(stack.config).eval()
    fresh.load_state_dict(
        {name.replace(".base_layer", ""): w for name, w in stack.state_dict().items() if "lora_" not in name}
    )
    make_pipeline(fresh).load_lora_weights(tmp_path)
    assert torch.equal(fresh(*inputs).sample, stack(*inputs).sample)


@torch.no_grad()
def test_alphas_of_a_kohya_file_reach_both_halves():
    """In that format each layer has its own alpha, and names have underscores."""
    first, second = make_pair()
    stack, inputs = StackedUNet.from_unet(first, second), make_inputs()
    plain = stack(*inputs).sample
    file: dict[str, Tensor] = {}
    lora: dict[str, Tensor] = {}
    for place, alpha in {"mid_block.resnets.0.conv1": 1.0, "mid_block.resnets.1.conv1": 4.0}.items():
        rank, name = int(alpha) + 1, f"lora_unet_{place.replace('.', '_')}"
        down, up = torch.randn(rank, 16, 3, 3) / 8, torch.randn(16, rank, 1, 1) / 8
        file.update({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
        file[f"{name}.alpha"] = torch.tensor(alpha)
        lora.update({f"unet.{place}.lora_A.weight": down, f"unet.{place}.lora_B.weight": up * alpha / rank})
    make_pipeline(stack).load_lora_weights(file)
    expected = by_hand(add_by_hand(first, lora), add_by_hand(second, lora), *inputs)
    torch.testing.assert_close(stack(*inputs).sample, expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


@torch.no_grad()
def test_metadata_of_a_lora_reaches_both_halves(tmp_path):
    """Ranks and alphas that differ from layer to layer are stored as patterns of names."""
    first, second = make_pair()
    inputs, place = make_inputs(), "mid_block.attentions.0.transformer_blocks.0"
    config = LoraConfig(r=2, lora_alpha=1, target_modules=[f"{place}.attn1.to_q", f"{place}.attn2.to_q"])
    config.rank_pattern, config.alpha_pattern = {f"^{place}.attn2.to_q": 3}, {f"^{place}.attn2.to_q": 6}
    tuned = make_unet()
    tuned.add_adapter(config)
    layers = {name: torch.randn_like(weight) for name, weight in get_peft_model_state_dict(tuned).items()}
    RectifiedFlowPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=tuned.peft_config["default"].to_dict()
    )
    stack = StackedUNet.from_unet(first, second)
    make_pipeline(stack).load_lora_weights(tmp_path)
    scales = {"attn1": 1 / 2, "attn2": 6 / 3}
    lora = {
        f"unet.{name}": weight * scales[name.split(".")[5]] if "lora_B" in name else weight
        for name, weight in layers.items()
    }
    expected = by_hand(add_by_hand(first, lora), add_by_hand(second, lora), *inputs)
    torch.testing.assert_close(stack(*inputs).sample, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hotswap_and_weights_per_block():
    first, second = make_pair()
    stack, inputs, layers = StackedUNet.from_unet(first, second), make_inputs(), ("to_q", "to_out.0")
    pipeline, swapped = make_pipeline(stack), make_lora(first, layers, seed=1)
    pipeline.load_lora_weights(make_lora(first, layers), adapter_name="style")
    pipeline.load_lora_weights(swapped, adapter_name="style", hotswap=True)
    expected = by_hand(add_by_hand(first, swapped), add_by_hand(second, swapped), *inputs)
    torch.testing.assert_close(stack(*inputs).sample, expected, atol=1e-5, rtol=1e-5)
    pipeline.set_adapters("style", {"unet": {"mid": 0.0, "down": 0.0, "up": 0.25}})
    scales = {name: module.scaling["style"] for name, module in stack.named_modules() if hasattr(module, "scaling")}
    assert {name for name, scale in scales.items() if scale} == {name for name in scales if "up_blocks." in name}
    assert {scale for name, scale in scales.items() if name.startswith("second.up_blocks.")} == {0.25}


# ---------------------------------------------------------------------------------------------- what a U-Net can do


def test_gradient_checkpointing_changes_no_gradient():
    stack, inputs = make_stack().train(), make_inputs()

    def gradients() -> list[Tensor]:
        stack.zero_grad()
        stack(*inputs).sample.square().mean().backward()
        return [weight.grad for weight in stack.parameters() if weight.grad is not None]

    plain = gradients()
    stack.enable_gradient_checkpointing()
    assert stack.is_gradient_checkpointing
    assert all(half.mid_block.gradient_checkpointing for half in (stack, stack.second))
    recomputed = gradients()
    assert len(recomputed) == len(plain) == len(list(stack.parameters()))
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_attention_processors_of_both_halves():
    from diffusers.models.attention_processor import AttnProcessor

    stack, inputs = make_stack(), make_inputs()
    plain = stack(*inputs).sample
    names = set(stack.attn_processors)
    assert {name for name in names if name.startswith("second.")} == {
        f"second.{name}" for name in names if not name.startswith("second.")
    }
    stack.fuse_qkv_projections()
    torch.testing.assert_close(stack(*inputs).sample, plain, atol=1e-5, rtol=1e-5)
    stack.unfuse_qkv_projections()
    assert torch.equal(stack(*inputs).sample, plain)
    stack.set_attn_processor(AttnProcessor())
    assert {type(processor) for processor in stack.attn_processors.values()} == {AttnProcessor}
    torch.testing.assert_close(stack(*inputs).sample, plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_freeu_in_both_halves():
    first, second = make_pair()
    inputs, settings = make_inputs(), {"s1": 0.9, "s2": 0.2, "b1": 1.5, "b2": 1.6}
    stack = StackedUNet.from_unet(first, second)
    plain = stack(*inputs).sample
    stack.enable_freeu(**settings)
    for block in [*stack.up_blocks, *stack.second.up_blocks]:
        assert (block.s1, block.b2) == (0.9, 1.6)
    stack.disable_freeu()
    assert torch.equal(stack(*inputs).sample, plain)
    assert all(block.s1 is None for block in [*stack.up_blocks, *stack.second.up_blocks])


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [pytest.param(DistillTrainer, DistillConfig, marks=pytest.mark.slow), (ReflowTrainer, ReflowConfig)],
    ids=str,
)
def test_is_trained(trainer_class: Any, config_class: Any, tmp_path: Path):
    stack = make_stack()
    options = {**SHORT, "max_steps": 2, "gradient_checkpointing": True, "ema_decay": 0.5}
    config = config_class(output_dir=tmp_path / "run", **options)
    trained = trainer_class(make_pipeline(stack), make_dataset(tmp_path / "triplets"), config).train()
    assert type(trained) is StackedUNet
    same = [name for name, weight in trained.named_parameters() if torch.equal(weight, stack.get_parameter(name))]
    assert same == [], "no step changed these"
    loaded: Any = RectifiedFlowPipeline.from_pretrained(tmp_path / "run").unet
    assert type(loaded) is StackedUNet
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


@pytest.mark.slow
def test_distillation_teaches_it_to_land_in_one_step(tmp_path):
    """Two copies of a U-Net in series predict nothing of use; a hundred steps later they do."""
    dataset = make_dataset(tmp_path / "triplets")
    options = {**SHORT, "max_steps": 100, "learning_rate": 1e-2, "lr_schedule": "cosine", "ema_decay": 0.8}
    config = DistillConfig(output_dir=tmp_path / "run", **{**options, "save_every_steps": 1000})
    pipeline = make_pipeline(StackedUNet.from_unet(make_unet()))
    DistillTrainer(pipeline, dataset, config).train()
    trained: Any = RectifiedFlowPipeline.from_pretrained(tmp_path / "run")
    trained.set_progress_bar_config(disable=True)
    triplets = dataset.rows(range(len(dataset)))

    def error(pipeline: Any) -> float:
        latents = pipeline(triplets.prompts, latents=triplets.noise, output_type="latent").images
        return (latents - triplets.data).square().mean().sqrt().item()

    assert error(pipeline) > 1
    assert error(trained) < 0.3  # noise and data are 1.26 apart


def test_example(tmp_path, monkeypatch):
    make_pipeline(make_unet()).save_pretrained(tmp_path / "flow")
    make_dataset(tmp_path / "triplets")
    options = ["--model", "flow", "--triplets", "triplets", "--output", "stacked", "--max-steps", "1"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options, "--batch-size", "2", "--mixed-precision", "no"])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert type(DiffusionPipeline.from_pretrained("stacked").unet) is StackedUNet
