from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rectified_diffusers.flow import LOSS_KINDS, LossKind, Straight, pseudo_huber, velocity_loss
from tests.flow.cases import SHAPES, draw_pair, spread

all_kinds = pytest.mark.parametrize("kind", LOSS_KINDS)
seeds = st.integers(0, 2**31)
shapes = st.sampled_from(SHAPES)


@all_kinds
@given(seed=seeds, shape=shapes)
def test_one_value_per_example_of_that_example_alone(kind: LossKind, seed: int, shape: tuple[int, ...]) -> None:
    predicted, target = draw_pair(shape, seed)
    values = velocity_loss(predicted, target, kind)
    assert values.shape == shape[:1]
    for i in range(shape[0]):
        torch.testing.assert_close(values[i : i + 1], velocity_loss(predicted[i : i + 1], target[i : i + 1], kind))


@given(seed=seeds, shape=shapes)
def test_l2_is_the_mean_square(seed: int, shape: tuple[int, ...]) -> None:
    predicted, target = draw_pair(shape, seed)
    torch.testing.assert_close(
        velocity_loss(predicted, target).mean(), torch.nn.functional.mse_loss(predicted, target)
    )


@given(seed=seeds, shape=shapes, scale=st.floats(1e-3, 1e3))
def test_pseudo_huber_is_its_formula(seed: int, shape: tuple[int, ...], scale: float) -> None:
    predicted, target = draw_pair(shape, seed)
    error = scale * (predicted - target)
    c = 0.00054 * error[0].numel()
    expected = (error.flatten(1).norm(dim=1) ** 2 + c**2).sqrt() - c
    torch.testing.assert_close(pseudo_huber(error), expected, rtol=1e-6, atol=1e-9)


def test_pseudo_huber_between_square_and_norm() -> None:
    error = torch.ones(1, 100, dtype=torch.float64)  # norm 10 against c = 0.054
    assert pseudo_huber(error).item() == pytest.approx(10, abs=0.06)
    # The plain formula gives 0 here in float32: sqrt(c^2 + 1e-12) - c.
    small = torch.full((1, 100), 1e-7)
    assert pseudo_huber(small).item() == pytest.approx(1e-12 / (2 * 0.054), rel=1e-4)


@all_kinds
def test_gradient_is_finite_at_a_perfect_prediction(kind: LossKind) -> None:
    predicted = torch.ones(2, 3, requires_grad=True)
    velocity_loss(predicted, torch.ones(2, 3), kind).sum().backward()
    assert predicted.grad is not None
    assert (predicted.grad == 0).all()


@given(seed=seeds, t=st.floats(0.05, 0.95))
def test_the_loss_of_the_data_is_that_of_the_velocity_times_the_square_of_the_rest(seed: int, t: float) -> None:
    noise, data = draw_pair((4, 4, 4, 4), seed)
    predicted, _ = draw_pair((4, 4, 4, 4), seed + 1)
    times = spread(t, 4)
    x_t, velocity = Straight().interpolate(noise, data, times)
    data_hat = x_t + (1 - times).reshape(4, 1, 1, 1) * predicted
    torch.testing.assert_close(velocity_loss(data_hat, data), (1 - times) ** 2 * velocity_loss(predicted, velocity))


@all_kinds
def test_narrow_inputs_are_compared_in_float32(kind: LossKind) -> None:
    predicted, target = (100 * x.half() for x in draw_pair((2, 4, 64, 64), seed=0))  # a sum of squares above 65504
    values = velocity_loss(predicted, target, kind)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, velocity_loss(predicted.float(), target.float(), kind))


def test_broadcast_is_refused() -> None:
    predicted, target = draw_pair((4, 4), seed=0)
    with pytest.raises(ValueError, match="Nothing is broadcast"):
        velocity_loss(predicted, target[:, :1])


def test_unknown_kind_names_the_known() -> None:
    predicted, target = draw_pair((4, 4), seed=0)
    with pytest.raises(ValueError, match="l2, pseudo_huber, got 'l1'"):
        velocity_loss(predicted, target, "l1")
