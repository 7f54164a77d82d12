"""ControlNet pipelines: equal to a hand-written loop of the authors' form, in one step, for one and for several."""

from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

from rectified_diffusers import (
    RectifiedFlowControlNetImg2ImgPipeline,
    RectifiedFlowControlNetInpaintPipeline,
    RectifiedFlowControlNetPipeline,
    RectifiedFlowEulerScheduler,
    RectifiedFlowImg2ImgPipeline,
    RectifiedFlowInpaintPipeline,
    RectifiedFlowPipeline,
)
from tests.tiny import make_components, make_tiny_controlnet, make_tiny_pipeline, sample

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def plain():
    return make_tiny_pipeline("flow")


@pytest.fixture(scope="module")
def controlnets(plain):
    return [make_tiny_controlnet(plain.unet, seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def pipeline(plain, controlnets):
    return RectifiedFlowControlNetPipeline.from_pipe(plain, controlnet=controlnets[0])


@pytest.fixture(scope="module")
def pair(plain, controlnets):
    return RectifiedFlowControlNetPipeline.from_pipe(plain, controlnet=MultiControlNetModel(controlnets))


@pytest.fixture(scope="module")
def controls():
    """Two conditioning pictures in [0, 1]."""
    return list(torch.rand(2, 1, 3, 32, 32, generator=torch.manual_seed(5)))


@pytest.fixture(scope="module")
def data():
    return torch.randn(1, 4, 8, 8, generator=torch.manual_seed(1))


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.manual_seed(seed))


@torch.no_grad()
def predict(pipeline, x, timestep, controls, scales, guidance=1.0):
    """Velocity under ControlNets: their residuals are summed and added to those of the U-Net's way down and middle."""
    guided = guidance > 1
    text, null = pipeline.encode_prompt(PROMPT, "cpu", 1, guided)
    if guided:
        x, text = torch.cat([x, x]), torch.cat([null, text])
    nets = pipeline.controlnet.nets if hasattr(pipeline.controlnet, "nets") else [pipeline.controlnet]
    downs, middle = None, None
    for net, control, scale in zip(nets, controls, scales, strict=True):
        control = torch.cat([control] * len(x))
        down, mid = net(x, timestep, text, control, conditioning_scale=scale, return_dict=False)
        downs = down if downs is None else [a + b for a, b in zip(downs, down, strict=True)]
        middle = mid if middle is None else middle + mid
    residuals = {"down_block_additional_residuals": downs, "mid_block_additional_residual": middle}
    v = pipeline.unet(x, timestep, text, **residuals).sample
    if guided:
        v_null, v_text = v.chunk(2)
        v = v_null + guidance * (v_text - v_null)
    return v


def hand_written_loop(pipeline, controls, steps, scales, guidance=1.0):
    """The authors' loop: x += dt * v, the same timestep for the ControlNets and the U-Net."""
    x = noise()
    for i in range(steps):
        x = x + 1.0 / steps * predict(pipeline, x, torch.tensor(1000 * (1 - i / steps)), controls, scales, guidance)
    return x


# Equal to the loop


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("guidance", [1, 1.5])
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_the_hand_written_loop_bit_for_bit(pipeline, controls, steps, guidance, scale):
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance}
    images = sample(pipeline, image=controls[0], controlnet_conditioning_scale=scale, **arguments)
    assert torch.equal(images, hand_written_loop(pipeline, controls[:1], steps, [scale], guidance))


def test_several_equal_the_hand_written_loop_bit_for_bit(pair, controls):
    images = sample(pair, image=controls, controlnet_conditioning_scale=[0.5, 2.0], guidance_scale=1.5)
    assert torch.equal(images, hand_written_loop(pair, controls, 2, [0.5, 2.0], guidance=1.5))


def test_the_picture_steers_and_scale_zero_does_not(pipeline, plain, controls):
    first, second = (sample(pipeline, image=control) for control in controls)
    assert not torch.allclose(first, second, atol=1e-3)
    off = sample(pipeline, image=controls[0], controlnet_conditioning_scale=0.0)
    torch.testing.assert_close(off, sample(plain))


def test_one_unguided_step_is_the_default(pipeline, controls):
    images = pipeline(PROMPT, controls[0], generator=torch.manual_seed(0), output_type="latent").images
    assert torch.equal(images, sample(pipeline, image=controls[0], num_inference_steps=1, guidance_scale=1.0))


def test_guess_mode_weighs_the_residuals_and_controls_the_guided_half_alone(pipeline, controls):
    """diffusers' guess mode: scales from 0.1 at the finest residual to 1, and no control of the null prompt."""
    guidance, x, timestep = 1.5, noise(), torch.tensor(1000.0)
    images = sample(pipeline, image=controls[0], guess_mode=True, guidance_scale=guidance, num_inference_steps=1)
    text, null = pipeline.encode_prompt(PROMPT, "cpu", 1, True)
    with torch.no_grad():
        downs, middle = pipeline.controlnet(x, timestep, text, controls[0], return_dict=False)
        scales = torch.logspace(-1, 0, len(downs) + 1)
        downs = [torch.cat([0 * down, scale * down]) for down, scale in zip(downs, scales[:-1], strict=True)]
        residuals = {
            "down_block_additional_residuals": downs,
            "mid_block_additional_residual": torch.cat([0 * middle, scales[-1] * middle]),
        }
        v = pipeline.unet(torch.cat([x, x]), timestep, torch.cat([null, text]), **residuals).sample
    v_null, v_text = v.chunk(2)
    assert torch.equal(images, x + (v_null + guidance * (v_text - v_null)))


@pytest.mark.parametrize(("window", "scales"), [((0.0, 0.5), (1, 0)), ((0.5, 1.0), (0, 1)), ((0.0, 1.0), (1, 1))])
def test_control_acts_between_its_start_and_end(pipeline, controls, window, scales):
    start, end = window
    images = sample(pipeline, image=controls[0], control_guidance_start=start, control_guidance_end=end)
    x = noise()
    for timestep, scale in zip((1000.0, 500.0), scales, strict=True):
        x = x + predict(pipeline, x, torch.tensor(timestep), controls[:1], [float(scale)]) / 2
    assert torch.equal(images, x)


def test_in_one_step_a_narrower_window_leaves_the_control_out(pipeline, plain, controls):
    """diffusers' rule, a trap for one-step models: the step must lie wholly within the window."""
    images = sample(pipeline, image=controls[0], num_inference_steps=1, control_guidance_end=0.9)
    torch.testing.assert_close(images, sample(plain, num_inference_steps=1))


def test_several_have_a_window_each(pair, controls):
    windows = {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]}
    images = sample(pair, image=controls, **windows)
    x = noise()
    for timestep, scales in ((1000.0, [1.0, 0.0]), (500.0, [0.0, 1.0])):
        x = x + predict(pair, x, torch.tensor(timestep), controls, scales) / 2
    assert torch.equal(images, x)


def test_pictures_come_out_for_pil_controls(pipeline, controls):
    (control,) = pipeline.image_processor.postprocess(controls[0], output_type="pil", do_denormalize=[False])
    (image,) = sample(pipeline, image=control, output_type="pil")
    assert image.size == (32, 32)


def test_clip_skip(pipeline, controls):
    assert not torch.equal(sample(pipeline, image=controls[0], clip_skip=1), sample(pipeline, image=controls[0]))


# From an image


@pytest.mark.parametrize("strength", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_image_to_image_equals_the_hand_written_loop(plain, controlnets, controls, data, steps, strength):
    pipeline = AutoPipelineForImage2Image.from_pipe(plain, controlnet=controlnets[0])
    assert type(pipeline) is RectifiedFlowControlNetImg2ImgPipeline
    arguments = {"strength": strength, "num_inference_steps": steps, "controlnet_conditioning_scale": 0.7}
    images = sample(pipeline, image=data, control_image=controls[0], **arguments)
    x = (1 - strength) * data + strength * noise()
    for i in range(steps):
        timestep = torch.tensor(1000 * strength * (1 - i / steps))
        x = x + predict(pipeline, x, timestep, controls[:1], [0.7]) * strength / steps
    # The grid is rounded to float32 once and the factor strength / N is applied as one division: last bits differ.
    torch.testing.assert_close(images, x)


@pytest.fixture(scope="module")
def picture():
    """A picture in [-1, 1] and a mask of its right half."""
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    return {"image": torch.rand(1, 3, 32, 32, generator=torch.manual_seed(6)) * 2 - 1, "mask_image": mask}


@pytest.mark.parametrize("strength", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_inpainting_equals_the_hand_written_loop(plain, controlnets, controls, picture, steps, strength):
    pipeline = AutoPipelineForInpainting.from_pipe(plain, controlnet=controlnets[0])
    assert type(pipeline) is RectifiedFlowControlNetInpaintPipeline
    arguments = {**picture, "height": 32, "width": 32, "controlnet_conditioning_scale": 1.0}
    arguments |= {"strength": strength, "num_inference_steps": steps}
    images = sample(pipeline, control_image=controls[0], **arguments)
    generator = torch.manual_seed(0)
    with torch.no_grad():
        encoded = pipeline.vae.encode(picture["image"]).latent_dist.sample(generator)
    data = encoded * pipeline.vae.config.scaling_factor
    start = torch.randn(data.shape, generator=generator)
    mask = picture["mask_image"][..., ::4, ::4]
    x = (1 - strength) * data + strength * start
    for i in range(steps):
        now, after = (strength * (1 - k / steps) for k in (i, i + 1))
        x = x + predict(pipeline, x, torch.tensor(1000 * now), controls[:1], [1.0]) * strength / steps
        x = mask * x + (1 - mask) * ((1 - after) * data + after * start)
    torch.testing.assert_close(images, x)  # rounding, as for image to image
    assert torch.equal(images[..., :4], data[..., :4])


@pytest.mark.parametrize("pipeline_class", [RectifiedFlowControlNetImg2ImgPipeline, RectifiedFlowImg2ImgPipeline])
def test_strength_out_of_range(plain, controlnets, pipeline_class):
    extra: Any = {"controlnet": controlnets[0]} if "ControlNet" in pipeline_class.__name__ else {}
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 0"):
        pipeline_class.from_pipe(plain, **extra).get_timesteps(2, 0, "cpu")


# Made, saved, loaded


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    plain.save_pretrained(folder)
    return folder


TASKS = [
    (AutoPipelineForText2Image, RectifiedFlowPipeline, RectifiedFlowControlNetPipeline),
    (AutoPipelineForImage2Image, RectifiedFlowImg2ImgPipeline, RectifiedFlowControlNetImg2ImgPipeline),
    (AutoPipelineForInpainting, RectifiedFlowInpaintPipeline, RectifiedFlowControlNetInpaintPipeline),
]


@pytest.mark.parametrize(("task", "without", "with_control"), TASKS, ids=lambda argument: argument.__name__)
def test_auto_pipelines_know_the_family(folder, plain, controlnets, task, without, with_control):
    assert type(task.from_pretrained(folder)) is without
    loaded = task.from_pretrained(folder, controlnet=controlnets[0])
    assert type(loaded) is with_control
    assert loaded.controlnet is controlnets[0]
    controlled = task.from_pipe(plain, controlnet=controlnets[0])
    assert type(controlled) is with_control
    assert type(controlled.scheduler) is RectifiedFlowEulerScheduler
    assert type(task.from_pipe(controlled)) is with_control
    assert type(task.from_pipe(controlled, controlnet=None)) is without


@pytest.mark.parametrize("task", [AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_auto_pipelines_go_from_task_to_task(pipeline, task):
    other = task.from_pipe(pipeline)
    assert other.controlnet is pipeline.controlnet
    assert type(AutoPipelineForText2Image.from_pipe(other)) is RectifiedFlowControlNetPipeline


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_save_and_load_give_equal_pictures(tmp_path, pipeline, pair, controls, several):
    saved, control = (pair, controls) if several else (pipeline, controls[0])
    saved.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is RectifiedFlowControlNetPipeline
    assert type(loaded.controlnet) is (MultiControlNetModel if several else ControlNetModel)
    weights, loaded_weights = saved.controlnet.state_dict(), loaded.controlnet.state_dict()
    assert all(torch.equal(loaded_weights[name], weights[name]) for name in weights)
    # Weights that are mapped from a file lie at odd addresses, where convolutions may round the last bit differently.
    torch.testing.assert_close(sample(loaded, image=control), sample(saved, image=control))


def test_a_stock_pipelines_scheduler_is_replaced_or_refused(controlnets, pipeline, controls):
    components = {**make_components(), "controlnet": controlnets[0], "scheduler": DDIMScheduler(steps_offset=1)}
    ours = RectifiedFlowControlNetPipeline.from_pipe(StableDiffusionControlNetPipeline(**components))
    assert torch.equal(sample(ours, image=controls[0]), sample(pipeline, image=controls[0]))
    with pytest.raises(ValueError, match="got DDIMScheduler"):
        RectifiedFlowControlNetPipeline(**components)
