import math

import pytest
import torch

from rectified_diffusers.evaluation.intervals import interval_of


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
    with pytest.raises(ValueError, match="at least one seed"):
        interval_of([])
