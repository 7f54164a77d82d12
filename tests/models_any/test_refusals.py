"""A pipeline of unknown make works; one that does not fit is refused with the reason, before it is used."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.calibration import PROMPTS
from rectified_diffusers.models.self_test import self_test
from tests.models_any.families import build
from tests.models_any.made_up import NoisyScheduler, make_made_up_pipeline
from tests.tiny import make_components, make_diffusion_scheduler, make_tiny_pipeline


def test_a_pipeline_of_unknown_make_works() -> None:
    pipeline = make_made_up_pipeline()
    denoiser = PipelineDenoiser(pipeline)
    result = self_test(denoiser)
    assert (result.noise_exact, result.decoding_exact, result.batched) == (True, True, True)
    assert result.euler is not None
    assert result.euler <= 1e-5
    form, time = denoiser.calibration.sample, denoiser.calibration.time
    assert (denoiser.component, form.name, form.form, time.name) == ("predictor", "canvases", "rows", "clock")
    assert (time.slope, time.offset, denoiser.calibration.answer.factor) == (-1e-3, 1.0, -1.0)
    assert (denoiser.direction, denoiser.guidance_found.kind) == ("noise", "none")
    x, t = torch.randn(2, *denoiser.latent_shape), torch.tensor([0.25, 0.5])
    with torch.no_grad():
        velocity = denoiser.velocity(denoiser.network, x, t, denoiser.encode(PROMPTS, "cpu"))
        expected = pipeline.predictor(list(x), t, pipeline.encode_prompt(PROMPTS))
    torch.testing.assert_close(velocity, torch.stack(expected))


def wan_of_two_networks() -> Any:
    pipeline, options = build("wan")
    import copy

    two = diffusers.WanPipeline(
        **{**pipeline.components, "transformer_2": copy.deepcopy(pipeline.transformer)}, boundary_ratio=0.9
    )
    return two, options


def unconditional() -> Any:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    return diffusers.DDPMPipeline(unet.eval(), diffusers.DDPMScheduler()), {}


def image_to_image() -> Any:
    parts = make_components()
    return diffusers.StableDiffusionImg2ImgPipeline(**parts, scheduler=make_diffusion_scheduler()), {}


def in_training() -> Any:
    pipeline = make_tiny_pipeline("sd3")
    pipeline.transformer.train()
    return pipeline, {}


def noisy() -> Any:
    pipeline = make_made_up_pipeline()
    pipeline.scheduler = NoisyScheduler()
    return pipeline, {}


def random_flow() -> Any:
    pipeline = make_tiny_pipeline("sd3")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    return pipeline, {}


def unknown_option() -> Any:
    return make_tiny_pipeline("sd3"), {"num_frames": 5}


def faulty(fault: str) -> Any:
    return lambda: (make_made_up_pipeline(fault), {})


REFUSALS = {
    "object": (lambda: (object(), {}), "has no scheduler"),
    "unconditional": (unconditional, "takes no prompt"),
    "image_to_image": (image_to_image, "its call with nothing but a prompt fails with"),
    "training": (in_training, "is in training mode"),
    "two_networks": (wan_of_two_networks, "it has several networks: transformer, transformer_2"),
    "random_flow": (random_flow, "FlowMatchEulerDiscreteScheduler adds noise"),
    "noisy": (noisy, "NoisyScheduler adds noise"),
    "option": (unknown_option, "has no argument num_frames"),
    "prompt": (faulty("prompt"), "does not depend on the prompt"),
    "time": (faulty("time"), "no argument of the network follows the scheduler's timestep"),
    "scaled": (faulty("scaled"), "the scheduler's sample times a factor of the step"),
    "hidden": (faulty("hidden"), "no argument of the network is the scheduler's sample"),
    "varying": (faulty("varying"), "argument hint changes from step to step"),
    "rows": (faulty("rows"), "guidance cannot be turned off: 1 evaluations of 2 rows in a step"),
    "data": (faulty("data"), "not a multiple of the network's answer"),
    "noise": (faulty("noise"), "noise cannot be set"),
    "spread": (faulty("spread"), "not what prepare_latents returns, so noise cannot be set"),
    "nan": (faulty("nan"), "its latents are not finite in torch.float32"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_unsuitable_pipeline_is_refused_with_the_reason(name: str) -> None:
    make, reason = REFUSALS[name]
    pipeline, options = make()
    with pytest.raises(UnsupportedPipelineError) as refused:
        self_test(PipelineDenoiser(pipeline, options=options))
    message = str(refused.value)
    assert reason in message
    assert "\n" not in message
