"""Plot the results of `sharpness.py`."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

# Okabe and Ito's colors, which color-blind readers can distinguish; start and recipe also differ by line and marker.
STYLES = {
    "direct": ("direct distillation", "#0072B2", "o"),
    "2rf": ("2-RF + distillation", "#D55E00", "s"),
    "2rf-teacher": ("2-RF, then distilled on the teacher's pairs", "#009E73", "^"),
}
LINES = {"new": "-", "matched": "-", "bare": "--"}
TITLES = {"sharp": "Sharp teacher: 600 narrow Gaussians", "smooth": "Smooth teacher: a network of the student's size"}
CURVES = {
    "own_error": "error on own held-out pairs\n(share of the variance)",
    "frechet": "Fréchet distance\nto the teacher's samples",
}
FLOOR = "#555555"


def draw_figure(results: dict[str, Any], learning_rate: float, path: Path) -> None:
    """Plot error and distance over the budget, one column per teacher, and the transport costs beside them."""
    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5})
    rows = [row for row in results["rows"] if row["learning_rate"] == learning_rate]
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.2), width_ratios=[1, 1, 0.62], layout="constrained")
    for column, (teacher, title) in enumerate(TITLES.items()):
        for line, (metric, label) in enumerate(CURVES.items()):
            axis = axes[line][column]
            of_teacher = [row for row in rows if row["teacher"] == teacher]
            _curves(axis, of_teacher, metric)
            axis.set(xscale="log", yscale="log")
            budgets = sorted({row["evaluations"] for row in rows})
            axis.set_xticks(budgets, [f"{budget / 1e6:.3g}" for budget in budgets])
            axis.set_xticks([], minor=True)
            values = [value for row in of_teacher for value in row[metric]["values"]]
            if metric == "frechet":
                floor = results["teachers"][teacher]["frechet"]["mean"]
                values.append(floor)
                axis.axhline(floor, color=FLOOR, linestyle=":", linewidth=1.2)
                axis.annotate(
                    "floor: the teacher against itself",
                    (0.02, floor),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, 3),
                    textcoords="offset points",
                    color=FLOOR,
                    fontsize=8,
                )
                axis.set_xlabel("total budget, million network evaluations")
            else:
                axis.set_title(title)
            axis.set_ylim(min(values) / 2, 2 * max(values))
            if column == 0:
                axis.set_ylabel(label)
    _transport(axes[0][2], results, rows)
    _legend(axes[1][2])
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _curves(axis: Any, rows: list[dict[str, Any]], metric: str) -> None:
    for recipe, (_, color, marker) in STYLES.items():
        for start, line in LINES.items():
            points = [row for row in rows if (row["recipe"], row["start"]) == (recipe, start)]
            if not points:
                continue
            x = [row["evaluations"] for row in points]
            mean = [row[metric]["mean"] for row in points]
            widths = [row[metric]["half_width"] or 0 for row in points]
            low, high = zip(*((m - w, m + w) for m, w in zip(mean, widths, strict=True)), strict=True)
            face = "white" if start == "bare" else color
            axis.plot(x, mean, line, color=color, marker=marker, markersize=5, markerfacecolor=face, linewidth=1.6)
            # A lower end below 0 does not fit on a logarithmic axis; the band then reaches its edge.
            axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _transport(axis: Any, results: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Plot bars of E |data - noise|^2 / d: independent pairs, the teacher's, and the 2-RF's at the largest budget."""
    for place, (teacher, found) in enumerate(results["teachers"].items()):
        start = {"sharp": "new", "smooth": "matched"}[teacher]
        last = [row for row in rows if "transport_cost" in row and row["start"] == start][-1]
        bars = {
            "#BBBBBB": found["transport_cost_independent"],
            STYLES["direct"][1]: found["transport_cost"],
            STYLES["2rf"][1]: last["transport_cost"],
        }
        for i, (color, cost) in enumerate(bars.items()):
            x = place + (i - 1) * 0.27
            axis.bar(x, cost["mean"], 0.25, color=color, yerr=cost["half_width"], error_kw={"linewidth": 1})
            axis.annotate(
                f"{cost['mean']:.2f}",
                (x, cost["mean"] + (cost["half_width"] or 0)),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axis.set(title="Transport cost of the pairs", xticks=[0, 1], xticklabels=["sharp", "smooth"])
    axis.set_ylabel("E |data $-$ noise|² / d")


def _legend(axis: Any) -> None:
    axis.axis("off")
    line, patch = mpl.lines.Line2D, mpl.patches.Patch
    curves = [line([], [], color=color, marker=marker, label=label) for label, color, marker in STYLES.values()]
    starts = [
        line([], [], color="black", label="new weights, or the matched start"),
        line([], [], color="black", linestyle="--", marker="o", markerfacecolor="white", label="bare epsilon weights"),
        patch(color="black", alpha=0.15, linewidth=0, label="95% interval over seeds"),
    ]
    bars = [
        patch(color="#BBBBBB", label="noise and data at random"),
        patch(color=STYLES["direct"][1], label="the teacher's pairs"),
        patch(color=STYLES["2rf"][1], label="the 2-RF's pairs"),
    ]
    above = axis.legend(handles=bars, title="Bars", loc="upper left", bbox_to_anchor=(-0.2, 1.08), **_LEGEND)
    axis.add_artist(above)
    axis.legend(handles=curves + starts, title="Curves", loc="upper left", bbox_to_anchor=(-0.2, 0.7), **_LEGEND)


_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8.5, "alignment": "left", "borderpad": 0}
