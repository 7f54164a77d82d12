"""What the pipelines inherit from diffusers: each feature has an effect on a rectified flow, and no more than it says.

Offloading is tested as far as it goes without an accelerator, the CPU in its place; that it saves memory shows on one
alone (marker `gpu`).
"""

from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig

from rectified_diffusers import RectifiedFlowAdapterPipeline, RectifiedFlowEulerScheduler, RectifiedFlowPipeline
from tests.tiny import (
    make_adapter_unet,
    make_components,
    make_feature_extractor,
    make_image_encoder,
    make_ip_adapter_weights,
    make_safety_checker,
    make_text_encoder,
    make_tiny_adapter,
    make_tiny_pipeline,
    make_tiny_xl_pipeline,
    make_tokenizer,
    sample,
)

STOCK_SKIPS_LAYERS = hasattr(make_text_encoder(), "text_model")


@pytest.fixture(scope="module")
def pipeline():
    """A pipeline for tests that leave it as it is."""
    return make_tiny_pipeline("flow")


@pytest.fixture
def own():
    """A pipeline for a test that changes its components."""
    return make_tiny_pipeline("flow")


@pytest.fixture(scope="module")
def picture():
    return torch.rand(1, 3, 32, 32, generator=torch.manual_seed(5))


def far(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two pictures differ by more than rounding."""
    return not torch.allclose(a, b, atol=1e-4)


# Text


def test_negative_prompt_acts_under_guidance_and_only_there(pipeline):
    guided = sample(pipeline, guidance_scale=2.0)
    assert far(sample(pipeline, guidance_scale=2.0, negative_prompt="a cat"), guided)
    assert torch.equal(sample(pipeline, guidance_scale=2.0, negative_prompt=""), guided)
    assert torch.equal(sample(pipeline, negative_prompt="a cat"), sample(pipeline))
    # v + w (v - v) = v: against itself as the negative prompt, guidance does nothing but round
    itself = sample(pipeline, guidance_scale=5.0, negative_prompt="a red apple")
    torch.testing.assert_close(itself, sample(pipeline))


def test_prompt_embeds_stand_for_their_prompts(pipeline):
    text, null = pipeline.encode_prompt("a red apple", "cpu", 1, True, "a cat")
    embeds = {"prompt_embeds": text, "negative_prompt_embeds": null}
    expected = sample(pipeline, guidance_scale=2.0, negative_prompt="a cat")
    assert torch.equal(sample(pipeline, prompt=None, guidance_scale=2.0, **embeds), expected)
    assert far(sample(pipeline, prompt=None, guidance_scale=2.0, **{**embeds, "prompt_embeds": 2 * text}), expected)


def test_textual_inversion():
    components = {**make_components(), "tokenizer": make_tokenizer.__wrapped__()}  # it will know a new token
    pipeline = RectifiedFlowPipeline(**components, scheduler=None)
    before = sample(pipeline), sample(pipeline, prompt="a <thing>")
    vectors = torch.randn(2, 16, generator=torch.manual_seed(3))
    pipeline.load_textual_inversion({"<thing>": vectors})
    assert torch.equal(sample(pipeline), before[0])
    learned = sample(pipeline, prompt="a <thing>")
    assert far(learned, before[1])
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[-2:], vectors)
    pipeline.unload_textual_inversion()
    assert torch.equal(sample(pipeline, prompt="a <thing>"), before[1])


@torch.no_grad()
def layer_before_last(pipeline: Any, prompt: str, clip_skip: int) -> torch.Tensor:
    """Encode a prompt by hand: the output of a layer `clip_skip` before the last, then the final norm."""
    tokens = pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    encoder = pipeline.text_encoder
    hidden = encoder(tokens, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    return getattr(encoder, "text_model", encoder).final_layer_norm(hidden)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_reads_an_earlier_layer(pipeline, clip_skip):
    text, null = pipeline.encode_prompt("a red apple", "cpu", 2, True, "a cat", clip_skip=clip_skip)
    expected = layer_before_last(pipeline, "a red apple", clip_skip)
    assert torch.equal(text, torch.cat([expected, expected]))
    assert torch.equal(null[:1], layer_before_last(pipeline, "a cat", 0))  # the negative prompt is not skipped
    images = sample(pipeline, clip_skip=clip_skip)
    assert torch.equal(images, sample(pipeline, prompt=None, prompt_embeds=expected))
    assert far(images, sample(pipeline)) == (clip_skip > 0)


def test_clip_skip_leaves_the_text_encoder_as_it_was(pipeline):
    before = sample(pipeline)
    sample(pipeline, clip_skip=1)
    assert torch.equal(sample(pipeline), before)
    assert hasattr(pipeline.text_encoder, "text_model") is STOCK_SKIPS_LAYERS
    assert not pipeline.text_encoder._forward_hooks
    assert not pipeline.text_encoder._forward_pre_hooks


def test_clip_skip_goes_with_embeddings_as_in_diffusers(pipeline):
    """Given embeddings, it has nothing to skip."""
    text, _ = pipeline.encode_prompt("a red apple", "cpu", 1, False)
    assert torch.equal(sample(pipeline, prompt=None, prompt_embeds=text, clip_skip=1), sample(pipeline))


@pytest.mark.skipif(STOCK_SKIPS_LAYERS, reason="this transformers leaves clip_skip to diffusers")
@pytest.mark.parametrize("clip_skip", [-1, 3])
def test_clip_skip_out_of_range(pipeline, clip_skip):
    with pytest.raises(ValueError, match=rf"clip_skip must be in \[0, 2\], the layers .* got {clip_skip}"):
        sample(pipeline, clip_skip=clip_skip)
    assert not pipeline.text_encoder._forward_hooks


def test_clip_skip_under_a_lora_of_the_text_encoder(own):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    own.text_encoder.add_adapter(config, "lora")
    full = sample(own, clip_skip=1)
    half = sample(own, clip_skip=1, cross_attention_kwargs={"scale": 0.5})
    off = sample(own, clip_skip=1, cross_attention_kwargs={"scale": 0.0})
    assert far(full, half)
    assert far(half, off)
    assert torch.equal(off, sample(make_tiny_pipeline("flow"), clip_skip=1))
    assert torch.equal(sample(own, clip_skip=1), full)  # the scale is taken back


# The flow


def test_guidance_rescale_keeps_the_deviation_of_the_text_prediction(pipeline):
    """Section 3.4 of arXiv:2305.08891, by hand for one step."""
    guidance, rescale = 5.0, 0.7
    images = sample(pipeline, num_inference_steps=1, guidance_scale=guidance, guidance_rescale=rescale)
    text, null = pipeline.encode_prompt("a red apple", "cpu", 1, True)
    x = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    with torch.no_grad():
        v_null, v_text = pipeline.unet(torch.cat([x, x]), 1000.0, torch.cat([null, text])).sample.chunk(2)
    v = v_null + guidance * (v_text - v_null)
    v = rescale * v * (v_text.std() / v.std()) + (1 - rescale) * v
    torch.testing.assert_close(images, x + v)  # another order of the products
    assert far(images, sample(pipeline, num_inference_steps=1, guidance_scale=guidance))


def test_cross_attention_kwargs_reach_the_unet(own):
    plain = sample(own)
    own.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "lora")
    full, half, off = (sample(own, cross_attention_kwargs={"scale": scale}) for scale in (1.0, 0.5, 0.0))
    assert torch.equal(full, sample(own))
    assert far(full, half)
    assert far(half, plain)
    assert torch.equal(off, plain)


def test_step_end_callbacks_see_and_change_the_run(pipeline):
    seen = []

    def watch(pipeline, i, timestep, tensors):
        seen.append((i, float(timestep), tensors["latents"]))
        return {}

    images = sample(pipeline, num_inference_steps=4, callback_on_step_end=watch)
    assert [(i, timestep) for i, timestep, _ in seen] == [(0, 1000), (1, 750), (2, 500), (3, 250)]
    assert torch.equal(seen[-1][2], images)

    def stop(pipeline, i, timestep, tensors):
        pipeline._interrupt = i == 1
        return {}

    assert torch.equal(sample(pipeline, num_inference_steps=4, callback_on_step_end=stop), seen[1][2])

    def turn_guidance_off(pipeline, i, timestep, tensors):
        pipeline._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"][-1:]}

    arguments: Any = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"], "guidance_scale": 3.0}
    halfway = sample(pipeline, callback_on_step_end=turn_guidance_off, **arguments)
    first = sample(pipeline, guidance_scale=3.0, callback_on_step_end=lambda p, i, t, k: watch(p, i, t, k))
    assert far(halfway, first)
    latents = seen[-2][2]  # after the guided step
    rest = sample(pipeline, latents=latents, timesteps=[500])
    torch.testing.assert_close(halfway, rest)  # 1000 / 500 and 2 differ in rounding


def test_freeu_acts_and_is_taken_back(own):
    plain = sample(own)
    own.enable_freeu(s1=0.6, s2=0.4, b1=1.3, b2=1.5)
    assert far(sample(own), plain)
    own.disable_freeu()
    assert torch.equal(sample(own), plain)


def test_fused_qkv_is_one_projection_and_the_same_picture(own):
    plain = sample(own)
    own.fuse_qkv_projections()
    assert any(name.endswith("to_qkv.weight") for name, _ in own.unet.named_parameters())
    torch.testing.assert_close(sample(own), plain)  # a product of other matrices
    own.unfuse_qkv_projections()
    assert torch.equal(sample(own), plain)


# Adapters


@pytest.fixture(scope="module")
def adapter_components():
    return {**make_components(), "unet": make_adapter_unet(), "scheduler": RectifiedFlowEulerScheduler()}


def test_t2i_adapter_equals_the_hand_written_loop(adapter_components, picture):
    adapter = make_tiny_adapter()
    pipeline = RectifiedFlowAdapterPipeline(**adapter_components, adapter=adapter)
    images = sample(pipeline, image=picture, adapter_conditioning_scale=0.8)
    text, _ = pipeline.encode_prompt("a red apple", "cpu", 1, False)
    x = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    with torch.no_grad():
        for timestep in (1000.0, 500.0):
            residuals = [0.8 * state for state in adapter(picture)]
            x = x + pipeline.unet(x, timestep, text, down_intrablock_additional_residuals=residuals).sample / 2
    assert torch.equal(images, x)
    off = sample(pipeline, image=picture, adapter_conditioning_scale=0.0)
    assert torch.equal(off, sample(RectifiedFlowPipeline(**adapter_components)))
    assert far(images, off)


def test_several_t2i_adapters_and_the_stock_pipeline(adapter_components, picture):
    adapters = MultiAdapter([make_tiny_adapter(0), make_tiny_adapter(1)])
    stock = StableDiffusionAdapterPipeline(**adapter_components, adapter=adapters)
    ours = RectifiedFlowAdapterPipeline.from_pipe(stock)
    arguments = {"image": [picture, 1 - picture], "adapter_conditioning_scale": [0.5, 1.0]}
    images = sample(ours, **arguments)
    assert torch.equal(images, sample(stock, guidance_scale=1.0, **arguments))
    assert far(images, sample(ours, **{**arguments, "adapter_conditioning_scale": [1.0, 0.5]}))
    assert far(images, sample(ours, clip_skip=1, **arguments))


def test_adapter_pipeline_saves_and_loads(tmp_path, adapter_components, picture):
    pipeline = RectifiedFlowAdapterPipeline(**adapter_components, adapter=make_tiny_adapter())
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is RectifiedFlowAdapterPipeline
    torch.testing.assert_close(sample(loaded, image=picture), sample(pipeline, image=picture))  # see save and load


@pytest.mark.parametrize("make", [make_tiny_pipeline, make_tiny_xl_pipeline], ids=["1.5", "XL"])
def test_ip_adapter(make, picture):
    pipeline = make()
    plain = sample(pipeline)
    pipeline.register_modules(image_encoder=make_image_encoder(), feature_extractor=make_feature_extractor())
    pipeline.load_ip_adapter(make_ip_adapter_weights(pipeline.unet), subfolder=None, weight_name=None)
    (image,) = pipeline.image_processor.postprocess(2 * picture - 1, output_type="pil")
    full = sample(pipeline, ip_adapter_image=image)
    assert far(full, plain)
    assert far(sample(pipeline, ip_adapter_image=image.rotate(90)), full)
    embeds = pipeline.prepare_ip_adapter_image_embeds([image], None, "cpu", 1, False)
    assert torch.equal(sample(pipeline, ip_adapter_image_embeds=embeds), full)
    pipeline.set_ip_adapter_scale(0.0)
    assert torch.equal(sample(pipeline, ip_adapter_image=image), plain)
    pipeline.unload_ip_adapter()
    assert torch.equal(sample(pipeline), plain)


# Pictures


def count_calls(module: torch.nn.Module) -> list[tuple[int, ...]]:
    """Return a list to which every call of the module adds the shape of its input."""
    shapes: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


def test_vae_slicing_decodes_one_by_one_and_changes_nothing(own):
    arguments = {"prompt": ["a red apple", "a cat"], "output_type": "pt"}
    shapes = count_calls(own.vae.decoder)
    whole = sample(own, **arguments)
    own.vae.enable_slicing()
    torch.testing.assert_close(sample(own, **arguments), whole)  # another batch size
    own.vae.disable_slicing()
    assert torch.equal(sample(own, **arguments), whole)
    assert shapes == [(2, 4, 8, 8), (1, 4, 8, 8), (1, 4, 8, 8), (2, 4, 8, 8)]


def test_vae_tiling_decodes_tiles_and_leaves_the_latents_alone(own):
    latents, whole = sample(own), sample(own, output_type="pt")
    own.vae.tile_latent_min_size, own.vae.tile_sample_min_size = 4, 16
    own.vae.enable_tiling()
    shapes = count_calls(own.vae.decoder)
    tiled = sample(own, output_type="pt")
    assert len(shapes) == 9  # 8 latents, in tiles of 4 that overlap by a quarter
    assert max(max(shape[2:]) for shape in shapes) == 4
    assert tiled.shape == whole.shape
    assert far(tiled, whole)
    assert torch.equal(sample(own), latents)
    own.vae.disable_tiling()
    assert torch.equal(sample(own, output_type="pt"), whole)


@pytest.mark.parametrize("flags", [True, False])
def test_safety_checker_on(own, flags):
    unchecked = own("a red apple", generator=torch.manual_seed(0), output_type="np")
    checked = RectifiedFlowPipeline.from_pipe(
        own, safety_checker=make_safety_checker(flags=flags), feature_extractor=make_feature_extractor()
    )
    result = checked("a red apple", generator=torch.manual_seed(0), output_type="np")
    assert result.nsfw_content_detected == [flags]
    assert (result.images == (0 if flags else unchecked.images)).all()
    assert unchecked.nsfw_content_detected is None


def test_safety_checker_of_a_checkpoint_can_be_left_out(tmp_path):
    parts = {"safety_checker": make_safety_checker(flags=True), "feature_extractor": make_feature_extractor()}
    components = {**make_components(), **parts, "requires_safety_checker": True}
    RectifiedFlowPipeline(**components, scheduler=None).save_pretrained(tmp_path)
    assert RectifiedFlowPipeline.from_pretrained(tmp_path)("a cat", output_type="np").images.max() == 0
    without = RectifiedFlowPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert without("a cat", output_type="np").images.max() > 0


# Offloading


def test_model_offloading_leaves_the_picture_alone(own):
    """With the CPU as the accelerator: each model has its hook, and the hooks let the next one push it out."""
    plain = sample(own, output_type="pt", guidance_scale=2.0)
    own.enable_model_cpu_offload(device="cpu")
    assert {name for name, part in own.components.items() if hasattr(part, "_hf_hook")} == {
        "text_encoder",
        "unet",
        "vae",
    }
    assert own.unet._hf_hook.prev_module_hook.model is own.text_encoder
    assert torch.equal(sample(own, output_type="pt", guidance_scale=2.0), plain)
    own.remove_all_hooks()
    assert torch.equal(sample(own, output_type="pt", guidance_scale=2.0), plain)


def test_sequential_offloading_is_set_up_and_taken_back(own):
    """accelerate cannot run it with the CPU as the accelerator: that the weights wait outside the models shows."""
    plain, weight = sample(own), own.unet.conv_in.weight.detach().clone()
    own.enable_sequential_cpu_offload(device="cpu")
    for part in (own.unet, own.text_encoder, own.vae):
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}
    assert torch.equal(own.unet.conv_in._hf_hook.weights_map["weight"], weight)
    own.remove_all_hooks()
    assert torch.equal(sample(own), plain)


def test_the_stock_pipeline_has_every_feature_with_our_scheduler(pipeline):
    """The effects above are the scheduler's, not the subclass': the stock pipeline gives the same pictures."""
    stock = StableDiffusionPipeline.from_pipe(pipeline)
    arguments = {"guidance_scale": 3.0, "guidance_rescale": 0.5, "negative_prompt": "a cat"}
    assert torch.equal(sample(stock, **arguments), sample(pipeline, **arguments))
