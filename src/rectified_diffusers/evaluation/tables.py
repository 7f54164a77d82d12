"""Markdown tables of an evaluation: metrics with their floors, ratios to a reference model, unknown words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rectified_diffusers.evaluation.intervals import CONFIDENCE, GROUPS, Interval, ratio_of

if TYPE_CHECKING:
    from rectified_diffusers.evaluation.report import Evaluation, Row

REAL = "real pictures"
DISTANCES = ("kernel_distance", "frechet_distance")
_METRICS = {  # name, heading and format, in the order of the tables; the first is the headline
    "kernel_distance": ("kernel", ".4f"),
    "frechet_distance": ("Frechet", ".2f"),
    "alignment": ("alignment", ".3f"),
    "clip_score": ("CLIP score", ".3f"),
}
PARTS = {"seen": "seen", "held_out": "held out"}
WORDS = {"held_out_known": "held out, known words", "held_out_new": "held out, new words"}
FIGURES = {  # key, heading and format, in the order of the table
    **{
        f"{name}_{part}": (f"{heading}, {of_part}", spec)
        for name, (heading, spec) in _METRICS.items()
        for part, of_part in PARTS.items()
    },
    "diversity": ("diversity", ".3f"),
    "straightness": ("S(Z)", ".4f"),
}
FIGURES_OF_WORDS = {
    f"{name}_{part}": (f"{heading}, {of_part}", spec)
    for part, of_part in WORDS.items()
    for name, (heading, spec) in _METRICS.items()
}


def markdown_of(report: "Evaluation") -> str:
    """Return all tables of an evaluation, with their notes."""
    parts = [_figures(report, FIGURES, seconds=True), *_ratios(report), *_of_words(report)]
    return "\n\n".join([*parts, *_straightness(report), *_coupling(report), *_notes(report)]) + "\n"


def ratios(report: "Evaluation", row: "Row") -> dict[str, tuple[Interval | None, Interval | None]]:
    """Return each metric of a row divided by that of the reference model: plain, and with the floor subtracted.

    Only distances have a floor, and only where it was measured. None if a ratio is not defined.
    """
    reference, found = report.reference_row(), {}
    for key in [*FIGURES, *FIGURES_OF_WORDS]:
        if reference is not None and key in row.figures and key in reference.figures:
            floor = report.real.get(key) if key.startswith(DISTANCES) else None
            both = row.figures[key], reference.figures[key]
            found[key] = ratio_of(*both), ratio_of(*both, floor) if floor else None
    return found


def _figures(report: "Evaluation", headings: dict[str, tuple[str, str]], seconds: bool = False) -> str:
    """Return a table with a row for real images and one per model. Each Frechet distance is shown with its floor."""
    keys = [key for key in headings if any(key in figures for figures in _all_figures(report))]
    heads = ["", "steps", "guidance", *(headings[key][0] for key in keys), *(["s / image"] if seconds else [])]
    lines = [[REAL, "", "", *(_cell(report.real.get(key), headings[key][1]) for key in keys), *[""] * seconds]]
    for row in report.rows:
        cells = [row.name, str(row.steps), f"{row.guidance_scale:g}"]
        for key in keys:
            text, floor = _cell(row.figures.get(key), headings[key][1], row.trainings > 1), report.real.get(key)
            if text and floor is not None and key.startswith("frechet_distance"):
                text += f" (floor {floor.mean:{headings[key][1]}})"
            cells.append(text)
        lines.append([*cells, *([f"{row.seconds_per_image:.3f}"] if seconds else [])])
    return _table(heads, lines)


def _cell(interval: Interval | None, spec: str, of_trainings: bool = False) -> str:
    if interval is None:
        return ""
    text = format(interval, spec)
    if of_trainings and interval.over_images is not None and interval.half_width is not None:
        text += f" (trainings ± {interval.half_width:{spec}})"
    return text


def _ratios(report: "Evaluation") -> list[str]:
    """Return the table of ratios to the reference model; nothing without one."""
    reference = report.reference_row()
    others = [row for row in report.rows if row is not reference]
    if reference is None or not others:
        return []
    headings = FIGURES | FIGURES_OF_WORDS
    of_rows = [ratios(report, row) for row in others]
    keys = [key for key in headings if any(key in of_row for of_row in of_rows)]
    lines = []
    for row, of_row in zip(others, of_rows, strict=True):
        for name, which in (("plain", 0), ("less the floor", 1)):
            cells = [_cell(of_row.get(key, (None, None))[which], ".2f", row.trainings > 1) for key in keys]
            lines.append([row.name, str(row.steps), f"{row.guidance_scale:g}", name, *cells])
    title = f"Ratios to {reference.name}, {reference.steps} steps, guidance {reference.guidance_scale:g}:"
    return [title, _table(["", "steps", "guidance", "ratio", *(headings[key][0] for key in keys)], lines)]


def _of_words(report: "Evaluation") -> list[str]:
    """Return the table of held-out captions by their words; nothing if it was not measured."""
    if not any(key in figures for figures in _all_figures(report) for key in FIGURES_OF_WORDS):
        return []
    shares = [
        f"{report.captions[part]} with {words}" for part, words in _WORDS_TEXT.items() if part in report.captions
    ]
    return [f"Held-out captions: {', '.join(shares)}.", _figures(report, FIGURES_OF_WORDS)]


_WORDS_TEXT = {
    "held_out_known": "all words seen in training (known words)",
    "held_out_new": "a word never seen in training (new words)",
}


def _straightness(report: "Evaluation") -> list[str]:
    rows = report.rows_with_straightness()
    if not rows:
        return []
    lines = []
    for row in rows:
        values = ", ".join(f"{value:.4f}" for value in row.per_bin)
        lines.append(f"- {row.name}, guidance {row.guidance_scale:g}, t from {row.edges[0]:.3f}: {values}")
    return ["S(Z) per dimension, mean of the integrand in each bin of t:", "\n".join(lines)]


def _coupling(report: "Evaluation") -> list[str]:
    """Return the transport cost of the triplets; nothing if the data are no triplets."""
    if not report.coupling:
        return []
    cost, independent = (format(report.coupling[key], ".4f") for key in ("coupled", "independent"))
    ratio = f", a ratio of {report.coupling['ratio']:.3f}" if "ratio" in report.coupling else ""
    return [
        f"Transport cost of the triplets, E abs(data - noise)^2 per dimension: {cost}; independent coupling: "
        f"{independent}{ratio}."
    ]


def _notes(report: "Evaluation") -> list[str]:
    settings, made = report.settings, report.provenance
    seeds = ", ".join(map(str, settings["seeds"]))
    notes = [
        f"{settings['num_pictures']} images per seed compared with as many real images, seeds {seeds}. Features of "
        f"the distances: {settings['features']}. The row of real pictures is the floor: the values of as many other "
        "real images. The kernel distance is unbiased. Its floor can be below 0, because both sets of real images "
        "show the same captions."
    ]
    measured = [figure for figures in _all_figures(report) for figure in figures.values()]
    if any(figure.over_images is not None for figure in measured):
        notes.append(_OVER_IMAGES)
    elif any(figure.half_width is not None for figure in measured):
        notes.append(_OVER_SEEDS)
    if any(row.trainings > 1 for row in report.rows):
        notes[-1] += " 'trainings ±' is the interval over models trained with different seeds."
    if settings.get("alignment"):
        notes.append(f"Alignment: R-precision, 1 of {settings['candidates']} ({settings['alignment']}).")
    if made:
        notes.append(f"{made['hardware']}, {made['threads']} threads; {made['date']}; {made['versions']}.")
    return notes


_OVER_IMAGES = (
    f"± is the {CONFIDENCE:.0%} confidence interval over images (jackknife over {GROUPS} groups of captions); where "
    "images were not measured one by one, as for S(Z), over seeds."
)
_OVER_SEEDS = f"± is the {CONFIDENCE:.0%} confidence interval of the mean over seeds."


def _all_figures(report: "Evaluation") -> list[dict[str, Interval]]:
    return [report.real, *(row.figures for row in report.rows)]


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])
