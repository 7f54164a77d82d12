"""Evaluate a model beside others: a reference model, and models of the same recipe trained with other seeds."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rectified_diffusers.data.real_images import RealPictures
from rectified_diffusers.evaluation.config import ComparisonConfig, EvaluationConfig
from rectified_diffusers.evaluation.evaluate import evaluate
from rectified_diffusers.evaluation.intervals import merged
from rectified_diffusers.evaluation.report import Evaluation, Row


def evaluate_beside(
    pipeline: Any,
    load: Callable[[str], Any],
    pictures: RealPictures,
    output_dir: Path,
    config: EvaluationConfig,
    comparison: ComparisonConfig,
    name: str,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a pipeline, its repeats and the reference model in one folder, and return the evaluation.

    Every model has its own rows. With repeats, there is also a row per number of steps with the mean over trainings
    and the interval over them. With a reference model, the report has the ratio of every metric.

    Args:
        load: returns the pipeline of a folder or Hub id, for the further models.
        name: name of the pipeline in the table. Repeats are numbered after it, the reference is named by its folder.
    """
    names = [name, *(f"{name}, training {number}" for number in range(2, len(comparison.repeats) + 2))]
    teacher = comparison.reference_model
    key = model_name(teacher or ""), comparison.reference_steps, comparison.reference_guidance_scale
    if teacher is not None and key in [(own, steps, config.guidance_scale) for own in names for steps in config.steps]:
        raise ValueError(
            f"The reference model would replace the row {key[0]!r}, which has its name, steps and guidance. Pass "
            "another name for the evaluated model, for example --name one-step."
        )
    report = evaluate(pipeline, pictures, output_dir, config, name, progress)
    for model, own in zip(comparison.repeats, names[1:], strict=True):
        report = evaluate(load(model), pictures, output_dir, config, own, progress)
    if comparison.repeats:
        for steps in config.steps:
            keys = [(own, steps, config.guidance_scale) for own in names]
            rows = [next(row for row in report.rows if row.key == own) for own in keys]
            report = report.with_row(mean_of_trainings(rows, f"{name}, {len(rows)} trainings"))
        report.write(output_dir)
    if teacher is not None:
        of_teacher = replace(config, steps=key[1:2], guidance_scale=key[2])
        report = evaluate(load(teacher), pictures, output_dir, of_teacher, key[0], progress)
        report = replace(report, reference=key)
        report.write(output_dir)
    return report


def mean_of_trainings(rows: Sequence[Row], name: str) -> Row:
    """Return the row with the mean of several trainings' metrics, and the intervals over images and over trainings."""
    first = rows[0]
    shared = [key for key in first.figures if all(key in row.figures for row in rows)]
    figures = {key: merged([row.figures[key] for row in rows]) for key in shared}
    per_bin = tuple(sum(bins) / len(rows) for bins in zip(*(row.per_bin for row in rows), strict=True))
    seconds = sorted(row.seconds_per_image for row in rows)[len(rows) // 2]
    changes = {"figures": figures, "per_bin": per_bin, "seconds_per_image": seconds, "trainings": len(rows)}
    return replace(first, name=name, model="", gallery="", trajectories="", **changes)


def model_name(model: str) -> str:
    """Return the name of a model in the table: its folder's name or its Hub id."""
    return Path(model).resolve().name if Path(model).is_dir() else model
