"""Pipelines in the shape of Stable Diffusion XL: equal to a hand-written loop, split between two, in one step."""

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionXLPipeline,
)

from rectified_diffusers import (
    RectifiedFlowEulerScheduler,
    RectifiedFlowXLControlNetImg2ImgPipeline,
    RectifiedFlowXLControlNetInpaintPipeline,
    RectifiedFlowXLControlNetPipeline,
    RectifiedFlowXLImg2ImgPipeline,
    RectifiedFlowXLInpaintPipeline,
    RectifiedFlowXLPipeline,
)
from tests.tiny import make_tiny_controlnet, make_tiny_xl_pipeline, make_xl_components, sample

PROMPT = "a red apple"
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def plain():
    return make_tiny_xl_pipeline()


@pytest.fixture(scope="module")
def controlnet(plain):
    return make_tiny_controlnet(plain.unet)


@pytest.fixture(scope="module")
def control():
    return torch.rand(1, 3, 32, 32, generator=torch.manual_seed(5))


@pytest.fixture(scope="module")
def data():
    return torch.randn(1, 4, 8, 8, generator=torch.manual_seed(1))


@pytest.fixture(scope="module")
def masked():
    """A picture in [-1, 1] and a mask of its right half."""
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    return {"image": torch.rand(1, 3, 32, 32, generator=torch.manual_seed(6)) * 2 - 1, "mask_image": mask}


@torch.no_grad()
def predict(pipeline, x, timestep, guidance=1.0, control=None):
    guided = guidance > 1
    encoded = pipeline.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=guided)
    text, null, pooled, null_pooled = encoded
    if guided:
        x, text, pooled = torch.cat([x, x]), torch.cat([null, text]), torch.cat([null_pooled, pooled])
    time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(len(x), 1)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    residuals = {}
    if control is not None:
        control = torch.cat([control] * len(x))
        arguments = {"added_cond_kwargs": added, "return_dict": False}
        downs, middle = pipeline.controlnet(x, timestep, text, control, **arguments)
        residuals = {"down_block_additional_residuals": downs, "mid_block_additional_residual": middle}
    v = pipeline.unet(x, timestep, text, added_cond_kwargs=added, **residuals).sample
    if guided:
        v_null, v_text = v.chunk(2)
        v = v_null + guidance * (v_text - v_null)
    return v


def hand_written_loop(pipeline, steps, guidance=1.0, control=None, data=0.0, strength=1.0):
    """x += strength / N * v from t = 1 - strength, the noise end of the path being `data` of that strength."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    x = (1 - strength) * data + strength * noise
    for i in range(steps):
        timestep = torch.tensor(1000 * strength * (1 - i / steps))
        x = x + strength / steps * predict(pipeline, x, timestep, guidance, control)
    return x


@pytest.mark.parametrize("guidance", [1, 1.5])
@pytest.mark.parametrize("steps", [1, 3])
def test_text_to_image_equals_the_hand_written_loop_bit_for_bit(plain, steps, guidance):
    images = sample(plain, num_inference_steps=steps, guidance_scale=guidance)
    assert torch.equal(images, hand_written_loop(plain, steps, guidance))


@pytest.mark.parametrize("guidance", [1, 1.5])
@pytest.mark.parametrize("steps", [1, 3])
def test_controlnet_equals_the_hand_written_loop_bit_for_bit(plain, controlnet, control, steps, guidance):
    pipeline = RectifiedFlowXLControlNetPipeline.from_pipe(plain, controlnet=controlnet)
    images = sample(pipeline, image=control, num_inference_steps=steps, guidance_scale=guidance)
    assert torch.equal(images, hand_written_loop(pipeline, steps, guidance, control))
    assert not torch.allclose(images, sample(plain, num_inference_steps=steps, guidance_scale=guidance), atol=1e-3)


def test_one_unguided_step_is_the_default(plain):
    images = plain(PROMPT, generator=torch.manual_seed(0), output_type="latent").images
    assert torch.equal(images, hand_written_loop(plain, 1))


def test_clip_skip_and_the_second_prompt_matter(plain):
    images = sample(plain)
    assert not torch.equal(sample(plain, clip_skip=1), images)
    assert not torch.equal(sample(plain, prompt_2="a cat"), images)


def test_pictures_come_out(plain):
    (image,) = sample(plain, output_type="pil")
    assert image.size == (32, 32)


# From an image


@pytest.mark.parametrize("strength", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_image_to_image_equals_the_hand_written_loop(plain, data, steps, strength):
    pipeline = AutoPipelineForImage2Image.from_pipe(plain)
    assert type(pipeline) is RectifiedFlowXLImg2ImgPipeline
    images = sample(pipeline, image=data, strength=strength, num_inference_steps=steps)
    expected = hand_written_loop(pipeline, steps, data=data, strength=strength)
    # timesteps are float32, so that 1 - strength differs in the last bit
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize("strength", [0.01, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_image_to_image_under_a_controlnet(plain, controlnet, control, data, steps, strength):
    pipeline = AutoPipelineForImage2Image.from_pipe(plain, controlnet=controlnet)
    assert type(pipeline) is RectifiedFlowXLControlNetImg2ImgPipeline
    arguments = {"strength": strength, "num_inference_steps": steps, "controlnet_conditioning_scale": 1.0}
    images = sample(pipeline, image=data, control_image=control, **arguments)
    expected = hand_written_loop(pipeline, steps, control=control, data=data, strength=strength)
    torch.testing.assert_close(images, expected)  # rounding, as above


@pytest.mark.parametrize("strength", [0.01, 0.9999, 1.0])
@pytest.mark.parametrize("controlled", [False, True])
def test_inpainting_in_one_step_leaves_the_unmasked_part_alone(
    plain, controlnet, control, masked, controlled, strength
):
    extra = {"controlnet": controlnet} if controlled else {}
    pipeline = AutoPipelineForInpainting.from_pipe(plain, **extra)
    expected = RectifiedFlowXLControlNetInpaintPipeline if controlled else RectifiedFlowXLInpaintPipeline
    assert type(pipeline) is expected
    arguments = {**masked, **SIZE, "strength": strength, "num_inference_steps": 1}
    if controlled:
        arguments["control_image"] = control
    images = sample(pipeline, **arguments)
    with torch.no_grad():
        encoded = pipeline.vae.encode(masked["image"]).latent_dist.sample(torch.manual_seed(0))
    assert torch.equal(images[..., :4], (encoded * pipeline.vae.config.scaling_factor)[..., :4])
    other = sample(pipeline, **arguments, prompt_2="a cat")
    assert torch.equal(other[..., :4], images[..., :4])
    assert not torch.allclose(other[..., 4:], images[..., 4:], atol=1e-6)


# One grid, walked by two pipelines


@pytest.mark.parametrize(("steps", "split"), [(3, 0.5), (4, 0.3), (25, 0.8)])
def test_two_pipelines_share_a_grid_bit_for_bit(plain, steps, split):
    refiner = RectifiedFlowXLImg2ImgPipeline.from_pipe(plain)
    latents = sample(plain, num_inference_steps=steps, denoising_end=split)
    images = sample(refiner, image=latents, num_inference_steps=steps, denoising_start=split, seed=9)
    assert not torch.equal(latents, images)
    assert torch.equal(images, sample(plain, num_inference_steps=steps))


@pytest.mark.parametrize("controlled", [False, True])
def test_inpainting_takes_over_too(plain, controlnet, control, masked, controlled):
    extra = {"controlnet": controlnet} if controlled else {}
    pipeline = AutoPipelineForInpainting.from_pipe(plain, **extra)
    seen = []

    def record(pipeline, i, timestep, tensors):
        seen.append(float(timestep))
        return tensors

    arguments = {**masked, **SIZE, "callback_on_step_end": record, "num_inference_steps": 4}
    if controlled:
        arguments["control_image"] = control
    sample(pipeline, **arguments, denoising_start=0.5)
    sample(pipeline, **arguments, strength=1.0, denoising_end=0.5)
    assert seen == [250, 1000, 750, 500]  # the step that begins at the cut belongs to the first pipeline


@pytest.mark.parametrize("pipeline_class", [RectifiedFlowXLImg2ImgPipeline, RectifiedFlowXLInpaintPipeline])
def test_no_step_left_to_take_over(plain, pipeline_class, masked):
    pipeline = pipeline_class.from_pipe(plain)
    arguments = masked if pipeline_class is RectifiedFlowXLInpaintPipeline else {"image": masked["image"]}
    with pytest.raises(
        ValueError,
        match=r"denoising_start=0.5 leaves none of num_inference_steps=1\. Pass more steps",
    ):
        sample(pipeline, **arguments, num_inference_steps=1, denoising_start=0.5)


@pytest.mark.parametrize("strength", [0, 1.2])
def test_strength_out_of_range(plain, strength):
    with pytest.raises(ValueError, match=r"in \(0, 1\], got"):
        RectifiedFlowXLImg2ImgPipeline.from_pipe(plain).get_timesteps(2, strength, "cpu")


# Made, saved, loaded


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    plain.save_pretrained(folder)
    return folder


TASKS = [
    (AutoPipelineForText2Image, RectifiedFlowXLPipeline, RectifiedFlowXLControlNetPipeline),
    (AutoPipelineForImage2Image, RectifiedFlowXLImg2ImgPipeline, RectifiedFlowXLControlNetImg2ImgPipeline),
    (AutoPipelineForInpainting, RectifiedFlowXLInpaintPipeline, RectifiedFlowXLControlNetInpaintPipeline),
]


@pytest.mark.parametrize(("task", "without", "with_control"), TASKS, ids=lambda argument: argument.__name__)
def test_auto_pipelines_know_the_family(folder, plain, controlnet, task, without, with_control):
    assert type(task.from_pretrained(folder)) is without
    assert type(task.from_pretrained(folder, controlnet=controlnet)) is with_control
    controlled = task.from_pipe(plain, controlnet=controlnet)
    assert type(controlled) is with_control
    assert controlled.controlnet is controlnet
    assert type(controlled.scheduler) is RectifiedFlowEulerScheduler
    assert type(task.from_pipe(controlled, controlnet=None)) is without
    assert type(AutoPipelineForText2Image.from_pipe(controlled)) is RectifiedFlowXLControlNetPipeline


def test_save_and_load_give_equal_pictures(folder, plain):
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert type(loaded) is RectifiedFlowXLPipeline
    # Weights that are mapped from a file lie at odd addresses, where convolutions may round the last bit differently.
    torch.testing.assert_close(sample(loaded), sample(plain))


def test_a_stock_pipelines_scheduler_is_replaced_or_refused(plain):
    components = {**make_xl_components(), "scheduler": DDIMScheduler(steps_offset=1), "add_watermarker": False}
    ours = RectifiedFlowXLPipeline.from_pipe(StableDiffusionXLPipeline(**components))
    assert torch.equal(sample(ours), sample(plain))
    with pytest.raises(ValueError, match="got DDIMScheduler"):
        RectifiedFlowXLPipeline(**components)
