"""The pipelines: equal to a hand-written loop, whatever the scheduler's origin, and loadable by diffusers itself."""

import inspect
import json
import logging
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

import rectified_diffusers
from rectified_diffusers import (
    RectifiedFlowEulerScheduler,
    RectifiedFlowImg2ImgPipeline,
    RectifiedFlowInpaintPipeline,
    RectifiedFlowPipeline,
)
from tests.marks import slow_but
from tests.tiny import make_components, make_tiny_pipeline, sample
from tests.tiny_inputs import settings

PROMPTS = ["a red apple", "a cat"]
STEPS = [1, 2, 3, 4, 7, 25]
DTYPES = [torch.float32, torch.bfloat16]

sd_pndm = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.fixture(scope="module")
def pipelines():
    """The flow pipeline in each dtype, built once."""
    return {dtype: make_tiny_pipeline("flow").to(dtype=dtype) for dtype in DTYPES}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder in the layout of the published InstaFlow checkpoints: their class name, a PNDM scheduler."""
    folder = tmp_path_factory.mktemp("published")
    make(StableDiffusionPipeline, PNDMScheduler(**sd_pndm)).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "RectifiedFlowPipeline"}))
    return folder


def make(pipeline_class: Any, scheduler: Any) -> Any:
    return pipeline_class(**make_components(), scheduler=scheduler)


@torch.no_grad()
def hand_written_loop(pipeline, prompts, steps, guidance, seed):
    """InstaFlow's sampler, written as its authors' loop is: dt = 1 / N, time (1 - i / N) * 1000, x = x + dt * v."""
    guided = guidance > 1
    text, null = pipeline.encode_prompt(prompts, "cpu", 1, guided)
    dtype = pipeline.unet.dtype
    x = torch.randn(len(prompts), 4, 8, 8, generator=torch.manual_seed(seed), dtype=dtype)
    dt = 1.0 / steps
    for timestep in [(1.0 - i / steps) * 1000.0 for i in range(steps)]:
        timestep = torch.tensor(timestep)
        if guided:
            v = pipeline.unet(torch.cat([x, x]), timestep, torch.cat([null, text])).sample
            v_null, v_text = v.chunk(2)
            v = v_null + guidance * (v_text - v_null)
        else:
            v = pipeline.unet(x, timestep, text).sample
        x = x + dt * v
    return x


# Equal to the loop


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("guidance", slow_but([1, 5], [1, 1.5, 5]))
@pytest.mark.parametrize("steps", slow_but([1, 2, 7], STEPS))
def test_equals_the_hand_written_loop_bit_for_bit(pipelines, steps, guidance, dtype):
    pipeline = pipelines[dtype]
    images = sample(pipeline, seed=steps, prompt=PROMPTS, num_inference_steps=steps, guidance_scale=guidance)
    expected = hand_written_loop(pipeline, PROMPTS, steps, guidance, seed=steps)
    assert images.dtype == dtype
    assert torch.equal(images, expected)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("guidance", [1, 5])
def test_the_stock_pipeline_with_our_scheduler_is_equal(pipelines, steps, guidance):
    ours = pipelines[torch.float32]
    stock = make(StableDiffusionPipeline, RectifiedFlowEulerScheduler())
    arguments = {"prompt": PROMPTS, "num_inference_steps": steps, "guidance_scale": guidance}
    assert torch.equal(sample(stock, **arguments), sample(ours, **arguments))


def test_repeated_runs_are_equal_and_the_prompt_matters(pipelines):
    pipeline = pipelines[torch.float32]
    first = sample(pipeline)
    assert not torch.equal(sample(pipeline, prompt="a cat"), first)
    assert torch.equal(sample(pipeline), first)


def test_latents_sigmas_and_timesteps_are_the_callers(pipelines):
    pipeline = pipelines[torch.float32]
    expected = sample(pipeline, num_inference_steps=4)
    latents = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    assert torch.equal(sample(pipeline, latents=latents, num_inference_steps=4), expected)
    by_sigmas = sample(pipeline, sigmas=[1.0, 0.75, 0.5, 0.25])
    by_timesteps = sample(pipeline, timesteps=[1000, 750, 500, 250])
    assert torch.equal(by_sigmas, expected)
    assert torch.equal(by_timesteps, expected)


def test_pictures_come_out(pipelines):
    images = sample(pipelines[torch.float32], prompt=PROMPTS, output_type="pil")
    assert [image.size for image in images] == [(32, 32)] * 2


# Defaults


def test_one_unguided_step_is_the_default(pipelines):
    pipeline = pipelines[torch.float32]
    images = pipeline("a red apple", generator=torch.manual_seed(0), output_type="latent").images
    assert torch.equal(images, sample(pipeline, num_inference_steps=1, guidance_scale=1.0))


def test_the_signature_is_diffusers_own_but_for_two_defaults():
    ours = inspect.signature(RectifiedFlowPipeline.__call__).parameters
    stock = inspect.signature(StableDiffusionPipeline.__call__).parameters
    changed = {name: ours[name].default for name in stock if ours[name] != stock[name]}
    assert list(ours) == list(stock)
    assert changed == {"num_inference_steps": 1, "guidance_scale": 1.0}


def test_arguments_by_position_and_misspelt_ones(pipelines):
    pipeline = pipelines[torch.float32]
    images = pipeline("a red apple", 32, 32, 2, output_type="latent", generator=torch.manual_seed(0)).images
    assert torch.equal(images, sample(pipeline))
    with pytest.raises(TypeError):
        pipeline("a red apple", 32, height=32)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (-2, ValueError), (1.5, TypeError)])
def test_invalid_number_of_steps(pipelines, steps, error):
    with pytest.raises(error, match="num_inference_steps must be"):
        sample(pipelines[torch.float32], num_inference_steps=steps)


# The scheduler's three ways into the pipeline


def test_no_scheduler_means_ours():
    pipeline = make(RectifiedFlowPipeline, None)
    assert isinstance(pipeline.scheduler, RectifiedFlowEulerScheduler)


@pytest.mark.parametrize("load", [DiffusionPipeline, RectifiedFlowPipeline, AutoPipelineForText2Image])
def test_the_published_layout_loads_and_its_scheduler_is_replaced(published, pipelines, load, caplog):
    with caplog.at_level(logging.INFO, logger="rectified_diffusers"):
        pipeline = load.from_pretrained(published)
    assert type(pipeline) is RectifiedFlowPipeline
    assert type(pipeline.scheduler) is RectifiedFlowEulerScheduler
    assert not any(key.startswith("beta") for key in pipeline.scheduler.config)
    messages = [record for record in caplog.records if record.name.startswith("rectified_diffusers")]
    assert [record.levelname for record in messages] == ["INFO"]
    assert "PNDMScheduler" in messages[0].getMessage()
    assert torch.equal(sample(pipeline), sample(pipelines[torch.float32]))


@pytest.mark.parametrize("load", [DiffusionPipeline, RectifiedFlowPipeline, AutoPipelineForText2Image])
def test_a_passed_scheduler_is_taken_or_refused(published, load):
    with pytest.raises(ValueError, match="needs a RectifiedFlowEulerScheduler, got DDIMScheduler"):
        load.from_pretrained(published, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False))
    ours = RectifiedFlowEulerScheduler(shift=2.0)
    assert load.from_pretrained(published, scheduler=ours).scheduler is ours


@pytest.mark.parametrize("theirs", [PNDMScheduler(**sd_pndm), FlowMatchEulerDiscreteScheduler()])
def test_a_foreign_scheduler_is_refused_by_the_constructor(theirs):
    with pytest.raises(ValueError, match=f"got {type(theirs).__name__}"):
        make(RectifiedFlowPipeline, theirs)


def test_a_foreign_scheduler_is_refused_on_assignment(pipelines):
    pipeline = pipelines[torch.float32]
    with pytest.raises(ValueError, match="got DDIMScheduler"):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert type(pipeline.scheduler) is RectifiedFlowEulerScheduler


def test_a_stored_flow_match_scheduler_is_not_replaced_in_silence(tmp_path, published):
    pipeline = DiffusionPipeline.from_pretrained(published)
    pipeline.save_pretrained(tmp_path)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="got FlowMatchEulerDiscreteScheduler"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_from_pipe_both_ways(pipelines, caplog):
    stock = make_tiny_pipeline("diffusion")
    with caplog.at_level(logging.INFO, logger="rectified_diffusers"):
        ours = RectifiedFlowPipeline.from_pipe(stock)
    assert "DDIMScheduler" in caplog.text
    assert type(ours.scheduler) is RectifiedFlowEulerScheduler
    assert isinstance(stock.scheduler, DDIMScheduler)
    assert torch.equal(sample(ours), sample(pipelines[torch.float32]))
    back = StableDiffusionPipeline.from_pipe(ours)
    assert back.scheduler is ours.scheduler
    assert torch.equal(sample(back, guidance_scale=1.0), sample(ours))
    assert settings(RectifiedFlowPipeline.from_pipe(ours).scheduler) == settings(ours.scheduler)


def test_from_pipe_with_a_passed_scheduler(pipelines):
    ours = RectifiedFlowEulerScheduler(shift=2.0)
    assert RectifiedFlowPipeline.from_pipe(pipelines[torch.float32], scheduler=ours).scheduler is ours
    with pytest.raises(ValueError, match="got DDIMScheduler"):
        RectifiedFlowPipeline.from_pipe(pipelines[torch.float32], scheduler=DDIMScheduler(steps_offset=1))


# Save and load


@pytest.mark.parametrize("load", [DiffusionPipeline, RectifiedFlowPipeline, AutoPipelineForText2Image])
def test_save_and_load_give_equal_pictures(tmp_path, load):
    pipeline = make_tiny_pipeline("flow")
    pipeline.scheduler = RectifiedFlowEulerScheduler(shift=2.0)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "RectifiedFlowPipeline"
    assert index["scheduler"] == ["rectified_diffusers", "RectifiedFlowEulerScheduler"]
    loaded = load.from_pretrained(tmp_path)
    assert type(loaded) is RectifiedFlowPipeline
    assert loaded.scheduler.config.shift == 2.0
    assert torch.equal(sample(loaded), sample(pipeline))


def test_a_checkpoint_of_the_stock_pipeline_with_our_scheduler(tmp_path, pipelines):
    make(StableDiffusionPipeline, RectifiedFlowEulerScheduler()).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is StableDiffusionPipeline
    assert torch.equal(sample(loaded, guidance_scale=1.0), sample(pipelines[torch.float32]))


def test_public_names_are_the_ones_diffusers_offers():
    assert rectified_diffusers.RectifiedFlowPipeline is RectifiedFlowPipeline
    assert diffusers.RectifiedFlowPipeline is RectifiedFlowPipeline  # pyright: ignore[reportAttributeAccessIssue]


# From an image


@torch.no_grad()
def hand_written_image_loop(pipeline, data, noise, steps, strength):
    text, _ = pipeline.encode_prompt("a red apple", "cpu", 1, False)
    x = (1 - strength) * data + strength * noise
    for i in range(steps):
        timestep = torch.tensor(1000 * strength * (1 - i / steps))
        x = x + pipeline.unet(x, timestep, text).sample * strength / steps
    return x


@pytest.mark.parametrize("strength", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_image_to_image_spends_every_step_after_its_strength(pipelines, steps, strength):
    pipeline = AutoPipelineForImage2Image.from_pipe(pipelines[torch.float32])
    assert type(pipeline) is RectifiedFlowImg2ImgPipeline
    data = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(1))
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    seen = []

    def record(pipeline, i, timestep, tensors):
        seen.append(float(timestep))
        return tensors

    arguments = {"strength": strength, "num_inference_steps": steps, "callback_on_step_end": record}
    images = sample(pipeline, image=data, **arguments)
    assert seen == pytest.approx([1000 * strength * (1 - i / steps) for i in range(steps)])
    torch.testing.assert_close(images, hand_written_image_loop(pipeline, data, noise, steps, strength))


def test_image_to_image_keeps_the_shape_of_the_callers_grid(pipelines):
    pipeline = RectifiedFlowImg2ImgPipeline.from_pipe(pipelines[torch.float32])
    data = torch.zeros(1, 4, 8, 8)
    sample(pipeline, image=data, strength=0.5, sigmas=[1.0, 0.9, 0.2])
    assert pipeline.scheduler.timesteps.tolist() == [500, 450, 100]


@pytest.mark.parametrize("strength", [0.01, 0.3, 1.0])
def test_inpainting_in_one_step_leaves_the_unmasked_part_alone(pipelines, strength):
    pipeline = AutoPipelineForInpainting.from_pipe(pipelines[torch.float32])
    assert type(pipeline) is RectifiedFlowInpaintPipeline
    data = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(1))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    picture = {"image": data, "mask_image": mask, "masked_image_latents": data, "height": 32, "width": 32}
    images = sample(pipeline, **picture, strength=strength, num_inference_steps=1)
    torch.testing.assert_close(images[..., :4], data[..., :4])
    assert not torch.allclose(images[..., 4:], data[..., 4:])


@pytest.mark.parametrize("strength", [0, 1.2])
def test_strength_out_of_range(pipelines, strength):
    pipeline = RectifiedFlowImg2ImgPipeline.from_pipe(pipelines[torch.float32])
    with pytest.raises(ValueError, match=r"in \(0, 1\], got"):
        pipeline.get_timesteps(2, strength, "cpu")
