"""Back to the noise and there again: at the solvers' orders, under any prompt and guidance, in part or as a whole."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from rectified_diffusers.editing.inversion import edit, invert, round_trip_error
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
from tests.tiny import make_tiny_pipeline, make_xl_components


@pytest.fixture
def pipeline():
    return make_tiny_pipeline("flow")


@pytest.fixture(scope="module")
def smooth_pipeline():
    """Build a pipeline in float64 whose U-Net sees the slowest sine and cosine of its timestep alone.

    The fastest turn 1000 / (2 pi) times from noise to data: with random weights the velocity does as well, and no
    solver shows its order before its steps are shorter than that.
    """
    pipeline = make_tiny_pipeline("flow")

    def widen(unet, args, kwargs):  # transformers 4 cannot run the text encoder in float64
        return args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"].double()}

    pipeline.unet.double().register_forward_pre_hook(widen, with_kwargs=True)
    with torch.no_grad():
        sines_and_cosines = pipeline.unet.time_embedding.linear_1.weight.unflatten(1, (2, -1))
        sines_and_cosines[:, :, :-1] = 0
    pipeline.vae.register_to_config(scaling_factor=3.3)  # latents of standard deviation 1, as a trained VAE's
    return pipeline


def latents(count: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(3))


def picture(seed: int = 0, size: int = 32) -> Image.Image:
    """Return a smooth picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


# Guidance is a sum of velocities and changes no order; Euler has it here, where evaluations are fewer.
@pytest.mark.parametrize(("solver", "order", "guidance_scale"), [("euler", 1, 2.0), ("heun", 2, 1.0)])
def test_the_noise_converges_at_the_order_of_the_solver(smooth_pipeline, solver, order, guidance_scale):
    data = latents(dtype=torch.float64)
    arguments = {"solver": solver, "guidance_scale": guidance_scale}
    noises = [invert(smooth_pipeline, data, "a fox", steps, **arguments) for steps in (4, 8, 16)]
    assert noises[0].dtype == torch.float64
    changes = [(b - a).norm() for a, b in pairwise(noises)]
    assert (changes[0] / changes[1]).log2().item() == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("solver", "order", "guidance_scale"), [("euler", 1, 2.0), ("heun", 3, 1.0)])
def test_the_round_trip_error_falls_at_its_order(smooth_pipeline, solver, order, guidance_scale):
    """One more than the solver's for Heun: a step back undoes the leading error of a step of even order."""
    data = latents(dtype=torch.float64)
    arguments = {"solver": solver, "guidance_scale": guidance_scale}
    errors = [round_trip_error(smooth_pipeline, data, "a fox", steps, **arguments) for steps in (8, 16)]
    assert (errors[0] / errors[1]).log2().item() == pytest.approx(order, abs=0.1)


def test_heun_in_float32_returns_to_rounding(smooth_pipeline):
    pipeline = make_tiny_pipeline("flow")
    pipeline.unet.load_state_dict(smooth_pipeline.unet.state_dict())
    error = round_trip_error(pipeline, latents(3), ["a fox", "an owl", "a cat"], 16)
    assert error.shape == (3,)
    assert error.max() < 1e-5


def test_inverting_undoes_the_pipeline(smooth_pipeline):
    """What the pipeline's own scheduler draws from a noise is taken back to that noise, as the steps grow shorter."""
    noise = latents(dtype=torch.float64)
    embeds, _ = smooth_pipeline.encode_prompt("a fox", smooth_pipeline.device, 1, False)
    errors = []
    for steps in (8, 16):
        call = {"prompt_embeds": embeds, "latents": noise, "num_inference_steps": steps, "output_type": "latent"}
        data = smooth_pipeline(**call).images
        errors.append((invert(smooth_pipeline, data, "a fox", steps, solver="euler") - noise).norm() / noise.norm())
    assert errors[1] < 0.05
    assert (errors[0] / errors[1]).log2().item() == pytest.approx(1, abs=0.1)


def test_editing_to_the_same_prompt_gives_back_what_the_vae_keeps(smooth_pipeline):
    source = picture()
    edited = edit(smooth_pipeline, source, "a fox", "a fox", 4)
    pixels = smooth_pipeline.image_processor.preprocess(source)
    with torch.no_grad():
        kept = smooth_pipeline.vae.decode(smooth_pipeline.vae.encode(pixels).latent_dist.mode()).sample
    expected = smooth_pipeline.image_processor.postprocess(kept, output_type="pil")[0]
    difference = np.abs(np.asarray(edited[0], dtype=int) - np.asarray(expected))
    assert difference.max() <= 2


def test_editing_to_another_prompt_changes_more_the_greater_the_strength(pipeline):
    source = [picture(0), picture(1)]

    def edited(prompt: str, **arguments) -> np.ndarray:
        call = {"steps": 2, "solver": "euler", **arguments}
        return np.stack([*edit(pipeline, source, ["a fox", "a cat"], prompt, **call)]).astype(int)

    kept = edited("a fox", strength=1e-3)
    changes = [np.abs(edited("the red owl", strength=strength) - kept).mean() for strength in (0.2, 0.5, 1.0)]
    assert 0 < changes[0] < changes[1] < changes[2]
    assert (edited("the red owl", guidance_scale=3.0) != edited("the red owl")).any()
    assert (edited("the red owl", source_guidance_scale=3.0) != edited("the red owl")).any()


def test_strength_says_where_on_the_flow_it_ends(pipeline):
    """One Euler step back from t = 1 to t = 1 - strength: data - strength * v(data, 1)."""
    data = latents()
    whole, part = (invert(pipeline, data, "a fox", 1, solver="euler", strength=s) for s in (1.0, 0.25))
    torch.testing.assert_close(part, data + 0.25 * (whole - data))


def test_a_model_that_predicts_the_negative_inverts_alike(pipeline):
    expected = invert(pipeline, latents(), "a fox", 2)
    with torch.no_grad():
        for parameter in pipeline.unet.conv_out.parameters():
            parameter.neg_()
    pipeline.scheduler = RectifiedFlowEulerScheduler(velocity_direction="noise")
    assert torch.equal(invert(pipeline, latents(), "a fox", 2), expected)


def test_pictures_and_their_latents_are_one(pipeline):
    source = [picture(0).convert("RGBA"), picture(1)]
    pixels = pipeline.image_processor.preprocess([image.convert("RGB") for image in source])
    with torch.no_grad():
        data = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(invert(pipeline, source, "a fox", 1), invert(pipeline, data, "a fox", 1))


def test_half_precision_is_of_the_network_alone(pipeline):
    noise = invert(pipeline, latents(), "a fox", 2)
    pipeline.unet.to(torch.bfloat16)
    pipeline.text_encoder.to(torch.bfloat16)
    rough = invert(pipeline, latents().bfloat16(), "a fox", 2)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, noise, atol=0.05, rtol=0.05)


def test_the_progress_bar_is_the_pipelines(pipeline, capsys):
    pipeline.set_progress_bar_config(disable=False)
    invert(pipeline, latents(), "a fox", 2)
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0}, r"in \(0, 1\], got 0"),
        ({"strength": 1.1}, r"in \(0, 1\], got 1.1"),
        ({"solver": "rk4"}, "one of euler, heun, got 'rk4'"),
        ({"steps": 0}, "steps >= 1, got 0"),
        ({"prompts": ["a", "b"]}, "got 2 for 1 images"),
        ({"pictures": torch.zeros(1, 5, 8, 8)}, r"pictures: expected the shape of an image, got \(1, 5, 8, 8\)"),
        ({"pictures": []}, "pictures: expected an image, got an empty list"),
        ({"pictures": [picture(), picture(size=16)]}, r"got sizes \[\(32, 32\), \(16, 16\)\]"),
    ],
)
def test_invert_refuses(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        invert(pipeline, **{"pictures": latents(), "prompts": "a fox", **arguments})


@pytest.mark.parametrize("call", [edit, round_trip_error])
def test_strength_is_checked_before_the_work(call):
    with pytest.raises(ValueError, match="strength, the share of the flow that is run, must be in"):
        call(None, latents(), *["a fox"] * (2 if call is edit else 1), strength=2)


def test_a_diffusion_model_and_another_family_are_refused():
    with pytest.raises(TypeError, match=r"needs a RectifiedFlowPipeline.* with DDIMScheduler"):
        invert(make_tiny_pipeline("diffusion"), latents(), "a fox")
    xl = StableDiffusionXLPipeline(**make_xl_components(), scheduler=RectifiedFlowEulerScheduler())
    with pytest.raises(TypeError, match="got StableDiffusionXLPipeline"):
        round_trip_error(xl, latents(), "a fox")
