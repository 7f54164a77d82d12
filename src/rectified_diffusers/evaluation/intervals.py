"""Confidence intervals of metrics: over images by a jackknife, and over seeds or trainings; ratios of metrics."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

CONFIDENCE = 0.95
GROUPS = 20  # groups of captions of the jackknife


@dataclass(frozen=True)
class Interval:
    """A metric's mean over seeds or trainings, with 95% confidence intervals.

    Attributes:
        half_width: half width of the interval over `values`: t * s / sqrt(n), with Student's t for n - 1 degrees of
            freedom. None for a single value, which gives no information about the spread.
        values: the metric's value for each seed or training.
        deviations: how far each group of images moves the mean, see `jackknife`. The sum of their squares is the
            variance of the mean over images. Empty if not measured.
    """

    mean: float
    half_width: float | None
    values: tuple[float, ...]
    deviations: tuple[float, ...] = ()

    @property
    def over_images(self) -> float | None:
        """Half width of the interval over images; None if it was not measured."""
        groups = sum(deviation != 0 for deviation in self.deviations)
        if groups < 2:
            return None
        return _quantile(groups - 1) * math.hypot(*self.deviations)

    def __format__(self, spec: str) -> str:
        """Format mean and half width, over images if measured: `f"{interval:.1f}"` is `21.4 ± 0.3`."""
        half_width = self.half_width if self.over_images is None else self.over_images
        mean = format(self.mean, spec)
        return mean if half_width is None else f"{mean} ± {format(half_width, spec)}"


def interval_of(values: Sequence[float], deviations: Sequence[float] = ()) -> Interval:
    """Return the interval of a metric from its values, one per seed or training."""
    if len(values) == 1:
        return Interval(values[0], None, tuple(values), tuple(deviations))
    half_width = _quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values), half_width, tuple(values), tuple(deviations))


def merged(intervals: Sequence[Interval]) -> Interval:
    """Return the interval over several seeds or trainings from the interval of each."""
    means = [interval.mean for interval in intervals]
    if not all(interval.deviations for interval in intervals):
        return interval_of(means)
    columns = zip(*(interval.deviations for interval in intervals), strict=True)
    return interval_of(means, [fmean(column) for column in columns])


def jackknife(statistic: Callable[[Tensor], float], groups: Tensor) -> Interval:
    """Return a statistic of items with its deviations over images, by leaving out each group of items in turn.

    The delete-m_j jackknife (Busing, Meijer and van der Leeden 1999, doi:10.1023/A:1008800423698). With group j a
    share 1 / h_j of the items, the pseudo-value of the group is p_j = h_j s - (h_j - 1) s_j, where s is the statistic
    of all items and s_j that without the group. With p the mean of p_j weighted by 1 / h_j, and G groups, the
    deviation is d_j = (p_j - p) / sqrt(G (h_j - 1)). A bias in proportion to 1 / n, as the Frechet distance has, moves
    all p_j alike and does not widen the interval.

    Args:
        statistic: a function of the items that are kept, a mask `(N,)`.
        groups: the group of each item `(N,)`, below GROUPS. Groups that do not occur have the deviation 0.
    """
    whole, counts = statistic(torch.ones(len(groups), dtype=torch.bool)), torch.bincount(groups, minlength=GROUPS)
    present = counts.nonzero()[:, 0].tolist()
    if len(present) < 2 or len(groups) - int(counts.max()) < 2:
        return interval_of([whole])
    inverse = {group: len(groups) / int(counts[group]) for group in present}  # h_j
    pseudo = {group: h * whole - (h - 1) * statistic(groups != group) for group, h in inverse.items()}
    center = sum(pseudo[group] / h for group, h in inverse.items())
    scaled = {group: (pseudo[group] - center) / math.sqrt(len(present) * (h - 1)) for group, h in inverse.items()}
    return interval_of([whole], [scaled.get(group, 0.0) for group in range(GROUPS)])


def ratio_of(value: Interval, reference: Interval, floor: Interval | None = None) -> Interval | None:
    """Return (value - floor) / (reference - floor), or the plain ratio without a floor.

    The interval over images follows from the deviations, to first order. It accounts for the same captions in all
    three. The interval over trainings is that of `value`, with the reference and the floor as given.

    Returns:
        None if the reference is not above the floor, so that the ratio means nothing.
    """
    zero = floor.mean if floor else 0.0
    bottom = reference.mean - zero
    if bottom <= 0:
        return None
    ratio = (value.mean - zero) / bottom
    values = [(own - zero) / bottom for own in value.values]
    if not (value.deviations and reference.deviations and (floor is None or floor.deviations)):
        return interval_of(values)
    of_floor = floor.deviations if floor else [0.0] * GROUPS
    columns = zip(value.deviations, reference.deviations, of_floor, strict=True)
    return interval_of(values, [(v - f - ratio * (r - f)) / bottom for v, r, f in columns])


def _quantile(degrees: int) -> float:
    """Return the quantile of Student's t for a two-sided interval."""
    from scipy.stats import t as student

    return float(student.ppf((1 + CONFIDENCE) / 2, degrees))
