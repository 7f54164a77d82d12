"""Confidence intervals of figures over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean of a figure over seeds, with the half width of its 95% confidence interval.

    Attributes:
        half_width: t * s / sqrt(n), with Student's t of n - 1 degrees of freedom; None for a single seed, which says
            nothing about the spread.
        values: the figure of each seed.
    """

    mean: float
    half_width: float | None
    values: tuple[float, ...]

    def __format__(self, spec: str) -> str:
        """Format mean and half width with one spec: `f"{interval:.1f}"` is `21.4 ± 0.3`."""
        mean = format(self.mean, spec)
        return mean if self.half_width is None else f"{mean} ± {format(self.half_width, spec)}"


def interval_of(values: Sequence[float]) -> Interval:
    """Give the interval of a figure from its values, one per seed."""
    if not values:
        raise ValueError("an interval needs the figure of at least one seed, got none.")
    if len(values) == 1:
        return Interval(values[0], None, tuple(values))
    from scipy.stats import t as student

    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(fmean(values), quantile * stdev(values) / math.sqrt(len(values)), tuple(values))
