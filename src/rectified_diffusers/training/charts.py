"""Curves and bars as inline SVG, for the report of a run; no library, so that any installation can draw them."""

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 30
LOGARITHMIC_FROM = 30
"""A curve of positive values is drawn over a logarithmic axis if its largest is this many times its smallest."""

Point = tuple[float, float]


def curve(title: str, points: Sequence[Point], note: str = "", noisy: bool = True) -> str:
    """Draw y over x as a figure; a noisy curve of 40 points or more is pale, with its running mean above it."""
    xs, ys = zip(*points, strict=True)
    logarithmic = min(ys) > 0 and max(ys) > LOGARITHMIC_FROM * min(ys)
    x_axis, y_axis = _Axis(xs, LEFT, WIDTH - RIGHT), _Axis(ys, HEIGHT - BOTTOM, TOP, logarithmic)
    noisy = noisy and len(points) >= 40
    lines = [_polyline(points, x_axis, y_axis, "raw")] if noisy else []
    lines.append(_polyline(_running_mean(points) if noisy else points, x_axis, y_axis, "smooth"))
    if len(points) <= 12:
        lines += [f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3"/>' for x, y in points]
    note = ", ".join(filter(None, [note, "logarithmic axis" if logarithmic else ""]))
    return _figure(title, note, _grid(x_axis, y_axis) + lines)


def bars(title: str, heights: Sequence[float], edges: Sequence[float], note: str = "") -> str:
    """Draw a bar from edge to edge for each height; edges are one more than bars."""
    x_axis, y_axis = _Axis(edges, LEFT, WIDTH - RIGHT), _Axis([0.0, *heights], HEIGHT - BOTTOM, TOP)
    drawn = []
    for height, left, right in zip(heights, edges[:-1], edges[1:], strict=True):
        x, top, base = x_axis(left), y_axis(height), y_axis(0)
        drawn.append(
            f'<rect class="bar" x="{x + 1:.1f}" y="{top:.1f}" width="{x_axis(right) - x - 2:.1f}" '
            f'height="{base - top:.1f}"><title>{left:.3g} to {right:.3g}: {height:.4g}</title></rect>'
        )
    return _figure(title, note, _grid(x_axis, y_axis) + drawn)


class _Axis:
    """A map from values to pixels, and the round values to mark on it."""

    def __init__(self, values: Sequence[float], start: float, end: float, logarithmic: bool = False) -> None:
        self.start, self.end, self.logarithmic = start, end, logarithmic
        low, high = (self._scale(value) for value in (min(values), max(values)))
        if low == high:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        share = (self._scale(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def ticks(self) -> list[float]:
        """Give about five round values inside the axis."""
        if self.logarithmic:
            factors = (1, 2, 5) if self.high - self.low < 2 else (1,)
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            values = [factor * 10.0**power for power in powers for factor in factors]
            values = [value for value in values if self.low <= math.log10(value) <= self.high]
            return values[:: max(1, len(values) // 6)]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _running_mean(points: Sequence[Point]) -> list[Point]:
    """Average y over a window of about a fortieth of the points to either side."""
    reach = max(1, len(points) // 40)
    windows = [[y for _, y in points[max(0, i - reach) : i + reach + 1]] for i in range(len(points))]
    return [(x, math.fsum(window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


def _polyline(points: Sequence[Point], x_axis: _Axis, y_axis: _Axis, kind: str) -> str:
    path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}"/>'


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    lines = []
    for value in y_axis.ticks():
        y = y_axis(value)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_shown(value)}</text>')
    for value in x_axis.ticks():
        x = x_axis(value)
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_shown(value)}</text>')
    return lines


def _shown(value: float) -> str:
    """Write a tick as briefly as it can be read: 20000 is 20k, 0.0000025 is 2.5e-6."""
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else f"{value:.1e}".replace("e-0", "e-")
    return f"{value / 1000:.4g}k" if abs(value) >= 1000 else f"{value:.4g}"


def _figure(title: str, note: str, lines: Sequence[str]) -> str:
    caption = html.escape(title) + (f" <span>{html.escape(note)}</span>" if note else "")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(lines)}</svg>'
    return f'<figure class="chart"><figcaption>{caption}</figcaption>{svg}</figure>'
