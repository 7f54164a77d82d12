from __future__ import annotations

import re
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rectified_diffusers.flow import (
    DIFFUSION_TYPES,
    PREDICTION_TYPES,
    Cosine,
    Differentiable,
    DiffusionAsFlow,
    Interpolation,
    PredictionType,
    Straight,
    VariancePreserving,
    from_pair,
    heun,
    match_signal_to_noise,
    scale_of,
    to_pair,
)
from tests.flow.cases import (
    INTERPOLATIONS,
    PURE_ENDS,
    SD_ALPHAS_CUMPROD,
    SHAPES,
    Gaussian,
    draw_pair,
    name_of,
    rescale_to_pure_noise,
    spread,
)

all_interpolations = pytest.mark.parametrize("interpolation", INTERPOLATIONS, ids=name_of)
all_views = pytest.mark.parametrize("as_flow", DIFFUSION_TYPES, indirect=True)
times = st.floats(0.02, 0.98)
seeds = st.integers(0, 2**31)
shapes = st.sampled_from(SHAPES)

# Stable Diffusion's schedule covers these flow times.
FIRST_TIME, LAST_TIME = 0.06404, 0.97166


@all_interpolations
@given(prediction_type=st.sampled_from(PREDICTION_TYPES), t=times, seed=seeds, shape=shapes)
def test_pair_comes_back(
    interpolation: Interpolation, prediction_type: PredictionType, t: float, seed: int, shape: tuple[int, ...]
) -> None:
    noise, data = draw_pair(shape, seed)
    times = spread(t, shape[0]).clamp(0.001, 0.999)
    x_t, _ = interpolation.interpolate(noise, data, times)
    prediction = from_pair(noise, data, times, prediction_type, interpolation)
    found_noise, found_data = to_pair(prediction, x_t, times, prediction_type, interpolation)
    torch.testing.assert_close(found_noise, noise, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found_data, data, atol=1e-9, rtol=1e-9)


@all_interpolations
@given(ends=st.sampled_from(tuple(permutations(PREDICTION_TYPES, 2))), t=times, seed=seeds, shape=shapes)
def test_conversions_agree_with_the_definitions(
    interpolation: Interpolation,
    ends: tuple[PredictionType, PredictionType],
    t: float,
    seed: int,
    shape: tuple[int, ...],
) -> None:
    noise, data = draw_pair(shape, seed)
    times = spread(t, shape[0]).clamp(0.001, 0.999)
    x_t, velocity = interpolation.interpolate(noise, data, times)
    at = interpolation.coefficients(times)
    alpha, sigma = (c.reshape(-1, *[1] * (len(shape) - 1)) for c in (at.alpha, at.sigma))
    expected: dict[PredictionType, Tensor] = {
        "velocity": velocity,
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * data,
        "sample": data,
    }
    source, target = ends
    pair = to_pair(expected[source], x_t, times, source, interpolation)
    found = from_pair(*pair, times, target, interpolation)
    torch.testing.assert_close(found, expected[target], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("prediction_type", ["velocity", "v_prediction"])
@pytest.mark.parametrize(
    "interpolation", [i for i in INTERPOLATIONS if not isinstance(i, Differentiable)], ids=name_of
)
def test_velocity_and_v_are_regular_at_both_ends(
    interpolation: Interpolation, prediction_type: PredictionType
) -> None:
    noise, data = draw_pair((2, 4, 4), seed=0)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x_t, _ = interpolation.interpolate(noise, data, t)
    prediction = from_pair(noise, data, t, prediction_type, interpolation)
    found_noise, found_data = to_pair(prediction, x_t, t, prediction_type, interpolation)
    torch.testing.assert_close(found_noise, noise)
    torch.testing.assert_close(found_data, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("interpolation", [Straight(), Cosine(), VariancePreserving(PURE_ENDS)], ids=repr)
@pytest.mark.parametrize(("prediction_type", "end"), [("epsilon", 0.0), ("sample", 1.0)])
def test_undetermined_pair_is_refused(
    interpolation: Interpolation, prediction_type: PredictionType, end: float, dtype: torch.dtype
) -> None:
    x_t, prediction = (x.to(dtype) for x in draw_pair((2, 3), seed=0))
    with pytest.raises(ValueError, match=rf"'{prediction_type}'.* 1 of the 2 times"):
        to_pair(prediction, x_t, torch.tensor([end, 0.5], dtype=dtype), prediction_type, interpolation)
    found = to_pair(prediction, x_t, torch.tensor([1 - end, 0.5], dtype=dtype), prediction_type, interpolation)
    assert all(x.isfinite().all() for x in found)


def test_stable_diffusion_schedule_is_regular_for_every_type() -> None:
    noise, data = draw_pair((2, 3), seed=0)
    path, t = VariancePreserving(SD_ALPHAS_CUMPROD), torch.tensor([0.0, 1.0], dtype=torch.float64)
    x_t, _ = path.interpolate(noise, data, t)
    for kind in PREDICTION_TYPES:
        found_noise, found_data = to_pair(from_pair(noise, data, t, kind, path), x_t, t, kind, path)
        torch.testing.assert_close(found_noise, noise)
        torch.testing.assert_close(found_data, data)


def test_velocity_of_a_path_that_only_grows_is_refused() -> None:
    growing = Differentiable(lambda t: 1 + t, lambda t: 1 + t)  # x and its velocity are parallel
    x_t, prediction = draw_pair((2, 3), seed=0)
    with pytest.raises(ValueError, match="the two equations coincide"):
        to_pair(prediction, x_t, torch.tensor([0.2, 0.5]), "velocity", growing)


def test_v_of_a_path_through_zero_is_refused() -> None:
    vanishing = Differentiable(lambda t: t, lambda t: t)
    x_t, prediction = draw_pair((2, 3), seed=0)
    with pytest.raises(ValueError, match="x_t holds nothing"):
        to_pair(prediction, x_t, torch.tensor([0.0, 0.5]), "v_prediction", vanishing)


def test_v_prediction_has_the_sign_of_diffusers() -> None:
    """diffusers' get_velocity is alpha * noise - sigma * sample; at the data end it is the noise, not minus it."""
    noise, data = draw_pair((1, 3), seed=0)
    t = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(from_pair(noise, data, t, "v_prediction", Straight()), noise)


@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_predictions_keep_their_dtype(source: PredictionType, dtype: torch.dtype) -> None:
    x_t, prediction = (x.to(dtype) for x in draw_pair((4, 4, 4, 4), seed=0))
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])
    for target in PREDICTION_TYPES:
        pair = to_pair(prediction, x_t, t, source, Cosine())
        assert from_pair(*pair, t, target, Cosine()).dtype == dtype


def test_unknown_type_names_the_known() -> None:
    x_t, prediction = draw_pair((2, 3), seed=0)
    t = torch.tensor([0.2, 0.5])
    known = r"velocity, epsilon, v_prediction, sample, got 'flow'"
    with pytest.raises(ValueError, match=known):
        to_pair(prediction, x_t, t, "flow", Straight())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=known):
        from_pair(x_t, prediction, t, "flow", Straight())  # pyright: ignore[reportArgumentType]


# A diffusion network as a straight flow.


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
    return from_pair(noise, data, t, prediction_type, path)


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
        prediction = from_pair(noise, data, 1 - timestep / 999, kind, as_flow.schedule)
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
    t = match_signal_to_noise(alpha, sigma)
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


def test_epsilon_of_a_schedule_that_ends_in_pure_noise_is_refused_at_noise() -> None:
    schedule = VariancePreserving(rescale_to_pure_noise(SD_ALPHAS_CUMPROD))
    x_t, prediction = draw_pair((2, 3), seed=0)
    t = torch.tensor([0.0, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match="v_prediction"):
        DiffusionAsFlow(schedule, "epsilon").velocity(prediction, x_t, t)
    assert DiffusionAsFlow(schedule, "v_prediction").velocity(prediction, x_t, t).isfinite().all()


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


@pytest.mark.parametrize(
    ("prediction_type", "path", "words"),
    [
        (
            "velocity",
            torch.ones_like,
            "alpha * d_sigma - sigma * d_alpha = 0, because the two equations coincide; that",
        ),
        ("epsilon", torch.zeros_like, "where alpha = 0, because x_t holds no data; that"),
        (
            "v_prediction",
            torch.zeros_like,
            "where alpha^2 + sigma^2 = 0, because x_t holds nothing; that",
        ),
        ("sample", torch.zeros_like, "where sigma = 0, because x_t holds no noise; that"),
    ],
)
def test_what_is_undetermined_is_said(prediction_type: PredictionType, path: Any, words: str) -> None:
    x_t, prediction = draw_pair((2, 3), seed=0)
    with pytest.raises(ValueError, match=re.escape(words)):
        to_pair(prediction, x_t, torch.tensor([0.2, 0.5]), prediction_type, Differentiable(path, path))
