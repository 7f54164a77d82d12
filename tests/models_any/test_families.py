"""Any family of diffusers is adapted by watching its stock call, and equals it."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.conditioning import PromptConditioning, equal
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.models.self_test import self_test
from tests.marks import slow_but
from tests.models_any.families import DIFFUSIONS, FLOWS, build
from tests.models_any.made_up import make_made_up_pipeline

PROMPTS = ["a red apple", "two dogs in a garden at night"]
GUIDANCE = {
    "sd3": "linear, batched, uncond first",
    "flux": "input; linear, sequential, cond first",
    "lumina2": "not linear, sequential, cond first",
    "z_image": "linear, batched, cond first",
    "wan": "linear, sequential, cond first",
}
FAST = [*GUIDANCE, "flux2_klein", "chroma", "wan_multistep"]


@pytest.fixture(scope="session")
def adapted() -> Any:
    made: dict[str, PipelineDenoiser] = {}

    def adapt(name: str) -> PipelineDenoiser:
        if name not in made:
            pipeline, options = build(name)
            pipeline.set_progress_bar_config(disable=True)
            made[name] = PipelineDenoiser(pipeline, options=options)
        return made[name]

    return adapt


@pytest.mark.parametrize("name", slow_but(FAST, FLOWS))
def test_a_flow_passes_the_self_test(name: str, adapted: Any) -> None:
    result = self_test(adapted(name))
    assert result.euler is not None
    assert result.euler <= 1e-5
    assert result.prediction <= 1e-5
    assert result.noise_exact
    assert result.decoding_exact
    assert result.batched


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["flux", "ovis_image", "cogview4", "wan", "ltx_video", "z_image"])
def test_a_pipeline_in_half_precision_passes_within_its_rounding(name: str, dtype: torch.dtype) -> None:
    pipeline, options = build(name)
    denoiser = PipelineDenoiser(pipeline.to(dtype), options=options)
    result = self_test(denoiser)
    assert (result.prediction, result.noise_exact, result.decoding_exact) == (0, True, True)
    assert result.euler is not None
    assert result.euler <= torch.finfo(dtype).eps
    two_passes = denoiser.guidance_found.two_passes
    assert two_passes is not None
    assert two_passes.linear


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_prediction_of_a_diffusion_model_is_exact(name: str, adapted: Any) -> None:
    result = self_test(adapted(name))
    assert (result.euler, result.noise_exact, result.decoding_exact) == (None, True, True)
    assert result.prediction <= 1e-5
    assert adapted(name).diffusion() is not None


@pytest.mark.parametrize(("name", "kind"), GUIDANCE.items())
def test_guidance_is_classified(name: str, kind: str, adapted: Any) -> None:
    assert adapted(name).guidance_found.kind == kind


def test_the_weight_of_guidance_is_read_off(adapted: Any) -> None:
    assert adapted("sd3").guidance_found.two_passes.offset == 0
    assert adapted("z_image").guidance_found.two_passes.offset == 1


@pytest.mark.parametrize(
    "name", slow_but(["sd3", "z_image", "wan"], ["sd3", "z_image", "wan", "flux2_klein", "chroma"])
)
def test_two_passes_of_our_own_repeat_linear_guidance(name: str, adapted: Any) -> None:
    """The unconditional is the pipeline's own; Euler on the guided velocity gives the guided latents."""
    denoiser = adapted(name)
    two_passes = denoiser.guidance_found.two_passes
    noise = torch.randn(1, *denoiser.latent_shape)
    trace = denoiser.solve(PROMPTS[:1], noise, 2, record=True, **two_passes.options)
    text, null = denoiser.encode(PROMPTS[:1], "cpu"), denoiser.encode([""], "cpu")
    weight = two_passes.options[two_passes.argument] + two_passes.offset
    guided = PipelineDenoiser(denoiser.pipeline, two_passes.options[two_passes.argument], denoiser.call.options)
    assert (guided.two_passes, guided.guidance) == (True, weight)
    flow, step = denoiser.calibration.flow, trace.steps[0]
    t = torch.tensor([flow.time_at(step.sigmas[0])], dtype=torch.float64)
    with torch.no_grad():
        cond, uncond = (denoiser.velocity(denoiser.network, noise, t, part) for part in (text, null))
    torch.testing.assert_close(uncond + weight * (cond - uncond), flow.sign * step.answer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["rectified_flow", "sd", "sd_v_prediction", "sdxl", "sdxl_euler"])
def test_it_equals_the_adapter_written_by_hand(name: str, adapted: Any) -> None:
    """The same predictions, and the same unconditional, which is zero for SDXL."""
    generic = adapted(name)
    hand = Denoiser.of(generic.pipeline)
    assert not isinstance(hand, PipelineDenoiser)
    assert (hand.latent_shape, hand.num_train_timesteps) == (generic.latent_shape, generic.num_train_timesteps)
    noise, timestep = torch.randn(3, 4, 8, 8), torch.tensor([800.0, 300.0, 500.0])
    prompts = [*PROMPTS, ""]
    with torch.no_grad():
        expected = hand.predict(hand.network, noise, timestep, hand.encode(prompts, "cpu"))
        found = generic.predict(generic.network, noise, timestep, generic.encode(prompts, "cpu"))
    sign = 1 if hand.direction == generic.direction else -1
    torch.testing.assert_close(sign * found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(generic.decode_pixels(noise), hand.decode_pixels(noise).clamp(-1, 1))


@pytest.mark.parametrize("name", slow_but(FAST, FLOWS))
def test_prompts_of_different_lengths_are_one_batch_or_several(name: str, adapted: Any) -> None:
    denoiser = adapted(name)
    x, t = torch.randn(2, *denoiser.latent_shape), torch.tensor([0.3, 0.6])
    both = denoiser.encode(PROMPTS, "cpu")
    with torch.no_grad():
        together = denoiser.velocity(denoiser.network, x, t, both)
        alone = [denoiser.velocity(denoiser.network, x[i : i + 1], t[i : i + 1], both.select([i])) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flux", "z_image", "sana", "wan"])
def test_stored_conditioning_is_equal(name: str, adapted: Any) -> None:
    denoiser = adapted(name)
    both = denoiser.encode(PROMPTS, "cpu")
    tensors, text = both.pack()
    assert all(isinstance(part, torch.Tensor) for part in tensors.values())
    again = PromptConditioning.unpack(tensors, text)
    x, t = torch.randn(2, *denoiser.latent_shape), torch.tensor([0.3, 0.6])
    with torch.no_grad():
        one, two = (denoiser.velocity(denoiser.network, x, t, part) for part in (both, again))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image", "wan"])
def test_the_pipeline_is_as_it_was(name: str) -> None:
    pipeline, options = build(name)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(PROMPTS[0], num_inference_steps=1, **options)  # leaves attributes of its own, such as a cache's
    before = {key: id(value) for key, value in vars(pipeline).items()}
    network = {key: id(value) for key, value in vars(pipeline.transformer).items()}
    scheduler = dict(vars(pipeline.scheduler))
    denoiser = PipelineDenoiser(pipeline, options=options)
    denoiser.decode(torch.randn(1, *denoiser.latent_shape))
    assert {key: id(value) for key, value in vars(pipeline).items()} == before
    assert {key: id(value) for key, value in vars(pipeline.transformer).items()} == network
    assert vars(pipeline.scheduler).keys() == scheduler.keys()


def test_decoding_keeps_the_gradient(adapted: Any) -> None:
    denoiser = adapted("sd3")
    latents = torch.randn(1, *denoiser.latent_shape, requires_grad=True)
    pixels = denoiser.decode(latents, "pt", gradient=True)
    pixels.sum().backward()
    assert latents.grad is not None
    assert bool(latents.grad.any())
    plain = denoiser.decode(latents.detach(), "pt")
    np.testing.assert_array_equal(pixels.detach().numpy(), plain.numpy())


def test_a_network_in_another_precision_is_evaluated_in_its_own(adapted: Any) -> None:
    import copy

    denoiser = adapted("flux2_klein")
    network = copy.deepcopy(denoiser.network).to(torch.bfloat16)
    conditioning = denoiser.encode(PROMPTS[:1], "cpu")
    x, t = torch.randn(1, *denoiser.latent_shape), torch.tensor([0.5])
    with torch.no_grad():
        found = denoiser.velocity(network, x, t, conditioning)
        expected = denoiser.velocity(denoiser.network, x, t, conditioning)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_two_threads_share_a_pipeline() -> None:
    """Watching is done on a private copy, so that neither sees the calls of the other.

    The pipeline has no tokenizer: the padding of those of transformers is a state that threads share.
    """
    denoiser = PipelineDenoiser(make_made_up_pipeline())
    prompts = [f"{count} red apples" for count in range(16)]
    alone = denoiser.encode(prompts, "cpu")
    latents = torch.randn(16, *denoiser.latent_shape)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda prompt: denoiser.encode([prompt], "cpu").trees[0], prompts))
        decoded = list(pool.map(lambda row: denoiser.decode(row[None], "np"), latents))
    assert equal(list(alone.trees), together)
    np.testing.assert_array_equal(np.concatenate(decoded), denoiser.decode(latents, "np"))


def test_offloading_goes_on_after_a_call_that_ended_early() -> None:
    pipeline, options = build("sd3")
    freed = []
    pipeline.maybe_free_model_hooks = lambda: freed.append(pipeline.transformer)
    denoiser = PipelineDenoiser(pipeline, options=options)
    before = len(freed)
    denoiser.encode(PROMPTS[:1], "cpu")
    assert len(freed) > before
    assert all(network is denoiser.network for network in freed)
