import pytest
import torch

from rectified_diffusers.evaluation.metrics import kernel_distance, kernel_interval, squared_discrepancy


def features(count, seed, shift=0.0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift


def test_it_is_the_sum_over_pairs():
    x, y = features(5, 0).double(), features(4, 1).double()
    k = lambda a, b: (float(a @ b) / 6 + 1) ** 3  # noqa: E731
    within_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 20
    within_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 12
    between = sum(k(a, b) for a in x for b in y) / 20
    assert squared_discrepancy(x, y) == pytest.approx(within_x + within_y - 2 * between)


def test_agrees_with_torch_fidelity():
    library = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = features(40, 0), features(40, 1, shift=0.3)
    options = {"kid_subsets": 1, "kid_subset_size": 40, "kid_degree": 3, "kid_gamma": None, "kid_coef0": 1}
    theirs = library.kid_features_to_metric(x, y, **options, rng_seed=0, verbose=False)
    assert squared_discrepancy(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)


def test_equal_distributions_are_at_zero_on_average():
    values = [squared_discrepancy(features(20, seed), features(20, seed + 1000)) for seed in range(200)]
    mean, error = torch.tensor(values).mean(), torch.tensor(values).std() / 200**0.5
    assert abs(mean) < 3 * error
    assert min(values) < 0 < max(values)


def test_subsets_estimate_the_same_and_repeat():
    x, y = features(300, 0), features(300, 1, shift=0.5)
    found = kernel_distance(x, y, subsets=50, subset_size=100)
    assert found == pytest.approx(squared_discrepancy(x, y), rel=0.1)
    assert found != squared_discrepancy(x, y)
    assert found == kernel_distance(x, y, subsets=50, subset_size=100)
    assert kernel_distance(x, y) == squared_discrepancy(x, y)


def test_the_interval_leaves_groups_of_images_out_of_both_sets():
    x, y = features(40, 0).double(), features(40, 1, shift=0.3).double()
    groups = torch.arange(40) * 7 % 20
    found = kernel_interval(x, y, groups)
    assert found.mean == squared_discrepancy(x, y)
    kept = [squared_discrepancy(x[groups != g], y[groups != g]) for g in range(20)]
    variance = 19 / 20 * sum((value - sum(kept) / 20) ** 2 for value in kept)
    assert sum(d**2 for d in found.deviations) == pytest.approx(variance)


def test_the_interval_of_many_images_is_that_of_the_chunks_together():
    """More images than are read at once, and than a subset of the kernel distance has."""
    x, y = features(2100, 0), features(2100, 1, shift=0.1)
    groups = torch.arange(2100) % 20
    found = kernel_interval(x, y, groups)
    assert found.mean == kernel_distance(x, y)
    whole = squared_discrepancy(x, y)
    kept = [squared_discrepancy(x[groups != g], y[groups != g]) for g in (0, 19)]
    pseudo = [20 * whole - 19 * value for value in kept]
    deviations = found.deviations[0], found.deviations[19]
    difference = (pseudo[0] - pseudo[1]) / (20 * 19) ** 0.5
    assert deviations[0] - deviations[1] == pytest.approx(difference)
