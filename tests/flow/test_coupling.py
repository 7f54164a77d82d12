from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st

from rectified_diffusers.flow import given, independent, minibatch_optimal_transport
from tests.flow.cases import draw_pair

COUPLINGS = (given, independent, minibatch_optimal_transport)


def transport_cost(noise: torch.Tensor, data: torch.Tensor) -> float:
    return (data - noise).square().sum().item()


def test_given_keeps_the_pairs() -> None:
    noise, data = draw_pair((4, 4, 4, 4), seed=0)
    found_noise, found_data = given(noise, data)
    assert found_noise is noise
    assert found_data is data


def test_independent_draws_fresh_normal_noise() -> None:
    data = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise, found_data = independent(data, data, torch.Generator().manual_seed(1))  # a coupling as tight as can be
    assert found_data is data
    correlation = torch.corrcoef(torch.stack([noise.flatten(), data.flatten()]))[0, 1]
    assert abs(correlation) < 4 / data.numel() ** 0.5
    assert abs(noise.mean()) < 4 / data.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, abs=4 / data.numel() ** 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_independent_depends_on_its_generator_alone(dtype: torch.dtype) -> None:
    noise, data = (x.to(dtype) for x in draw_pair((1, 4), seed=0))
    first, _ = independent(noise, data, torch.Generator().manual_seed(7))
    second, _ = independent(2 * noise, data, torch.Generator().manual_seed(7))
    other, _ = independent(noise, data, torch.Generator().manual_seed(8))
    assert first.dtype == dtype
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not torch.equal(first, noise)


@for_all(seed=st.integers(0, 2**31), size=st.integers(1, 5))
def test_optimal_transport_against_brute_force(seed: int, size: int) -> None:
    noise, data = draw_pair((size, 2, 3), seed)
    found_noise, found_data = minibatch_optimal_transport(noise, data)
    assert found_data is data
    least = min(transport_cost(noise[list(order)], data) for order in permutations(range(size)))
    assert transport_cost(found_noise, found_data) == pytest.approx(least, rel=1e-12)


def test_optimal_transport_moves_whole_rows_of_noise() -> None:
    noise, data = draw_pair((16, 4, 4), seed=0)
    found, _ = minibatch_optimal_transport(noise, data)
    same = (found[:, None] == noise[None]).flatten(2).all(-1)
    assert (same.sum(0) == 1).all()
    assert (same.sum(1) == 1).all()


def test_optimal_transport_undoes_a_shuffle() -> None:
    """Noise close to its data, in another order, in a dtype numpy has not, with a gradient in the way."""
    _, data = draw_pair((16, 4, 4), seed=0)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    near = (data + 0.01)[order].bfloat16().requires_grad_()
    found, _ = minibatch_optimal_transport(near, data.bfloat16())
    torch.testing.assert_close(found.double(), data, atol=0.05, rtol=0)


@pytest.mark.parametrize("coupling", COUPLINGS, ids=lambda c: c.__name__)
def test_pairs_of_different_shape_are_refused(coupling: Callable[..., object]) -> None:
    noise, data = draw_pair((4, 4), seed=0)
    with pytest.raises(ValueError, match="noise and data of one shape"):
        coupling(noise[:2], data, torch.Generator())


def test_independent_noise_is_the_same_whatever_the_default_dtype_is() -> None:
    noise, data = draw_pair((2, 3), seed=0)
    expected, _ = independent(noise, data, torch.Generator().manual_seed(5))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        drawn, _ = independent(noise, data, torch.Generator().manual_seed(5))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(drawn, expected)
