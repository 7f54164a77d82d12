import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from rectified_diffusers.evaluation.straightness import pipeline_straightness, pool, straightness
from rectified_diffusers.flow.ode import euler
from rectified_diffusers.flow.prediction import scale_of
from rectified_diffusers.models.velocity import PipelineVelocity
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler


def noise_of(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, dtype=torch.float64, generator=generator)


@given(seed=st.integers(0, 2**31), start=st.floats(0, 0.5))
def test_a_constant_velocity_is_straight(seed, start):
    noise, velocity = noise_of(2, 4, 4, 4, 4, seed=seed).unbind()
    result = straightness(lambda x, t: velocity, noise, steps=20, bins=4, start=start)
    assert result.total < 1e-24
    assert max(result.per_bin) < 1e-24


@pytest.mark.parametrize("steps", [10, 50, 200])
def test_a_parabola_has_the_value_of_its_sum(steps):
    """v = 2 t c: the mean over the Euler grid of (c (1 - 1/N) - 2 t c)^2 is c^2 (1 - 1/N^2) / 3."""
    noise = noise_of(4, 4, 4, 4)
    c = noise_of(4, 4, 4, 4, seed=1)
    result = straightness(lambda x, t: 2 * t.view(-1, 1, 1, 1) * c, noise, steps=steps, bins=5)
    expected = c.square().mean().item() * (1 - 1 / steps**2) / 3
    assert result.total == pytest.approx(expected, rel=1e-10)


def test_bins_sum_to_the_total_and_follow_the_integrand():
    result = straightness(lambda x, t: 2 * t.view(-1, 1) + 0 * x, noise_of(3, 5), steps=1000, bins=4)
    edges = torch.tensor(result.edges)
    assert result.total == pytest.approx((edges.diff() * torch.tensor(result.per_bin)).sum().item(), rel=1e-6)
    # the integral of (1 - 2t)^2 over [0, 1/4], divided by 1/4
    assert result.per_bin[0] == pytest.approx(7 / 12, rel=1e-2)
    assert result.per_bin[0] == pytest.approx(result.per_bin[3], rel=1e-2)


def test_gaussian_data_has_its_closed_form():
    """Data and noise both N(0, 1): Z_t = r(t) Z_0 with r^2 = t^2 + (1-t)^2, so S = (2 - pi/2) |Z_0|^2."""
    noise = noise_of(64, 4, 4, 4)

    def velocity(x, t):
        t = t.view(-1, 1, 1, 1)
        return x * (2 * t - 1) / (t**2 + (1 - t) ** 2)

    errors = []
    for steps in (100, 200, 400):
        result = straightness(velocity, noise, steps=steps, bins=10)
        errors.append(abs(result.total / noise.square().mean().item() - (2 - math.pi / 2)))
    assert errors[-1] < 3e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # Euler is of first order
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_part_of_the_time_divides_by_its_duration():
    noise = noise_of(2, 3)
    result = straightness(lambda x, t: 2 * t.view(-1, 1) + 0 * x, noise, steps=1000, bins=10, start=0.5)
    # the mean velocity is 1.5: the integral over [0.5, 1] of (2t - 1.5)^2
    assert result.total == pytest.approx(1 / 24, rel=1e-2)
    assert result.edges[0] == 0.5
    assert result.edges[-1] == 1


def test_batches_pool_to_the_whole():
    noise = noise_of(5, 3)

    def velocity(x, t):
        return x * t.view(-1, 1)

    whole = straightness(velocity, noise, steps=20)
    parts = pool([straightness(velocity, noise[:2], steps=20), straightness(velocity, noise[2:], steps=20)])
    assert parts.count == whole.count == 5
    assert parts.total == pytest.approx(whole.total, rel=1e-12)
    assert parts.per_bin == pytest.approx(whole.per_bin, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 10, "bins": 3}, "multiple of bins"),
        ({"steps": 1, "bins": 1}, "at least 2"),
    ],
)
def test_wrong_arguments_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        straightness(lambda x, t: x, **{"noise": torch.zeros(2, 3), **arguments})


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_velocity_of_a_flow_pipeline_samples_as_the_pipeline_does(tiny_pipeline, guidance_scale):
    pipeline = tiny_pipeline("flow")
    noise = torch.randn(2, 4, 8, 8)
    prompts = ["a red apple", "a blue fish"]
    velocity = PipelineVelocity.of(pipeline, prompts, guidance_scale)
    with torch.no_grad():
        ours = euler(velocity, velocity.state_at_start(noise), 4, velocity.start)
    theirs = pipeline(
        prompts, latents=noise, num_inference_steps=4, guidance_scale=guidance_scale, output_type="latent"
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_model_of_noise_minus_data_is_turned_round(tiny_pipeline):
    pipeline = tiny_pipeline("flow")
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    with torch.no_grad():
        forward = PipelineVelocity.of(pipeline, ["a"])(x, t)
        pipeline.scheduler = RectifiedFlowEulerScheduler(velocity_direction="noise")
        torch.testing.assert_close(PipelineVelocity.of(pipeline, ["a"])(x, t), -forward)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_euler_on_a_diffusion_pipelines_velocity_is_ddim(tiny_pipeline, guidance_scale):
    """On the flow times of its timesteps: both put the pair (noise, data) estimated at one together at the next."""
    pipeline = tiny_pipeline("diffusion")
    noise, prompts = torch.randn(2, 4, 8, 8), ["a red apple", "rocket"]
    theirs = pipeline(
        prompts, latents=noise, num_inference_steps=5, guidance_scale=guidance_scale, output_type="latent"
    ).images
    velocity = PipelineVelocity.of(pipeline, prompts, guidance_scale)
    assert velocity.as_flow is not None
    timesteps = torch.tensor([*pipeline.scheduler.timesteps.tolist(), 0.0], dtype=torch.float64)
    times = velocity.as_flow.time_of(timesteps)
    scales = scale_of(times)
    x = noise.double() / scales[0]
    with torch.no_grad():
        for t, next_t in pairwise(times):
            x = x + (next_t - t) * velocity(x, t.expand(2))
    torch.testing.assert_close((x * scales[-1]).float(), theirs, rtol=1e-3, atol=1e-3)


def test_a_diffusion_pipeline_starts_where_its_schedule_does(tiny_pipeline):
    pipeline = tiny_pipeline("diffusion")
    velocity = PipelineVelocity.of(pipeline, ["a red apple"])
    alpha = pipeline.scheduler.alphas_cumprod[-1].sqrt()
    sigma = (1 - alpha**2).sqrt()
    assert velocity.start == pytest.approx((alpha / (alpha + sigma)).item(), rel=1e-5)
    noise = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(velocity.state_at_start(noise) * (alpha + sigma), noise)


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_pipeline_straightness_does_not_depend_on_the_batches(tiny_pipeline, kind):
    pipeline = tiny_pipeline(kind)
    prompts = ["a red apple", "a blue fish", "rocket"]
    options = {"guidance_scale": 2.0, "steps": 10, "bins": 5, "progress": False}
    one = pipeline_straightness(pipeline, prompts, batch_size=3, **options)
    two = pipeline_straightness(pipeline, prompts, batch_size=2, **options)
    assert one.count == two.count == 3
    assert one.total == pytest.approx(two.total, rel=1e-3)
    assert one.edges[0] == (0.0 if kind == "flow" else pytest.approx(0.064, abs=2e-3))


def test_other_schedulers_are_refused(tiny_pipeline):
    pipeline = tiny_pipeline("diffusion")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TypeError, match="FlowMatchEulerDiscreteScheduler"):
        PipelineVelocity.of(pipeline, ["a"])
