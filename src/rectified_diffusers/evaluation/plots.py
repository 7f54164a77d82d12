"""Plot an evaluation: paths over t, straightness per bin, one seed across models, quality against steps."""

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor

from rectified_diffusers.evaluation.report import Evaluation, Row
from rectified_diffusers.evaluation.straightness import Trajectories
from rectified_diffusers.evaluation.tables import FIGURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 150
_CURVES = ("kernel_distance_seen", "kernel_distance_held_out", "alignment_seen", "alignment_held_out")


def write_plots(folder: str | Path) -> list[Path]:
    """Plot the evaluation in a folder and write the plots to its `plots/`. Plots without data are omitted.

    Returns:
        The paths of the PNG files.
    """
    folder = Path(folder)
    report = Evaluation.read(folder)
    figures = {
        "trajectories": _trajectories_of(report, folder),
        "straightness": _straightness_of(report),
        "grid": _grid_of(report, folder),
        "quality": plot_quality(report) if report.rows else None,
    }
    (folder / "plots").mkdir(exist_ok=True)
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / "plots" / f"{name}.png")
            figure.savefig(paths[-1], dpi=_DPI)
    return paths


def new_figure(width: float, height: float) -> "Figure":
    """Return a figure without a window or global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "rectified_diffusers[evaluation]".') from error
    return Figure(figsize=(width, height), layout="constrained")


def plot_trajectories(paths: Mapping[str, Trajectories]) -> "Figure":
    """Plot values of the latent (top) and of the image (bottom) over t, one column per model.

    A pale dashed chord is drawn behind each path. For a straight flow the two coincide.
    """
    columns = len(paths)
    figure = new_figure(3.4 * columns + 0.6, 5.6)
    axes = figure.subplots(2, columns, sharex=True, sharey="row", squeeze=False)
    for column, (name, path) in enumerate(paths.items()):
        axes[0][column].set_title(name)
        axes[1][column].set_xlabel("t (0 is noise, 1 is data)")
        for row, values in enumerate((path.latents, path.pixels)):
            axis = axes[row][column]
            axis.set_xlim(0, 1)
            for i, value in enumerate(values.T):
                ends = [path.t[0], path.t[-1]], [value[0], value[-1]]
                axis.plot(*ends, color=f"C{i % 10}", linewidth=0.7, linestyle=(0, (3, 3)), alpha=0.45)
                axis.plot(path.t, value, color=f"C{i % 10}", linewidth=1.1)
    axes[0][0].set_ylabel("value in the latent")
    axes[1][0].set_ylabel("value of a pixel, decoded")
    return figure


def plot_straightness(bins: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> "Figure":
    """Plot the integrand of S(Z) over t, one step line per model.

    Args:
        bins: maps the model's name to the mean of the integrand per bin and the bin edges.
    """
    figure = new_figure(6.4, 4)
    axis = figure.subplots()
    for name, (per_bin, edges) in bins.items():
        widths = [b - a for a, b in pairwise(edges)]
        total = sum(value * width for value, width in zip(per_bin, widths, strict=True))
        axis.stairs(per_bin, edges, label=f"{name}: S = {total:.3g}", linewidth=1.8)
    axis.set(xlim=(0, 1), ylim=(0, None), xlabel="t (0 is noise, 1 is data)")
    axis.set_ylabel("mean squared deviation from the straight path")
    axis.legend(frameon=False)
    return figure


def plot_grid(pictures: Mapping[str, Tensor], prompts: Sequence[str]) -> "Figure":
    """Plot images generated from the same noise: one row per model, one column per prompt.

    Args:
        pictures: maps the model's name to images `(len(prompts), 3, H, W)` uint8.
    """
    rows, columns = len(pictures), len(prompts)
    figure = new_figure(1.25 * columns + 1.4, 1.25 * rows + 0.55)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, (name, images) in enumerate(pictures.items()):
        for column, image in enumerate(images):
            axis = axes[row][column]
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest" if image.shape[-1] < 200 else None)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(_wrapped(prompts[column]), fontsize=8)
        axes[row][0].set_ylabel(_wrapped(name), rotation=0, ha="right", va="center", fontsize=9)
    return figure


def plot_quality(report: Evaluation) -> "Figure":
    """Plot kernel distance and alignment against the number of steps, with intervals over images.

    Dashed lines are the values of real images: for the distance, its floor.
    """
    keys = [key for key in _CURVES if any(key in row.figures for row in report.rows)]
    figure = new_figure(max(4.6 * len(keys), 6.4), 4.4)
    axes = figure.subplots(1, len(keys), squeeze=False)[0]
    ticks = sorted({row.steps for row in report.rows})
    curves: dict[str, list[Row]] = defaultdict(list)
    for row in report.rows:
        curves[report.title(row)].append(row)
    for axis, key in zip(axes, keys, strict=True):
        for i, (name, rows) in enumerate(curves.items()):
            rows = sorted(rows, key=lambda row: row.steps)
            means = [row.figures[key].mean for row in rows]
            errors = [row.figures[key].over_images or row.figures[key].half_width or 0.0 for row in rows]
            # Offset the curves so that intervals at the same number of steps do not overlap.
            steps = [row.steps * 2 ** (0.1 * (i - (len(curves) - 1) / 2)) for row in rows]
            axis.errorbar(steps, means, errors, marker="o", capsize=3, color=f"C{i % 10}", label=name)
        floor = report.real[key].mean if key in report.real else 0.0  # of the kernel distance: can be below 0
        if key in report.real:
            axis.axhline(floor, color="grey", linestyle="--", linewidth=1, label="real pictures")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel="steps", ylabel=FIGURES[key][0], ylim=(min(0.0, floor), None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _trajectories_of(report: Evaluation, folder: Path) -> "Figure | None":
    files = {
        report.title(row): folder / row.trajectories for row in report.rows_with_straightness() if row.trajectories
    }
    paths = {name: Trajectories(**load_file(file)) for name, file in files.items() if file.exists()}
    return plot_trajectories(paths) if paths else None


def _straightness_of(report: Evaluation) -> "Figure | None":
    bins = {report.title(row): (row.per_bin, row.edges) for row in report.rows_with_straightness() if row.per_bin}
    return plot_straightness(bins) if bins else None


def _grid_of(report: Evaluation, folder: Path) -> "Figure | None":
    pictures = {}
    for row in report.rows:
        file = folder / row.gallery / f"{0:06}.safetensors"
        if row.gallery and file.exists():
            name = f"{report.title(row)}, {row.steps} step{'s' if row.steps > 1 else ''}"
            pictures[name] = load_file(file)["images"]
    return plot_grid(pictures, report.prompts) if pictures else None


def _wrapped(text: str, width: int = 16) -> str:
    return "\n".join(textwrap.wrap(textwrap.shorten(text, 3 * width, placeholder=" ..."), width))
