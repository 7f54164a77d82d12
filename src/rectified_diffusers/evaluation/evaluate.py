"""Evaluate a text-to-image pipeline against real images, row by row. Resumes after an interrupted run."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.checks import require_pipeline, require_type
from rectified_diffusers.data.images import Choice, RealPictures, choose
from rectified_diffusers.evaluation.config import EvaluationConfig
from rectified_diffusers.evaluation.gallery import Gallery, Sampler, cached, digest_of, fingerprint, for_evaluation
from rectified_diffusers.evaluation.metrics import (
    Interval,
    diversity,
    frechet_distance,
    interval_of,
    kernel_distance,
)
from rectified_diffusers.evaluation.report import Evaluation, Row, provenance
from rectified_diffusers.evaluation.scorers import Scorers
from rectified_diffusers.evaluation.straightness import Straightness, pipeline_straightness
from rectified_diffusers.evaluation.trajectories import trajectories

CACHE = "cache"
SHOWN_PROMPTS = 8
_COMPARED = (
    "seeds",
    "num_pictures",
    "num_held_out",
    "seen_split",
    "held_out_split",
    "diversity_prompts",
    "diversity_pictures",
    "straightness_prompts",
    "straightness_steps",
    "straightness_bins",
)


def evaluate(
    pipeline: Any,
    pictures: RealPictures,
    output_dir: str | Path,
    config: EvaluationConfig,
    name: str,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a pipeline at each number of steps, and add the rows to the evaluation in `output_dir`.

    Images and features are cached in `output_dir/cache` as they are produced: an interrupted run resumes from there,
    and evaluating the same model again is free. To compare two pipelines, call `evaluate` once for each. It raises
    ValueError if any setting that affects the metrics differs. The folder `cache` may be removed at any time.

    Args:
        pipeline: a diffusers text-to-image pipeline, flow or diffusion. Diffusion pipelines use DPM-Solver++.
        name: name of the model in the table. A row with the same name, steps and guidance is replaced.

    Example:
        ```python
        pictures, config = read_pictures("pictures", size=512), EvaluationConfig(steps=(1,))
        evaluation = evaluate(pipeline, pictures, "metrics", config, name="2-rectified-flow")
        print(evaluation.as_markdown())
        ```
    """
    require_pipeline("evaluate", pipeline, "vae", "scheduler", "components")
    require_type("pictures", pictures, RealPictures, "Open a folder: read_pictures(folder, size).")
    require_type("config", config, EvaluationConfig, "Create one: EvaluationConfig(steps=(1,)).")
    require_type("name", name, str, "Give the name of the model for the table.")
    folder, adapted = Path(output_dir), for_evaluation(pipeline)
    scorers = Scorers(config, pictures.captions, folder / CACHE, pipeline.device, progress)
    settings = {option: getattr(config, option) for option in _COMPARED}
    settings |= {"pictures": pictures.identity, **scorers.names()}
    settings["candidates"] = scorers.alignment.candidates if scorers.alignment else None
    report = Evaluation.open(folder, settings)
    run = _Run(config, pictures, scorers, folder, progress)
    if not report.real:
        prompts = tuple(_distinct(run.choice("seen", config.seeds[0]).prompts)[:SHOWN_PROMPTS])
        report = replace(report, real=run.measure_real(), prompts=prompts)
    model = fingerprint(adapted)
    for steps in config.steps:
        report = report.with_row(run.measure(adapted, model, name, steps, report.prompts))
        report = replace(report, provenance=provenance(pipeline.device))
        report.write(folder)
    return report


@dataclass(frozen=True)
class _Run:
    """The configuration and data that all rows of an evaluation share."""

    config: EvaluationConfig
    pictures: RealPictures
    scorers: Scorers
    folder: Path
    progress: bool

    def splits(self) -> dict[str, tuple[str, int | None]]:
        """Return split and number of images of each evaluated part of the data, by name."""
        config = self.config
        parts: dict[str, tuple[str, int | None]] = {"seen": (config.seen_split, config.num_pictures)}
        if self.pictures.numbers(config.held_out_split):
            parts["held_out"] = (config.held_out_split, config.num_held_out)
        return parts

    def choice(self, part: str, seed: int) -> Choice:
        return choose(self.pictures, *self.splits()[part], seed)

    def real_gallery(self, numbers: Sequence[int], label: str) -> Gallery:
        """Return a gallery of real images that stores only their features."""
        folder = self.folder / CACHE / f"real-{digest_of([self.pictures.identity, list(numbers)])}"
        read = lambda first, last: self.pictures.read(numbers[first:last])  # noqa: E731
        return Gallery(folder, len(numbers), read, label=label, keep=False)

    def reference(self, choice: Choice) -> Tensor:
        return self.scorers.main.see(self.real_gallery(choice.reference, "real pictures"))

    def distances(self, gallery: Gallery, choice: Choice) -> dict[str, float]:
        """Return the Frechet and kernel distances of a gallery to the real images of a choice."""
        name = (
            f"distances-{digest_of([choice.reference, self.pictures.identity])}.{self.scorers.main.name}.safetensors"
        )

        def make() -> dict[str, Tensor]:
            features, reference = self.scorers.main.see(gallery), self.reference(choice)
            figures = {
                "frechet_distance": frechet_distance(features, reference),
                "kernel_distance": kernel_distance(features, reference).mean,
            }
            return {key: torch.tensor(value, dtype=torch.float64) for key, value in figures.items()}

        # Cached: the root of a matrix of 1,280 or 2,048 rows takes longer than generating a small model's images.
        return {key: value.item() for key, value in sorted(cached(gallery.folder / name, make).items())}

    def measure_real(self) -> dict[str, Interval]:
        """Return the metrics of real images: floors of the distances, and a perfect model's values of the others."""
        values: dict[str, list[float]] = defaultdict(list)
        for seed in self.config.seeds:
            for part in self.splits():
                choice = self.choice(part, seed)
                gallery = self.real_gallery(choice.floor, "other real pictures")
                _append(values, part, self.distances(gallery, choice))
                captions = [self.pictures.captions[number] for number in choice.floor]
                known, captions = self._unknown_to_scorer(part, gallery, captions)
                if known is gallery or seed == self.config.seeds[0]:  # images of a style are the same for all seeds
                    _append(values, part, self._agreement(known, captions))
                if part == "seen" and choice.paired and self.config.diversity_prompts:
                    pairs = torch.stack([self.reference(choice), self.scorers.main.see(gallery)], dim=1)
                    values["diversity"].append(diversity(pairs))
        return {key: interval_of(figures) for key, figures in values.items()}

    def _unknown_to_scorer(self, part: str, gallery: Gallery, captions: list[str]) -> tuple[Gallery, list[str]]:
        """Return real images and captions for the alignment: of the style unseen by the scorer, if there is one."""
        style = self.scorers.alignment.unseen_style if self.scorers.alignment else ""
        numbers = self.pictures.numbers(self.splits()[part][0])
        own = [number for number in numbers if self.pictures.styles[number] == style]
        if not style or not own:
            return gallery, captions
        return self.real_gallery(own, f"real pictures in style {style}"), [self.pictures.captions[i] for i in own]

    def _agreement(self, gallery: Gallery, prompts: Sequence[str]) -> dict[str, float]:
        """Return the metrics of how well images match their prompts."""
        figures = {}
        if self.scorers.alignment:
            figures["alignment"] = self.scorers.alignment.r_precision(gallery, prompts)
        if self.scorers.clip:
            figures["clip_score"] = self.scorers.clip.score(gallery, prompts)
        return figures

    def measure(self, pipeline: Any, model: str, name: str, steps: int, shown: Sequence[str]) -> Row:
        """Generate a model's images and return the row with their metrics."""
        config = self.config
        sampler = Sampler(pipeline, steps, config.guidance_scale, config.batch_size)
        work = self.folder / CACHE / f"{model[:12]}-{steps}-{config.guidance_scale:g}"
        values: dict[str, list[float]] = defaultdict(list)
        for seed in config.seeds:
            for part in self.splits():
                choice = self.choice(part, seed)
                gallery = _gallery(sampler, work, choice.prompts, f"{seed}/{part}", f"{name}, {steps} steps")
                _append(values, part, self.distances(gallery, choice))
                _append(values, part, self._agreement(gallery, choice.prompts))
            if config.diversity_prompts:
                values["diversity"].append(self._diversity(sampler, work, seed, name))
        row = Row(name, steps, config.guidance_scale, model, {}, self._seconds(sampler, work, shown))
        if steps > 1 and config.straightness_prompts:
            straight = [self._straightness(pipeline, model, seed) for seed in config.seeds]
            values["straightness"] = [part.total for part in straight]
            columns = zip(*(part.per_bin for part in straight), strict=True)
            per_bin = tuple(math.fsum(bins) / len(straight) for bins in columns)
            paths = self._trajectories(pipeline, model, shown[0])
            row = replace(row, per_bin=per_bin, edges=straight[0].edges, trajectories=paths)
        shown_gallery = _gallery(sampler, work, shown, f"{config.seeds[0]}/shown", f"{name}, {steps} steps")
        shown_gallery.pictures(0)
        figures = {key: interval_of(figures) for key, figures in values.items()}
        return replace(row, figures=figures, gallery=str(shown_gallery.folder.relative_to(self.folder)))

    def _diversity(self, sampler: Sampler, work: Path, seed: int, name: str) -> float:
        config = self.config
        prompts = _distinct(self.choice("seen", seed).prompts)[: config.diversity_prompts]
        repeated = [prompt for prompt in prompts for _ in range(config.diversity_pictures)]
        gallery = _gallery(sampler, work, repeated, f"{seed}/diversity", f"{name}, diversity")
        return diversity(self.scorers.main.see(gallery).view(len(prompts), config.diversity_pictures, -1))

    def _seconds(self, sampler: Sampler, work: Path, prompts: Sequence[str]) -> float:
        make = lambda: {"seconds": torch.tensor(sampler.seconds_per_image(prompts))}  # noqa: E731
        return cached(work / "seconds.safetensors", make)["seconds"].item()

    def _straightness(self, pipeline: Any, model: str, seed: int) -> Straightness:
        config = self.config
        prompts = self.choice("seen", seed).prompts[: config.straightness_prompts]
        settings = [prompts, config.guidance_scale, config.straightness_steps, config.straightness_bins, seed]
        path = self.folder / CACHE / f"{model[:12]}-straightness-{digest_of(settings)}.safetensors"

        def make() -> dict[str, Tensor]:
            options = {"batch_size": config.batch_size, "seed": seed, "progress": self.progress}
            found = pipeline_straightness(pipeline, *settings[:4], **options)
            values = {"total": found.total, "per_bin": found.per_bin, "edges": found.edges, "count": found.count}
            return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

        found: dict[str, Any] = {name: value.tolist() for name, value in cached(path, make).items()}
        return Straightness(found["total"], tuple(found["per_bin"]), tuple(found["edges"]), int(found["count"]))

    def _trajectories(self, pipeline: Any, model: str, prompt: str) -> str:
        settings = [prompt, self.config.guidance_scale]
        path = self.folder / CACHE / f"{model[:12]}-trajectories-{digest_of(settings)}.safetensors"

        def make() -> dict[str, Tensor]:
            found = trajectories(pipeline, prompt, self.config.guidance_scale, seed=self.config.seeds[0])
            return {"t": found.t, "latents": found.latents.contiguous(), "pixels": found.pixels.contiguous()}

        cached(path, make)
        return str(path.relative_to(self.folder))


def _gallery(sampler: Sampler, work: Path, prompts: Sequence[str], seed: str, label: str) -> Gallery:
    """Return a gallery of generated images. The noise of each depends on the seed and its index in the list."""

    def make(first: int, last: int) -> Tensor:
        return sampler.sample(prompts[first:last], [f"{seed}/{i}" for i in range(first, last)])

    folder = work / f"{seed.replace('/', '-')}-{digest_of(list(prompts))}"
    return Gallery(folder, len(prompts), make, label=label)


def _append(values: dict[str, list[float]], part: str, figures: dict[str, float]) -> None:
    for key, value in figures.items():
        values[f"{key}_{part}"].append(value)


def _distinct(prompts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(prompts))
