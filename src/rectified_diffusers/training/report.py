"""The report of a run, report.html: metrics, charts and validation images in one file."""

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rectified_diffusers.evaluation.plots import new_figure, plot_straightness
from rectified_diffusers.evaluation.straightness import Straightness
from rectified_diffusers.files import write_atomically
from rectified_diffusers.training.identity import STARTING_MODEL
from rectified_diffusers.training.run_folder import RECORD, read_log

REPORT = "report.html"
MAX_SHEETS, MAX_WIDTH = 24, 1280
"""Limits that keep a report below about 10 MB: of more sheets every n-th is shown, and wider ones are scaled down."""

# Columns of log.jsonl, each with its heading and a note.
CURVES = {
    "loss": ("Loss", "mean over the steps since the previous point"),
    "fake_loss": ("Loss of the fake velocity", "mean of its updates since the previous point"),
    "straightness": ("Straightness S(Z)", "0 is a flow of straight lines, for which one step is exact"),
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
    lines = [entry for _, entry in read_log(log)] if log.exists() else []
    body = [
        _heading(record),
        _tiles(lines, record, straightness),
        _charts(lines, straightness),
        _sheets(sorted((folder / "validation").glob("step-*.png")), prompts),
        _options(record),
    ]
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return page.replace("{title}", html.escape(_title(record))).replace("{body}", "\n".join(body))


def _title(record: dict[str, Any]) -> str:
    return f"{record['trainer']}, {record['steps']:,} steps" if record else "Training"


def _heading(record: dict[str, Any]) -> str:
    state = "" if record else "<p>This run is not finished; this is its log so far.</p>"
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
    try:
        import matplotlib
    except ImportError:
        return '<section><p>Charts need matplotlib: pip install "rectified_diffusers[evaluation]".</p></section>'
    charts = []
    with matplotlib.rc_context(_STYLE):
        for key, (title, note) in CURVES.items():
            points = [(line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]
            if points:
                charts.append(_chart(title, note, plot_curve(points, noisy=key != "learning_rate")))
        if straightness is not None:
            bins = {"this model": (straightness.per_bin, straightness.edges)}
            charts.append(_chart("Straightness over t", "mean of the integrand of S(Z)", plot_straightness(bins)))
    return f'<section class="charts">{"".join(charts)}</section>'


def plot_curve(points: Sequence[tuple[float, float]], noisy: bool = True) -> Any:
    """Plot values over steps; a noisy curve of 40 points or more is pale, with its running mean on top.

    The axis is logarithmic if the values are positive and the largest exceeds 30 times the smallest.
    """
    steps, values = np.array(points, dtype=float).T
    figure = new_figure(6.4, 2.6)
    axis = figure.subplots()
    axis.set_yscale("log" if 0 < 30 * values.min() < values.max() else "linear")
    if noisy and len(points) >= 40:
        axis.plot(steps, values, color="C0", alpha=0.35, linewidth=1)
        window = np.ones(2 * (len(points) // 40) + 1)
        values = np.convolve(values, window, "same") / np.convolve(np.ones(len(points)), window, "same")
    axis.plot(steps, values, color="C0", marker="o" if len(points) <= 12 else None)
    axis.set_xlabel("step")
    axis.grid(axis="y")
    return figure


def _chart(title: str, note: str, figure: Any) -> str:
    """Return a figure as SVG within the page, with the colors of its style sheet."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", file.getvalue().partition("<svg")[2])  # without the XML header
    for name, color in _COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    caption = html.escape(title) + (f" <span>{html.escape(note)}</span>" if note else "")
    return (
        f'<figure class="chart"><figcaption>{caption}</figcaption><svg role="img" aria-label="{html.escape(title)}"'
        f"{svg}</figure>"
    )


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
        f'<section class="sheets" style="--columns:{max(1, len(prompts))}"><h2>Validation images</h2>{omitted}'
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
    shown = {name: json.dumps(value, ensure_ascii=False) for name, value in record.items() if name != STARTING_MODEL}
    rows = "".join(f"<tr><th>{html.escape(name)}<td>{html.escape(value)}" for name, value in shown.items())
    return f"<section><h2>Options</h2><table>{rows}</table><p>From {RECORD}, next to this file.</p></section>"


_COLORS = {"soft": "#687085", "line": "#dfe3ec", "curve": "#4553d6"}
"""Colors of the charts, which the page replaces by its variables of these names, light or dark."""

_STYLE: Any = {
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _COLORS["soft"]
    ),
    "axes.prop_cycle": f"cycler(color=['{_COLORS['curve']}'])",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _COLORS["line"],
    "savefig.transparent": True,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": REPORT,  # equal charts have equal identifiers
}
