from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rectified_diffusers.flow import (
    DIFFUSION_TYPES,
    DiffusionAsFlow,
    PredictionType,
    Straight,
    VariancePreserving,
    heun,
    scale_of,
)
from tests.flow.cases import (
    PURE_ENDS,
    SD_ALPHAS_CUMPROD,
    SHAPES,
    Gaussian,
    draw_pair,
    rescale_to_pure_noise,
    spread,
)

all_views = pytest.mark.parametrize("as_flow", DIFFUSION_TYPES, indirect=True)
seeds = st.integers(0, 2**31)
shapes = st.sampled_from(SHAPES)

# Stable Diffusion's schedule covers these flow times.
FIRST_TIME, LAST_TIME = 0.06404, 0.97166


def predicted(noise: Tensor, data: Tensor, timestep: Tensor, kind: PredictionType) -> Tensor:
    """Return what a network of this type should predict for a pair at a timestep of Stable Diffusion's schedule."""
    at = VariancePreserving(SD_ALPHAS_CUMPROD).coefficients(1 - timestep / 999)
    alpha, sigma = (x.reshape(-1, *[1] * (noise.ndim - 1)) for x in (at.alpha, at.sigma))
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * data, "sample": data}[kind]


def make_view(prediction_type: PredictionType = "epsilon") -> DiffusionAsFlow:
    return DiffusionAsFlow(VariancePreserving(SD_ALPHAS_CUMPROD), prediction_type)


@pytest.fixture(scope="module")
def as_flow(request: pytest.FixtureRequest) -> DiffusionAsFlow:
    return make_view(getattr(request, "param", "epsilon"))


def perfect_network(sample: Tensor, timestep: Tensor, prediction_type: PredictionType) -> Tensor:
    """The diffusion network that a perfect training on Gaussian data gives; it exists on [0, 999] alone."""
    assert ((timestep >= 0) & (timestep <= 999)).all()
    path = VariancePreserving(SD_ALPHAS_CUMPROD)
    t = 1 - timestep / 999
    noise, data = Gaussian(path).expected_pair(sample, t)
    return predicted(noise, data, timestep, prediction_type)


def velocity_of_network(as_flow: DiffusionAsFlow, x_t: Tensor, t: Tensor) -> Tensor:
    return as_flow(lambda sample, timestep: perfect_network(sample, timestep, as_flow.prediction_type), x_t, t)


@given(t=st.floats(0.0641, 0.9716), seed=seeds, shape=shapes)
def test_network_input_is_the_point_of_the_diffusion_path(t: float, seed: int, shape: tuple[int, ...]) -> None:
    """The same pair on both paths: scaled x_t is the diffusion path's sample at the timestep given."""
    as_flow = make_view()
    noise, data = draw_pair(shape, seed)
    times = spread(t, shape[0]).clamp(0.0641, 0.9716)
    x_t, velocity = Straight().interpolate(noise, data, times)
    sample, timestep = as_flow.network_input(x_t, times)
    expected, _ = as_flow.schedule.interpolate(noise, data, 1 - timestep / 999)
    torch.testing.assert_close(sample, expected)
    torch.testing.assert_close(as_flow.time_of(timestep), times)
    for kind in DIFFUSION_TYPES:
        prediction = predicted(noise, data, timestep, kind)
        found = make_view(kind).velocity(prediction, x_t, times)
        torch.testing.assert_close(found, velocity, atol=1e-9, rtol=1e-9)


@all_views
def test_perfect_network_gives_the_exact_velocity(as_flow: DiffusionAsFlow) -> None:
    x_t, _ = draw_pair((40, 4, 4, 4), seed=0)
    t = torch.linspace(FIRST_TIME + 1e-5, LAST_TIME - 1e-5, 40, dtype=torch.float64)
    found = velocity_of_network(as_flow, x_t, t)
    torch.testing.assert_close(found, Gaussian(Straight()).velocity(x_t, t), atol=1e-9, rtol=1e-9)


def test_schedule_covers_the_documented_range(as_flow: DiffusionAsFlow) -> None:
    ends = as_flow.time_of(torch.tensor([999.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([FIRST_TIME, LAST_TIME], dtype=torch.float64), atol=1e-5, rtol=0)
    t = torch.tensor([0.0, 0.03, 0.5, 0.98, 1.0], dtype=torch.float64)
    timestep = as_flow.timestep_of(t)
    assert timestep.tolist()[:2] == [999, 999]
    assert timestep.tolist()[3:] == [0, 0]
    # Equal parts of signal and noise.
    assert SD_ALPHAS_CUMPROD[round(timestep[2].item())].item() == pytest.approx(0.5, abs=2e-3)
    assert (as_flow.timestep_of(torch.linspace(0.07, 0.97, 500)).diff() < 0).all()


def test_timesteps_agree_with_the_signal_to_noise_of_the_schedule(as_flow: DiffusionAsFlow) -> None:
    alpha, sigma = SD_ALPHAS_CUMPROD.sqrt(), (1 - SD_ALPHAS_CUMPROD).sqrt()
    t = alpha / (alpha + sigma)
    torch.testing.assert_close(t / (1 - t), alpha / sigma)
    timesteps = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(as_flow.timestep_of(t), timesteps, atol=1e-8, rtol=0)
    torch.testing.assert_close(as_flow.time_of(timesteps), t)
    torch.testing.assert_close(scale_of(t), alpha + sigma)


@all_views
@pytest.mark.parametrize("edge", [FIRST_TIME, LAST_TIME, 0.5], ids=["noise", "data", "half"])
def test_velocity_is_continuous_in_t(as_flow: DiffusionAsFlow, edge: float) -> None:
    x_t, _ = draw_pair((1, 4, 4, 4), seed=0)
    t = torch.linspace(edge - 1e-4, edge + 1e-4, 201, dtype=torch.float64)
    found = velocity_of_network(as_flow, x_t.expand(201, 4, 4, 4), t)
    assert found.diff(dim=0).abs().max() < 1e-4


@all_views
def test_beyond_the_schedule_the_nearest_estimate_is_kept(as_flow: DiffusionAsFlow) -> None:
    """At t = 0 a step of length 1 lands on the data estimated at the last timestep; at t = 1 the way back likewise."""
    gaussian = Gaussian(as_flow.schedule)
    x, _ = draw_pair((2, 4, 4, 4), seed=0)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = velocity_of_network(as_flow, x, ends)
    noise, data = gaussian.expected_pair(x, ends)
    torch.testing.assert_close(x[0] + found[0], data[0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(x[1] - found[1], noise[1], atol=1e-9, rtol=1e-9)
    # The bias is of the order of alpha at the last timestep, 0.068, and of sigma at the first, 0.029.
    exact = Gaussian(Straight()).velocity(x, ends)
    assert (found[0] - exact[0]).abs().mean() < 0.068
    assert (found[1] - exact[1]).abs().mean() < 0.2


def test_flow_of_the_network_carries_noise_to_data(as_flow: DiffusionAsFlow) -> None:
    noise, _ = draw_pair((8, 4, 4, 4), seed=0)
    found = heun(lambda x, t: velocity_of_network(as_flow, x, t), noise, steps=64)
    torch.testing.assert_close(found, Gaussian(Straight()).flow(noise, 0.0, 1.0), atol=0.02, rtol=0)


@all_views
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dtype_of_latents_is_kept(as_flow: DiffusionAsFlow, dtype: torch.dtype) -> None:
    x_t, prediction = (x.to(dtype) for x in draw_pair((4, 4, 4, 4), seed=0))
    t = torch.tensor([0.0, 0.3, 0.7, 1.0])
    sample, timestep = as_flow.network_input(x_t, t)
    assert sample.dtype == dtype
    assert timestep.dtype == torch.float32
    velocity = as_flow.velocity(prediction, x_t, t)
    assert velocity.dtype == dtype
    assert velocity.isfinite().all()


def test_a_velocity_network_needs_no_view() -> None:
    with pytest.raises(ValueError, match=r"got 'velocity'.* needs no DiffusionAsFlow"):
        make_view("velocity")


def test_views_of_one_schedule_are_equal(as_flow: DiffusionAsFlow) -> None:
    assert as_flow == DiffusionAsFlow(VariancePreserving(SD_ALPHAS_CUMPROD.tolist()), "epsilon")
    assert as_flow != make_view("sample")
    assert "schedule=VariancePreserving(1000 timesteps, 0.99915 ... 0.0046601)" in repr(as_flow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("prediction_type", "t", "words"),
    [("epsilon", 0.0, "where alpha = 0: x_t has no data"), ("sample", 1.0, "where sigma = 0: x_t has no noise")],
)
def test_what_is_undetermined_is_said(
    prediction_type: PredictionType, t: float, words: str, dtype: torch.dtype
) -> None:
    """A schedule with pure ends, where one of the pair is not in x_t; v determines both there."""
    x_t, prediction = (x.to(dtype) for x in draw_pair((2, 3), seed=0))
    schedule = VariancePreserving(PURE_ENDS)
    with pytest.raises(ValueError, match=f"type '{prediction_type}' .* {words}"):
        DiffusionAsFlow(schedule, prediction_type).velocity(prediction, x_t, torch.tensor([t, 0.5], dtype=dtype))
    other_end = torch.tensor([1 - t, 0.5], dtype=dtype)
    assert DiffusionAsFlow(schedule, prediction_type).velocity(prediction, x_t, other_end).isfinite().all()
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    assert DiffusionAsFlow(schedule, "v_prediction").velocity(prediction, x_t, ends).isfinite().all()


def test_epsilon_of_a_schedule_that_ends_in_pure_noise_is_refused_at_noise() -> None:
    schedule = VariancePreserving(rescale_to_pure_noise(SD_ALPHAS_CUMPROD))
    x_t, prediction = draw_pair((2, 3), seed=0)
    t = torch.tensor([0.0, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match="v_prediction"):
        DiffusionAsFlow(schedule, "epsilon").velocity(prediction, x_t, t)
    assert DiffusionAsFlow(schedule, "v_prediction").velocity(prediction, x_t, t).isfinite().all()
