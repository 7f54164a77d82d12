import math

import pytest
import torch

from rectified_diffusers.evaluation.intervals import GROUPS, Interval, interval_of, jackknife, merged, ratio_of
from rectified_diffusers.evaluation.metrics import mean_interval, transport_cost
from tests.marks import slow_but


def test_three_values_have_the_interval_of_student():
    interval = interval_of([1.0, 2.0, 3.0])
    assert interval.mean == 2
    # t of 2 degrees of freedom at 97.5% is 4.30265
    assert interval.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert f"{interval:.1f}" == "2.0 ± 2.5"


def test_the_mean_lies_in_95_of_100_intervals():
    draws = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    intervals = [interval_of(values) for values in draws.tolist()]
    hits = sum(abs(interval.mean) <= (interval.half_width or 0.0) for interval in intervals)
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_one_value_says_nothing_about_the_spread():
    interval = interval_of([5.0])
    assert interval.half_width is None
    assert f"{interval:.2f}" == "5.00"


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """With an item in each group: s / sqrt(n). With groups of several items: that of the means of the groups."""
    values = torch.randn(GROUPS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = mean_interval(values, torch.arange(GROUPS))
    assert found.mean == pytest.approx(values.mean().item())
    assert math.hypot(*found.deviations) == pytest.approx(values.std().item() / math.sqrt(GROUPS))
    # t of 19 degrees of freedom at 97.5% is 2.093
    assert found.over_images == pytest.approx(2.093024 * values.std().item() / math.sqrt(GROUPS))
    several = values.repeat_interleave(3) + torch.tensor([0.5, 0, -0.5], dtype=torch.float64).repeat(GROUPS)
    again = mean_interval(several, torch.arange(GROUPS).repeat_interleave(3))
    assert again.deviations == pytest.approx(found.deviations)
    assert f"{found:.2f}" == f"{found.mean:.2f} ± {found.over_images:.2f}"


@pytest.mark.parametrize("biased", slow_but([True], [False, True]))
def test_the_true_value_lies_in_95_of_100_intervals_over_images(biased):
    """Of groups of unequal size, of a mean and of a statistic with a bias that depends on the number of items."""
    groups, hits = torch.cat([torch.arange(GROUPS), torch.arange(7), torch.arange(4)]), 0
    effects = torch.randn(1000, GROUPS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(1000, len(groups), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for effect, own in zip(effects, noise, strict=True):
        values = effect[groups] * 0.5 + own
        found = jackknife(
            lambda kept, values=values: values[kept].mean().item() + biased * 50 / int(kept.sum()), groups
        )
        hits += abs(found.mean - biased * 50 / len(groups)) <= (found.over_images or 0.0)
    assert hits / 1000 == pytest.approx(0.95, abs=0.025)


def test_groups_that_do_not_occur_do_not_count():
    values, groups = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64), torch.tensor([3, 3, 17, 17])
    found = mean_interval(values, groups)
    assert len(found.deviations) == GROUPS
    assert [i for i, d in enumerate(found.deviations) if d] == [3, 17]
    assert found.over_images == pytest.approx(12.7062047 * 1.5)  # one degree of freedom, means 1.5 and 4.5
    assert mean_interval(values, torch.zeros(4, dtype=torch.int64)) == Interval(3.0, None, (3.0,))
    assert mean_interval(values[:2], torch.tensor([0, 1])).over_images is None  # one image would be left


def test_seeds_and_trainings_keep_the_interval_over_images():
    of_seeds = [interval_of([1.0], [0.3, 0.0]), interval_of([2.0], [0.1, 0.2])]
    both = merged(of_seeds)
    assert both == interval_of([1.0, 2.0], [0.2, 0.1])
    assert (both.mean, both.half_width) == (1.5, pytest.approx(12.7062047 * 0.5))
    assert merged([both, interval_of([3.0], [0.0, 0.1])]).values == (1.5, 3.0)
    assert merged([*of_seeds, interval_of([3.0])]).deviations == ()


def test_a_ratio_is_plain_or_above_the_floor():
    """With the figures of the bundled model and its teacher in benchmarks/results/emoji_one_step.md."""
    student, teacher, floor = interval_of([213.42]), interval_of([176.32]), interval_of([66.35])
    assert f"{ratio_of(student, teacher):.2f}" == "1.21"
    assert f"{ratio_of(student, teacher, floor):.2f}" == "1.34"
    assert ratio_of(student, floor, teacher) is None
    trained = ratio_of(interval_of([200.0, 220.0]), teacher, floor)
    assert trained is not None
    assert trained.values == pytest.approx([133.65 / 109.97, 153.65 / 109.97])


def test_the_interval_of_a_ratio_is_that_of_the_jackknife_of_the_ratio():
    """To first order; a model that is a multiple of the reference above the floor has a ratio without an error."""
    draws = torch.rand(3, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student, teacher, floor = draws + torch.tensor([[3.0], [2.0], [0.0]], dtype=torch.float64)
    groups = torch.arange(400) % GROUPS
    found = ratio_of(*(mean_interval(values, groups) for values in (student, teacher, floor)))
    direct = jackknife(lambda kept: ((student - floor)[kept].mean() / (teacher - floor)[kept].mean()).item(), groups)
    assert found is not None
    assert found.mean == pytest.approx(direct.mean)
    assert found.over_images == pytest.approx(direct.over_images, rel=0.02)
    exact = ratio_of(*(mean_interval(values, groups) for values in (floor + 2 * (teacher - floor), teacher, floor)))
    assert exact is not None
    assert exact.mean == pytest.approx(2)
    assert math.hypot(*exact.deviations) < 1e-12


def test_the_transport_cost_is_the_mean_over_pairs():
    noise, data = torch.randn(2, 50, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = 0.8 * noise + 0.6 * data + 1
    found = transport_cost(noise, data)
    distances = (data.flatten(1)[:, None] - noise.flatten(1)[None]).square().mean(dim=2)
    others = distances[~torch.eye(50, dtype=torch.bool)]
    assert found["coupled"].mean == pytest.approx(distances.diagonal().mean().item())
    assert found["independent"].mean == pytest.approx(others.mean().item())
    assert found["ratio"].mean == pytest.approx((distances.diagonal().mean() / others.mean()).item())
    for key, statistic in (
        ("coupled", lambda kept: distances[kept][:, kept].diagonal().mean().item()),
        ("independent", lambda kept: distances[kept][:, kept][~torch.eye(int(kept.sum())).bool()].mean().item()),
    ):
        direct = jackknife(statistic, torch.arange(50) % GROUPS)
        assert found[key].over_images == pytest.approx(direct.over_images)


def test_independent_pairs_cost_as_much_as_the_independent_coupling():
    noise, data = torch.randn(2, 2000, 16, generator=torch.Generator().manual_seed(0))
    ratio = transport_cost(noise, data)["ratio"]
    assert abs(ratio.mean - 1) < 2 * (ratio.over_images or 0.0)
    assert 0 < (ratio.over_images or 0.0) < 0.02


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((2, 4), (2, 4))])
def test_the_transport_cost_needs_pairs(shapes):
    with pytest.raises(ValueError, match="of at least 3 pairs"):
        transport_cost(*(torch.zeros(shape) for shape in shapes))
