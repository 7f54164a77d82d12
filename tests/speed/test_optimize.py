"""`optimize` as a whole: lossless switches change no bit, restore brings every bit back, nothing stale is used."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowImg2ImgPipeline
from rectified_diffusers.speed.optimize import optimize
from rectified_diffusers.weights.components import swap_components
from tests.tiny import make_tiny_pipeline, make_tiny_xl_pipeline

OFF: dict[str, Any] = {
    "dtype": None,
    "channels_last": False,
    "blockwise_attention": False,
    "fold_upsampling": False,
    "pack_weights": False,
    "fuse_qkv": False,
    "compile": False,
    "cache_prompts": False,
    "cache_times": False,
    "keep_memory": False,
}
# Levels of 255. The tiny model's weights are random, its pictures full of contrast: rounding shows more than usual.
SWITCHES: dict[str, tuple[dict[str, Any], int]] = {
    "nothing": ({}, 0),
    "cache_prompts": ({"cache_prompts": True}, 0),
    "cache_times": ({"cache_times": True}, 0),
    "keep_memory": ({"keep_memory": True}, 0),
    "channels_last": ({"channels_last": True}, 1),
    "fold_upsampling": ({"fold_upsampling": True}, 1),
    "fuse_qkv": ({"fuse_qkv": True}, 1),
    "bfloat16": ({"dtype": torch.bfloat16, "blockwise_attention": True}, 12),
    "packed bfloat16": ({"dtype": torch.bfloat16, "pack_weights": True}, 12),
    "everything": (
        {name: True for name in OFF if name not in ("dtype", "compile")} | {"dtype": torch.bfloat16},
        12,
    ),
}


def draw(pipeline: Any, prompt: Any = "a red apple", **options: Any) -> np.ndarray:
    options = {"num_inference_steps": 2, "output_type": "pil", **options}
    pictures = pipeline(prompt, generator=torch.Generator().manual_seed(0), **options).images
    return np.stack([np.asarray(picture).astype(int) for picture in pictures])


def memory_of(pipeline: Any) -> dict[str, tuple[Any, ...]]:
    """Say where each tensor of the models is, of what kind, and what attributes their modules have."""
    found: dict[str, tuple[Any, ...]] = {}
    for name in ("unet", "vae", "text_encoder"):
        model = getattr(pipeline, name)
        for key, value in model.state_dict().items():
            found[f"{name}.{key}"] = (value.data_ptr(), value.dtype, value.stride(), value.clone().numpy().tobytes())
        for key, module in model.named_modules():
            names = sorted(set(vars(module)) - {"original_attn_processors", "_forward_hooks_always_called"})
            found[f"{name}.{key}:"] = (*names, len(module._forward_pre_hooks), len(module._forward_hooks))
    return found


@pytest.mark.parametrize(("switches", "allowed"), SWITCHES.values(), ids=SWITCHES)
def test_each_switch_changes_no_more_than_it_says_and_is_taken_back(switches, allowed):
    pipeline = make_tiny_pipeline()
    expected, before, names = draw(pipeline), memory_of(pipeline), set(vars(pipeline))
    with optimize(pipeline, **{**OFF, **switches}):
        for _ in range(2):  # the second time from the caches
            assert np.abs(draw(pipeline) - expected).max() <= allowed
    assert memory_of(pipeline) == before
    assert set(vars(pipeline)) == names
    np.testing.assert_array_equal(draw(pipeline), expected)


def test_lossless_changes_no_bit():
    pipeline = make_tiny_pipeline()
    asked = {"guidance_scale": 2.0, "negative_prompt": "a cat"}
    expected = draw(pipeline), draw(pipeline, **asked), draw(pipeline, clip_skip=1)
    with optimize(pipeline, lossless=True) as fast:
        assert fast.switches["dtype"] is None
        assert fast.switches["cache_prompts"]
        for _ in range(2):
            np.testing.assert_array_equal(draw(pipeline), expected[0])
            np.testing.assert_array_equal(draw(pipeline, **asked), expected[1])
            np.testing.assert_array_equal(draw(pipeline, clip_skip=1), expected[2])


def test_a_batch_of_prompts_is_the_same_pictures():
    pipeline = make_tiny_pipeline()
    with optimize(pipeline):
        noise = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))
        both = draw(pipeline, ["a fox", "an owl"], latents=noise)
        for i, prompt in enumerate(["a fox", "an owl"]):
            assert np.abs(both[i] - draw(pipeline, prompt, latents=noise[i : i + 1])[0]).max() <= 3  # rounding


def test_latents_stay_in_float32():
    pipeline = make_tiny_pipeline()
    with optimize(pipeline, dtype=torch.bfloat16):
        assert pipeline.unet.dtype == torch.bfloat16
        latents = pipeline("a fox", output_type="latent", generator=torch.manual_seed(0)).images
        assert latents.dtype == torch.float32
        assert (latents != latents.bfloat16().float()).any()


def test_other_pipelines_are_optimized_too():
    picture = torch.rand(1, 3, 32, 32)
    image = RectifiedFlowImg2ImgPipeline.from_pipe(make_tiny_pipeline())
    for pipeline, options in ((image, {"image": picture, "strength": 0.5}), (make_tiny_xl_pipeline(), {})):
        expected = draw(pipeline, **options)
        with optimize(pipeline, dtype=torch.bfloat16):
            found = draw(pipeline, **options)
            assert 0 < np.abs(found - expected).mean() < 3
        np.testing.assert_array_equal(draw(pipeline, **options), expected)


def make_tiny_decoder(**changes: Any) -> AutoencoderTiny:
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    layers = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    return AutoencoderTiny(**{**blocks, **layers, **changes}).eval()


def test_a_tiny_decoder_takes_the_place_of_the_vae(tmp_path):
    pipeline = make_tiny_pipeline()
    vae, tiny = pipeline.vae, make_tiny_decoder()
    tiny.save_pretrained(tmp_path)
    with optimize(pipeline, **{**OFF, "decoder": tmp_path}):
        plain = draw(pipeline)
    with optimize(pipeline, **{**OFF, "decoder": tiny, "fold_upsampling": True}):
        assert pipeline.vae is tiny
        assert np.abs(draw(pipeline) - plain).max() <= 1
    assert pipeline.vae is vae
    latents = pipeline("a red apple", generator=torch.manual_seed(0), num_inference_steps=2, output_type="latent")
    with torch.no_grad():
        by_hand = tiny.decode(latents.images).sample
    assert np.abs(np.asarray(pipeline.image_processor.postprocess(by_hand)[0]).astype(int) - plain[0]).max() <= 1


@pytest.mark.parametrize(
    ("decoder", "error", "message"),
    [
        (3, TypeError, "must be an AutoencoderTiny, its folder or its Hub id, got int"),
        ({"latent_channels": 16}, ValueError, "latents of 16 channels at 1/4 of the size, expected 4 at 1/4"),
    ],
)
def test_a_decoder_of_another_kind_is_refused(decoder, error, message):
    pipeline = make_tiny_pipeline()
    with pytest.raises(error, match=message):
        optimize(pipeline, decoder=make_tiny_decoder(**decoder) if isinstance(decoder, dict) else decoder)
    optimize(pipeline).restore()  # nothing was left behind


def test_what_cannot_be_optimized_is_refused():
    pipeline = make_tiny_pipeline()
    with optimize(pipeline), pytest.raises(ValueError, match="already optimized"):
        optimize(pipeline)
    with pytest.raises(TypeError, match="needs a diffusers pipeline with unet, vae, got int without unet, vae"):
        optimize(3)  # pyright: ignore[reportArgumentType]
    pipeline.unet._hf_hook = object()
    with pytest.raises(ValueError, match="CPU offload moves the weights of unet"):
        optimize(pipeline)


def test_a_model_exchanged_afterwards_is_refused(tmp_path):
    pipeline = make_tiny_pipeline()
    make_tiny_pipeline(seed=1).save_pretrained(tmp_path)
    with optimize(pipeline):
        swapped = swap_components(pipeline, tmp_path, ["text_encoder"])
        with pytest.raises(ValueError, match=r"text_encoder was exchanged after optimize. Call restore"):
            draw(pipeline)
        swapped.take_back()
        draw(pipeline)


def test_restore_twice_is_once():
    fast = optimize(make_tiny_pipeline())
    fast.restore()
    fast.restore()


def test_what_fails_half_way_leaves_the_pipeline_as_it_was(monkeypatch):
    pipeline = make_tiny_pipeline()
    expected, before, names = draw(pipeline), memory_of(pipeline), set(vars(pipeline))

    def fail(*given: Any) -> None:
        raise MemoryError("no room for the folded weights")

    monkeypatch.setattr("rectified_diffusers.speed.optimize.folded_upsampling", fail)
    with pytest.raises(MemoryError, match="no room for the folded weights"):
        optimize(pipeline, **{**OFF, "channels_last": True, "fold_upsampling": True})
    assert memory_of(pipeline) == before
    assert set(vars(pipeline)) == names
    with optimize(pipeline, **OFF):  # it is not taken for an optimized one
        assert np.array_equal(draw(pipeline), expected)
