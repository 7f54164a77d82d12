from __future__ import annotations

import math

import pytest
import torch

from rectified_diffusers.flow import FixedTime, Grid, LogitNormal, TimeDensity, Uniform, UShaped

COUNT = 20_000
CONTINUOUS = (
    Uniform(),
    LogitNormal(),
    LogitNormal(mean=-0.8, std=0.5),
    LogitNormal(mean=1.0, std=1.7),
    UShaped(),
    UShaped(a=0.01),
    UShaped(a=30.0),
)
DISCRETE = (FixedTime(), FixedTime(0.3), FixedTime(1.0), Grid(1), Grid(7))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def probability(density: TimeDensity, t: torch.Tensor) -> torch.Tensor:
    """Return the probability density at t inside (0, 1), by the formula in the docstring of its class."""
    if isinstance(density, LogitNormal):
        deviation = (torch.logit(t) - density.mean) / density.std
        return torch.exp(-0.5 * deviation.square()) / (density.std * math.sqrt(2 * math.pi) * t * (1 - t))
    if isinstance(density, UShaped):
        return density.a * torch.cosh(density.a * (t - 0.5)) / (2 * math.sinh(density.a / 2))
    return torch.ones_like(t)


def distribution_function(density: TimeDensity, cells: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Integrate the density by the midpoint rule; returns the edges of the cells and F at them."""
    edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    mass = probability(density, (edges[1:] + edges[:-1]) / 2) / cells
    return edges, torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])


@pytest.mark.parametrize("density", CONTINUOUS, ids=repr)
def test_density_integrates_to_one(density: TimeDensity) -> None:
    _, function = distribution_function(density)
    assert function[-1].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("density", CONTINUOUS, ids=repr)
def test_samples_follow_the_density(density: TimeDensity) -> None:
    """Kolmogorov-Smirnov: sqrt(n) * max|F_n - F| is above 1.95 once in a thousand seeds; this seed is fixed."""
    edges, function = distribution_function(density)
    samples = density.sample(COUNT, generator()).double().sort().values
    cell = (samples * (len(edges) - 1)).floor().long().clamp(0, len(edges) - 2)
    within = samples * (len(edges) - 1) - cell
    expected = function[cell] + within * (function[cell + 1] - function[cell])
    ranks = torch.arange(COUNT + 1, dtype=torch.float64) / COUNT
    distance = torch.maximum((ranks[1:] - expected).abs(), (ranks[:-1] - expected).abs()).max()
    assert distance * math.sqrt(COUNT) < 1.95


@pytest.mark.parametrize("density", CONTINUOUS, ids=repr)
def test_moments_follow_the_density(density: TimeDensity) -> None:
    edges, function = distribution_function(density)
    middle, mass = (edges[1:] + edges[:-1]) / 2, function.diff()
    samples = density.sample(COUNT, generator()).double()
    for power in (1, 2):
        mean = (mass * middle**power).sum()
        deviation = ((mass * middle ** (2 * power)).sum() - mean**2).sqrt()
        assert abs(samples.pow(power).mean() - mean) < 4 * deviation / math.sqrt(COUNT)


def test_logit_of_logit_normal_is_normal() -> None:
    logits = torch.logit(LogitNormal(mean=-0.8, std=0.5).sample(COUNT, generator()))
    assert logits.mean().item() == pytest.approx(-0.8, abs=0.015)
    assert logits.std().item() == pytest.approx(0.5, abs=0.015)


def test_positive_mean_of_logit_normal_leans_towards_data() -> None:
    assert LogitNormal(mean=1.0).sample(COUNT, generator()).mean() > 0.6


def test_u_shape_closed_forms() -> None:
    density = UShaped(a=4.0)
    t = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    found = probability(density, t)
    torch.testing.assert_close(found, found.flip(0))
    torch.testing.assert_close(found / found[0], ((4 * t).exp() + (4 - 4 * t).exp()) / (1 + math.exp(4)))
    # Variance of t: 1/4 - coth(a/2)/a + 2/a^2, by parts.
    variance = 1 / 4 - 1 / (4 * math.tanh(2)) + 2 / 16
    assert density.sample(COUNT, generator()).var().item() == pytest.approx(variance, rel=0.02)


def test_fixed_time() -> None:
    assert FixedTime().sample(3, generator()).tolist() == [0, 0, 0]
    assert FixedTime(0.25).sample(2, generator()).tolist() == [0.25, 0.25]


def test_grid_visits_the_times_of_euler_equally() -> None:
    samples = Grid(7).sample(COUNT, generator())
    values, counts = samples.unique(return_counts=True)
    assert torch.equal(values, (torch.arange(7, dtype=torch.float64) / 7).float())
    expected = COUNT / 7
    assert ((counts - expected).square() / expected).sum() < 22.5  # chi-squared, 6 degrees, once in a thousand


@pytest.mark.parametrize("density", CONTINUOUS + DISCRETE, ids=repr)
def test_samples_depend_on_their_generator_alone(density: TimeDensity) -> None:
    torch.manual_seed(1)
    first = density.sample(8, generator(5))
    torch.manual_seed(2)
    second = density.sample(8, generator(5))
    assert first.shape == (8,)
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
    assert ((first >= 0) & (first <= 1)).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_impossible_logit_normal_is_refused(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match="finite std > 0"):
        LogitNormal(mean, std)


@pytest.mark.parametrize("a", [0.0, -4.0, 101.0, math.nan])
def test_impossible_u_shape_is_refused(a: float) -> None:
    with pytest.raises(ValueError, match=r"Uniform\(\)"):
        UShaped(a)


@pytest.mark.parametrize("t", [-0.1, 999.0, math.nan])
def test_impossible_fixed_time_is_refused(t: float) -> None:
    with pytest.raises(ValueError, match="timestep / 1000"):
        FixedTime(t)


def test_empty_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="steps >= 1"):
        Grid(0)


def test_bounds_are_allowed() -> None:
    assert UShaped(0.5).a == 0.5
    assert UShaped(100).a == 100
    assert FixedTime(1.0).t == 1
    assert Grid(1).sample(3, torch.Generator()).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="Expected t in"):
        FixedTime(1.001)


def test_draws_are_these_functions_of_the_generator() -> None:
    """A run that is resumed with a later release sees the same times."""
    normal = torch.randn(100, generator=torch.Generator().manual_seed(5))
    drawn = LogitNormal(0.3, 0.7).sample(100, torch.Generator().manual_seed(5))
    assert torch.equal(drawn, torch.sigmoid(0.3 + 0.7 * normal))
    uniform = torch.rand(100, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(Uniform().sample(100, torch.Generator().manual_seed(5)), uniform.float())
    t = UShaped(4.0).sample(100, torch.Generator().manual_seed(5)).double()
    torch.testing.assert_close(0.5 + torch.sinh(4 * (t - 0.5)) / (2 * math.sinh(2.0)), uniform, rtol=0, atol=1e-6)


@pytest.mark.parametrize("density", [Uniform(), LogitNormal(), UShaped(), FixedTime(0.5), Grid(4)], ids=repr)
def test_draws_are_float32_whatever_the_default_is(density: TimeDensity) -> None:
    expected = density.sample(5, torch.Generator().manual_seed(0))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        drawn = density.sample(5, torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(before)
    assert drawn.dtype == expected.dtype == torch.float32
