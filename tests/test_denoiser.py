"""One adapter per family: what it tells a network is what the family's own pipeline tells it."""

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from rectified_diffusers.flow.ode import euler
from rectified_diffusers.models.denoiser import Denoiser, is_diffusion
from rectified_diffusers.models.guidance import guided
from rectified_diffusers.models.latents import latent_channels, latent_shape, pack, unpack
from rectified_diffusers.models.stacked_unet import StackedUNet
from rectified_diffusers.models.velocity import PipelineVelocity
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
from tests.marks import slow_but
from tests.tiny import make_tiny_pipeline

PROMPTS = ["a red apple", "two dogs"]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", slow_but(["xl_flow", "sd3"], ["xl_flow", "sd3", "flux", "flux_schnell"]))
def test_euler_on_the_velocity_is_what_the_pipeline_does(kind: Any, guidance_scale: float) -> None:
    pipeline = make_tiny_pipeline(kind)
    if kind != "xl_flow":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    noise = torch.randn(2, 4, 8, 16)
    velocity = PipelineVelocity.bind(Denoiser.of(pipeline, guidance_scale, {"height": 32, "width": 64}), PROMPTS)
    scale: dict[str, Any] = {"guidance_scale": guidance_scale}
    if kind == "flux_schnell":  # its network takes no guidance, so that two passes remain
        scale = {"true_cfg_scale": guidance_scale, "negative_prompt": ""}
    start = pack(noise) if kind.startswith("flux") else noise
    with torch.no_grad():
        ours = euler(velocity, velocity.state_at_start(start), 4, velocity.start)
    theirs = pipeline(
        PROMPTS,
        latents=pack(noise) if kind.startswith("flux") else noise,
        sigmas=[1.0, 0.75, 0.5, 0.25],
        num_inference_steps=4,
        **scale,
        height=32,
        width=64,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_the_sign_of_a_flow_that_is_not_ours_is_turned(kind: Any) -> None:
    denoiser = Denoiser.of(make_tiny_pipeline(kind))
    x, t = torch.randn(2, *denoiser.latent_shape), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        told = denoiser.encode(PROMPTS, "cpu")
        answer = denoiser.predict(denoiser.network, x, 1000 * (1 - t), told)
        torch.testing.assert_close(denoiser.velocity(denoiser.network, x, t, told), -answer)
    assert denoiser.diffusion() is None


def test_the_sign_of_an_exported_flow_is_turned() -> None:
    """DPM-Solver++ with flow sigmas, as `export_diffusers` leaves it, serves networks of noise - data."""
    pipeline = make_tiny_pipeline("diffusion")
    assert Denoiser.of(pipeline).direction == "data"
    pipeline.scheduler = DPMSolverMultistepScheduler(500, use_flow_sigmas=True, prediction_type="flow_prediction")
    assert Denoiser.of(pipeline).direction == "noise"
    assert Denoiser.of(pipeline).num_train_timesteps == 500
    assert Denoiser.of(pipeline).diffusion() is None


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (DDIMScheduler(prediction_type="v_prediction"), True),
        (UniPCMultistepScheduler(), True),
        (UniPCMultistepScheduler(use_flow_sigmas=True), False),
        (UniPCMultistepScheduler(prediction_type="flow_prediction"), False),
        (FlowMatchEulerDiscreteScheduler(), False),
        (RectifiedFlowEulerScheduler(), False),
        (object(), False),
    ],
    ids=lambda value: value if isinstance(value, bool) else type(value).__name__,
)
def test_the_scheduler_says_whether_a_model_is_a_diffusion(scheduler: Any, expected: bool) -> None:
    assert is_diffusion(scheduler) is expected


@pytest.mark.parametrize("rows", [1, 2])
def test_guidance_is_two_passes_put_together(rows: int) -> None:
    denoiser = Denoiser.of(make_tiny_pipeline("flow"), 3.0)
    velocity = partial(denoiser.velocity, denoiser.network)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        told, null = denoiser.encode(PROMPTS, "cpu"), denoiser.encode([""] * rows, "cpu")
        text, empty = velocity(x, t, told), velocity(x, t, denoiser.encode(["", ""], "cpu"))
        found = guided(velocity, x, t, told, null, 3.0)
        assert torch.equal(guided(velocity, x, t, told, None, 3.0), text)
    torch.testing.assert_close(found, 3 * text - 2 * empty)


def test_guidance_above_1_needs_a_second_pass_except_of_flux() -> None:
    found = {(kind, w): Denoiser.of(make_tiny_pipeline(kind), w).two_passes for kind in ("xl", "flux") for w in (1, 3)}
    assert found == {("xl", 1): False, ("xl", 3): True, ("flux", 1): False, ("flux", 3): False}


def test_our_scheduler_says_sign_and_time() -> None:
    pipeline = make_tiny_pipeline("flow")
    pipeline.scheduler = RectifiedFlowEulerScheduler(500, velocity_direction="noise")
    denoiser = Denoiser.of(pipeline)
    assert (denoiser.direction, denoiser.num_train_timesteps) == ("noise", 500)


def test_a_stacked_unet_is_asked_like_a_plain_one() -> None:
    pipeline = make_tiny_pipeline("flow")
    pipeline.unet = StackedUNet.from_unet(pipeline.unet)
    velocity = PipelineVelocity.of(pipeline, PROMPTS)
    with torch.no_grad():
        assert velocity(torch.randn(2, 4, 8, 8), torch.tensor([0.0, 0.5])).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("force_zeros", [True, False])
def test_the_empty_prompt_is_what_guidance_steers_away_from(force_zeros: bool) -> None:
    pipeline = make_tiny_pipeline("xl")
    pipeline.register_to_config(force_zeros_for_empty_prompt=force_zeros)
    found: Any = Denoiser.of(pipeline).encode(["a cat", ""], "cpu")
    text, null, pooled, null_pooled = pipeline.encode_prompt("a cat", device="cpu", num_images_per_prompt=1)
    torch.testing.assert_close(found["encoder_hidden_states"], torch.cat([text, null]))
    torch.testing.assert_close(found["text_embeds"], torch.cat([pooled, null_pooled]))


@given(height=st.integers(1, 5), width=st.integers(1, 5), channels=st.integers(1, 3))
def test_packing_is_that_of_flux_and_its_own_inverse(height: int, width: int, channels: int) -> None:
    latents = torch.randn(2, channels, 2 * height, 2 * width)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, channels, 2 * height, 2 * width))
    assert torch.equal(unpack(tokens, 2 * height, 2 * width), latents)


@pytest.mark.parametrize("kind", ["diffusion", "xl", "sd3", "flux"])
def test_shapes_of_latents(kind: Any) -> None:
    pipeline = make_tiny_pipeline(kind)
    assert latent_channels(pipeline) == 4
    assert latent_shape(pipeline) == (4, 8, 8)
    assert latent_shape(pipeline, 64, 48) == (4, 16, 12)
    multiple = 8 if kind in ("sd3", "flux") else 4
    with pytest.raises(ValueError, match=f"height must be a multiple of {multiple} for this VAE, got {multiple + 2}"):
        latent_shape(pipeline, height=multiple + 2)


def test_other_pipelines_are_refused() -> None:
    with pytest.raises(TypeError, match="Expected a text-to-image pipeline of diffusers, got object"):
        Denoiser.of(object())
