from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rectified_diffusers.flow import Cosine, Interpolation, Straight, VariancePreserving
from tests.flow.cases import (
    INTERPOLATIONS,
    PURE_ENDS,
    SD_ALPHAS_CUMPROD,
    SD_BETAS,
    SHAPES,
    draw_pair,
    rescale_to_pure_noise,
    spread,
)

all_interpolations = pytest.mark.parametrize("interpolation", INTERPOLATIONS, ids=repr)
times = st.floats(0.02, 0.98)
seeds = st.integers(0, 2**31)
shapes = st.sampled_from(SHAPES)


@all_interpolations
@given(t=times, seed=seeds, shape=shapes)
def test_velocity_is_the_time_derivative(
    interpolation: Interpolation, t: float, seed: int, shape: tuple[int, ...]
) -> None:
    noise, data = draw_pair(shape, seed)
    times = spread(t, shape[0])
    _, velocity = interpolation.interpolate(noise, data, times)
    derivative = torch.func.jvp(
        lambda s: interpolation.interpolate(noise, data, s)[0], (times,), (torch.ones_like(times),)
    )[1]
    torch.testing.assert_close(velocity, derivative)


@all_interpolations
@given(t=times, seed=seeds, shape=shapes)
def test_each_example_has_its_own_time(
    interpolation: Interpolation, t: float, seed: int, shape: tuple[int, ...]
) -> None:
    noise, data = draw_pair(shape, seed)
    times = spread(t, shape[0])
    x_t, velocity = interpolation.interpolate(noise, data, times)
    for i in range(shape[0]):
        at = interpolation.coefficients(times[i : i + 1])
        torch.testing.assert_close(x_t[i], at.alpha.item() * data[i] + at.sigma.item() * noise[i])
        torch.testing.assert_close(velocity[i], at.d_alpha.item() * data[i] + at.d_sigma.item() * noise[i])


@all_interpolations
def test_signal_rises_and_noise_falls(interpolation: Interpolation) -> None:
    at = interpolation.coefficients(torch.linspace(0, 1, 4001, dtype=torch.float64))
    assert (at.alpha.diff() > 0).all()
    assert (at.sigma.diff() < 0).all()


@pytest.mark.parametrize(
    "interpolation",
    [Straight(), Cosine(), VariancePreserving(PURE_ENDS), VariancePreserving(SD_ALPHAS_CUMPROD).with_pure_ends()],
    ids=repr,
)
def test_ends_are_noise_and_data(interpolation: Interpolation) -> None:
    noise, data = draw_pair((2, 3), seed=0)
    start, end = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(interpolation.interpolate(noise, data, start)[0], noise)
    torch.testing.assert_close(interpolation.interpolate(noise, data, end)[0], data)


def test_pure_ends_change_a_schedule_little() -> None:
    given = VariancePreserving(SD_ALPHAS_CUMPROD)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, stretched = given.coefficients(t).alpha, given.with_pure_ends().coefficients(t).alpha
    assert 0.06 < (stretched - alpha).abs().max() < 0.07  # alpha(0) = 0.068 of the schedule itself
    assert VariancePreserving(PURE_ENDS).with_pure_ends().alphas_cumprod == pytest.approx(PURE_ENDS.tolist())


def test_straight_velocity_is_data_minus_noise_bit_for_bit() -> None:
    noise, data = draw_pair((4, 4, 4, 4), seed=0)
    _, velocity = Straight().interpolate(noise, data, spread(0.3, 4))
    assert torch.equal(velocity, data - noise)


def test_cosine_closed_form() -> None:
    at = Cosine().coefficients(torch.tensor([1 / 3], dtype=torch.float64))
    torch.testing.assert_close(at.alpha, torch.tensor([0.5], dtype=torch.float64))
    torch.testing.assert_close(at.sigma, torch.tensor([0.75**0.5], dtype=torch.float64))


@pytest.mark.parametrize(
    "alphas_cumprod",
    [SD_ALPHAS_CUMPROD, rescale_to_pure_noise(SD_ALPHAS_CUMPROD), PURE_ENDS],
    ids=["sd", "zero", "pure"],
)
class TestVariancePreserving:
    def test_meets_the_schedule_at_its_timesteps(self, alphas_cumprod: torch.Tensor) -> None:
        count = len(alphas_cumprod)
        at = VariancePreserving(alphas_cumprod).coefficients(
            1 - torch.arange(count, dtype=torch.float64) / (count - 1)
        )
        torch.testing.assert_close(at.alpha.square(), alphas_cumprod, atol=1e-12, rtol=0)
        torch.testing.assert_close(at.sigma.square(), 1 - alphas_cumprod, atol=1e-12, rtol=0)

    def test_velocity_is_continuous_across_timesteps(self, alphas_cumprod: torch.Tensor) -> None:
        path = VariancePreserving(alphas_cumprod)
        knots = torch.arange(1, len(alphas_cumprod) - 1, dtype=torch.float64)
        below, above = path.angle(knots - 1e-9)[1], path.angle(knots + 1e-9)[1]
        torch.testing.assert_close(below, above, atol=1e-7, rtol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_timestep_at_inverts_angle(self, alphas_cumprod: torch.Tensor, dtype: torch.dtype) -> None:
        path = VariancePreserving(alphas_cumprod)
        timestep = torch.linspace(0, path.last_timestep, 7001, dtype=dtype)
        found = path.timestep_at(path.angle(timestep)[0])
        torch.testing.assert_close(found, timestep, atol=1e-9 if dtype == torch.float64 else 2e-3, rtol=0)

    def test_angles_beyond_the_schedule_give_its_ends(self, alphas_cumprod: torch.Tensor) -> None:
        path = VariancePreserving(alphas_cumprod)
        found = path.timestep_at(torch.tensor([-0.1, 2.0], dtype=torch.float64))
        assert found.tolist() == [0, path.last_timestep]

    def test_float32_agrees_with_float64(self, alphas_cumprod: torch.Tensor) -> None:
        path = VariancePreserving(alphas_cumprod)
        t = torch.linspace(0, 1, 997)
        narrow, wide = path.coefficients(t), path.coefficients(t.double())
        assert narrow.alpha.dtype == torch.float32
        torch.testing.assert_close(narrow.alpha.double(), wide.alpha, atol=2e-6, rtol=0)
        torch.testing.assert_close(narrow.d_sigma.double(), wide.d_sigma, atol=2e-3, rtol=2e-3)


def test_evenly_spaced_angles_are_the_cosine_path() -> None:
    t = torch.linspace(0, 1, 397, dtype=torch.float64)
    found, expected = VariancePreserving(PURE_ENDS).coefficients(t), Cosine().coefficients(t)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_angle_stays_monotone_between_uneven_timesteps() -> None:
    path = VariancePreserving([0.9999, 0.99, 0.5, 0.499, 0.01, 0.0])
    timestep = torch.linspace(0, 5, 2001, dtype=torch.float64)
    angle, slope = path.angle(timestep)
    assert (slope > 0).all()
    torch.testing.assert_close(path.timestep_at(angle), timestep, atol=1e-9, rtol=0)


def test_variance_preserving_ends_of_stable_diffusion() -> None:
    at = VariancePreserving.from_betas(SD_BETAS).coefficients(torch.tensor([0.0, 1.0]))
    assert at.alpha[0].item() == pytest.approx(0.068, abs=5e-4)
    assert at.sigma[1].item() == pytest.approx(0.029, abs=5e-4)


def test_variance_preserving_is_a_value() -> None:
    ours, same = VariancePreserving.from_betas(SD_BETAS), VariancePreserving(SD_ALPHAS_CUMPROD.tolist())
    assert ours == same
    assert hash(ours) == hash(same)
    assert ours != VariancePreserving(PURE_ENDS)
    assert repr(ours) == "VariancePreserving(1000 timesteps, 0.99915 ... 0.0046601)"


@all_interpolations
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_latents_keep_their_dtype(interpolation: Interpolation, dtype: torch.dtype) -> None:
    noise, data = (x.to(dtype) for x in draw_pair((4, 4, 4, 4), seed=0))
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    x_t, velocity = interpolation.interpolate(noise, data, t)
    assert x_t.dtype == velocity.dtype == dtype
    exact, _ = interpolation.interpolate(noise.double(), data.double(), t.double())
    # One rounding of the sum: that it is made in t's dtype, not in the latents'.
    torch.testing.assert_close(x_t.double(), exact, atol=2e-6, rtol=torch.finfo(dtype).eps)


def test_gradients_reach_both_ends() -> None:
    noise, data = (x.requires_grad_() for x in draw_pair((2, 3), seed=0))
    x_t, _ = Straight().interpolate(noise, data, torch.tensor([0.25, 0.25], dtype=torch.float64))
    x_t.sum().backward()
    assert noise.grad is not None
    assert data.grad is not None
    assert (noise.grad == 0.75).all()
    assert (data.grad == 0.25).all()


@pytest.mark.parametrize(
    "t", [torch.tensor(0.5), torch.full((1,), 0.5), torch.full((4, 1), 0.5)], ids=["0d", "1", "2d"]
)
def test_wrong_shape_of_t_is_refused(t: torch.Tensor) -> None:
    noise, data = draw_pair((4, 4), seed=0)
    with pytest.raises(ValueError, match=r"one time per example"):
        Straight().interpolate(noise, data, t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_narrow_t_is_refused(dtype: torch.dtype) -> None:
    noise, data = draw_pair((4, 4), seed=0)
    with pytest.raises(TypeError, match=r"t\.float\(\)"):
        Straight().interpolate(noise, data, torch.ones(4, dtype=dtype))


def test_pairs_are_not_broadcast() -> None:
    noise, data = draw_pair((4, 4), seed=0)
    with pytest.raises(ValueError, match="one shape"):
        Straight().interpolate(noise[:1], data, torch.ones(4))


@pytest.mark.parametrize("values", [[0.5], [[0.9, 0.5]]], ids=["one", "2d"])
def test_schedule_of_the_wrong_shape_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="N >= 2"):
        VariancePreserving(values)


@pytest.mark.parametrize(
    "values",
    [SD_BETAS, [0.9, 0.9, 0.5], [1.1, 0.5], [0.5, -0.1], [0.9, float("nan")]],
    ids=["betas", "flat", "above 1", "below 0", "nan"],
)
def test_impossible_schedule_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="from_betas"):
        VariancePreserving(values)


@pytest.mark.parametrize("values", [[0.1, 0.0], [0.1, 1.1], [0.1, float("nan")]], ids=["zero", "above 1", "nan"])
def test_impossible_betas_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"betas in \(0, 1\]"):
        VariancePreserving.from_betas(values)


def test_a_schedule_that_ends_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="strictly decreasing within"):
        VariancePreserving([0.9, 0.5, -0.1])


def test_betas_are_taken_in_double_precision_up_to_one() -> None:
    betas = [0.001 * k for k in range(1, 200)]
    product, expected = 1.0, []
    for beta in betas:
        product *= 1 - beta
        expected.append(product)
    found = VariancePreserving.from_betas(betas).alphas_cumprod
    assert max(abs(a / b - 1) for a, b in zip(found, expected, strict=True)) < 1e-13
    assert VariancePreserving.from_betas([0.1, 1.0]).alphas_cumprod[-1] == 0
