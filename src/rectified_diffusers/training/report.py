"""The report of a run, report.html: metrics, curves and validation images in one file."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rectified_diffusers.evaluation.straightness import Straightness
from rectified_diffusers.files import write_atomically
from rectified_diffusers.training.run_folder import RECORD

REPORT = "report.html"
MAX_SHEETS, MAX_WIDTH = 24, 1280
"""Limits that keep a report below about 10 MB: of more sheets every n-th is shown, and wider ones are scaled down."""

# Columns of log.jsonl, each with its heading and a note.
CURVES = {
    "loss": ("Loss", "mean over the steps since the previous point"),
    "fake_loss": ("Loss of the fake velocity", "mean of its updates since the previous point"),
    "straightness": ("Straightness S(Z)", "0 is a flow of straight lines, which one step draws exactly"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", ""),
}


def write_report(folder: str | Path, prompts: Sequence[str] = (), straightness: Straightness | None = None) -> Path:
    """Write `report.html` to the folder of a run, finished or not, and return its path. Trainers do so automatically.

    Args:
        prompts: prompts of the columns of the validation sheets.
        straightness: S(Z) of the finished model, if it was measured.
    """
    folder = Path(folder)
    if not (folder / "log.jsonl").exists():
        raise ValueError(f"Expected the folder of a run, got {folder}, which holds no log.jsonl. Train there first.")
    path = folder / RECORD
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    page = render_report(folder, record, prompts, straightness)
    write_atomically(folder / REPORT, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return folder / REPORT


def render_report(
    folder: Path, record: dict[str, Any], prompts: Sequence[str] = (), straightness: Straightness | None = None
) -> str:
    """Return the page of a run: the available curves from log.jsonl, the sheets in validation/ and the record.

    Args:
        record: current or future content of training.json; empty for a run in progress.
        prompts, straightness: as for `write_report`.
    """
    log = folder / "log.jsonl"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    # A process that is writing, or was killed, leaves a partial line.
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    body = [
        _heading(record),
        _tiles(lines, record, straightness),
        _charts(lines, straightness),
        _sheets(sorted((folder / "validation").glob("step-*.png")), prompts),
        _options(record),
    ]
    return _PAGE.replace("{title}", html.escape(_title(record))).replace("{body}", "\n".join(body))


def _title(record: dict[str, Any]) -> str:
    return f"{record['trainer']}, {record['steps']:,} steps" if record else "Training"


def _heading(record: dict[str, Any]) -> str:
    state = "" if record else "<p>This run is not finished: what it has logged so far.</p>"
    return f"<header><h1>{html.escape(_title(record))}</h1>{state}</header>"


def _tiles(lines: list[dict[str, Any]], record: dict[str, Any], straightness: Straightness | None) -> str:
    """Return the tiles with the most important numbers."""
    tiles: list[tuple[str, str]] = []
    if lines:
        best = min(lines, key=lambda line: line["loss"])
        tiles += [("steps logged", f"{lines[-1]['step']:,}"), ("last loss", f"{lines[-1]['loss']:.4g}")]
        tiles += [("lowest loss", f"{best['loss']:.4g} at step {best['step']:,}")]
    if straightness is not None:
        tiles += [(f"S(Z) of {straightness.count} paths", f"{straightness.total:.4g}")]
    if record:
        tiles += [("triplets", f"{record['dataset_rows']:,}"), ("batch", f"{record['batch_size']:,}")]
    cells = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in tiles)
    return f'<section class="tiles">{cells}</section>'


def _charts(lines: list[dict[str, Any]], straightness: Straightness | None) -> str:
    drawn = []
    for key, (title, note) in CURVES.items():
        points = [(line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]
        if points:
            drawn.append(curve(title, points, note, noisy=key != "learning_rate"))
    if straightness is not None:
        note = "mean of the integrand; t = 0 is noise, t = 1 is data"
        drawn.append(bars("Straightness over t", straightness.per_bin, straightness.edges, note))
    return f'<section class="charts">{"".join(drawn)}</section>'


def _sheets(paths: list[Path], prompts: Sequence[str]) -> str:
    """Return the validation sheets, one at a time with a slider, the last one first; without scripts, all of them."""
    if not paths:
        return ""
    spacing = (len(paths) - 1) / max(1, min(len(paths), MAX_SHEETS) - 1)
    chosen = [paths[round(i * spacing)] for i in range(min(len(paths), MAX_SHEETS))]
    figures = []
    for path in chosen:
        name = f"step {int(path.stem.removeprefix('step-')):,}"
        figures.append(f'<figure><figcaption>{name}</figcaption><img alt="{name}" src="{_data_uri(path)}"></figure>')
    columns = "".join(f"<span>{html.escape(prompt)}</span>" for prompt in prompts)
    omitted = f"<p>{len(chosen)} of {len(paths)} sheets.</p>" if len(chosen) < len(paths) else ""
    last = len(chosen) - 1
    return (
        f'<section class="sheets" style="--columns:{max(1, len(prompts))}"><h2>Validation pictures</h2>{omitted}'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="validation sheet" hidden>'
        f'{"".join(figures)}<div class="prompts">{columns}</div></section>'
    )


def _data_uri(path: Path) -> str:
    with Image.open(path) as image:
        image = image.convert("RGB")
        if image.width > MAX_WIDTH:
            size = (MAX_WIDTH, round(image.height * MAX_WIDTH / image.width))
            image = image.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _options(record: dict[str, Any]) -> str:
    if not record:
        return ""
    shown = {name: json.dumps(value, ensure_ascii=False) for name, value in record.items()}
    rows = "".join(f"<tr><th>{html.escape(name)}<td>{html.escape(value)}" for name, value in shown.items())
    return f"<section><h2>What made it</h2><table>{rows}</table><p>From {RECORD}, beside this file.</p></section>"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --ink: #1d2433; --soft: #687085; --line: #dfe3ec; --card: #fff; --page: #f5f6fa;
  --curve: #4553d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaf2; --soft: #9aa2b8; --line: #333a4d; --card: #1d2230;
  --page: #141822; --curve: #93a0ff; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
section { margin-top: 1.5rem; } p { color: var(--soft); margin: .3rem 0; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; }
.tiles div, .chart, .sheets, section:has(table) { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; padding: .8rem 1rem; }
.tiles b { display: block; font-size: 1.2rem; } .tiles span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: .75rem; }
.chart { margin: 0; } .chart figcaption { font-weight: 600; } .chart figcaption span { font-weight: 400;
  color: var(--soft); }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .grid { stroke: var(--line); } svg .raw { fill: none; stroke: var(--curve); opacity: .35; }
svg .smooth { fill: none; stroke: var(--curve); stroke-width: 2; } svg .bar { fill: var(--curve); opacity: .8; }
svg circle { fill: var(--curve); }
.sheets input { width: 100%; }
.sheets figure, .prompts { max-width: calc(var(--columns) * 18rem); }
.sheets figure { margin: .5rem 0 0; } .sheets img { width: 100%; display: block;
  border-radius: .3rem; }
.sheets figcaption { color: var(--soft); } .prompts { display: grid; text-align: center; font-size: .85rem;
  grid-template-columns: repeat(var(--columns), 1fr); }
table { border-collapse: collapse; font-size: .9rem; } th { text-align: left; font-weight: 500; color: var(--soft);
  padding: .1rem 1.5rem .1rem 0; } td { font-family: ui-monospace, monospace; }
</style>
<body>
{body}
<script>
for (const part of document.querySelectorAll(".sheets")) {
  const slider = part.querySelector("input"), figures = [...part.querySelectorAll("figure")];
  const show = () => figures.forEach((figure, i) => { figure.hidden = i !== Number(slider.value); });
  slider.hidden = figures.length < 2;
  slider.addEventListener("input", show);
  show();
}
</script>
</body>
</html>
"""

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 30
LOGARITHMIC_FROM = 30
"""A curve of positive values has a logarithmic axis if its largest value exceeds this many times its smallest."""

Point = tuple[float, float]


def curve(title: str, points: Sequence[Point], note: str = "", noisy: bool = True) -> str:
    """Plot y over x as a figure; a noisy curve of 40 points or more is pale, with its running mean on top."""
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
    """Plot a bar for each height, from edge to edge; there is one more edge than there are bars."""
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
    """Mapping from values to pixels, with round tick values."""

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
        """Return about five round values within the range of the axis."""
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
    """Return the mean of y over a window of about 1/40 of the points on either side."""
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
    """Return a short, readable tick label: 20000 is 20k, 0.0000025 is 2.5e-6."""
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else f"{value:.1e}".replace("e-0", "e-")
    return f"{value / 1000:.4g}k" if abs(value) >= 1000 else f"{value:.4g}"


def _figure(title: str, note: str, lines: Sequence[str]) -> str:
    caption = html.escape(title) + (f" <span>{html.escape(note)}</span>" if note else "")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(lines)}</svg>'
    return f'<figure class="chart"><figcaption>{caption}</figcaption>{svg}</figure>'
