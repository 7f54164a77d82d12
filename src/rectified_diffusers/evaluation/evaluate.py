"""Evaluate a text-to-image pipeline against real images, row by row. Resumes after an interrupted run."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.checks import require_pipeline, require_type
from rectified_diffusers.data.real_images import Choice, RealPictures, choose, words_of
from rectified_diffusers.digests import digest_of
from rectified_diffusers.evaluation.config import EvaluationConfig
from rectified_diffusers.evaluation.gallery import (
    Gallery,
    Sampler,
    cached,
    for_evaluation,
    pipeline_digest,
    require_images,
)
from rectified_diffusers.evaluation.intervals import GROUPS, Interval, interval_of, merged
from rectified_diffusers.evaluation.metrics import (
    diversity_interval,
    frechet_interval,
    kernel_interval,
    mean_interval,
)
from rectified_diffusers.evaluation.report import Evaluation, Row, provenance
from rectified_diffusers.evaluation.scorers import Scorers
from rectified_diffusers.evaluation.straightness import Straightness, pipeline_straightness, trajectories
from rectified_diffusers.models.velocity import PipelineVelocity

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
    require_images(pipeline)
    folder, adapted = Path(output_dir), for_evaluation(pipeline)
    if max(config.steps) > 1 and config.straightness_prompts:
        PipelineVelocity.of(adapted, ["a"], config.guidance_scale)  # raises where straightness would, later
    scorers = Scorers(config, pictures.captions, folder / CACHE, pipeline.device, progress)
    settings = {option: getattr(config, option) for option in _COMPARED}
    settings |= {"pictures": pictures.identity, **scorers.names()}
    settings["candidates"] = scorers.alignment.candidates if scorers.alignment else None
    report = Evaluation.open(folder, settings)
    run = _Run(config, pictures, scorers, folder, progress)
    if not any(interval.deviations for interval in report.real.values()):  # new, or of an earlier version
        prompts = tuple(_distinct(run.choice("seen", config.seeds[0]).prompts)[:SHOWN_PROMPTS])
        report = replace(report, real=run.measure_real(), prompts=prompts, captions=run.captions_by_words())
    model = pipeline_digest(adapted)
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

    @cached_property
    def _group_of(self) -> dict[str, int]:
        """The jackknife's group of each caption: the same for all seeds and models, of about equal size in a split."""
        found: dict[str, int] = {}
        for split, _ in self.splits().values():
            captions = {self.pictures.captions[number] for number in self.pictures.numbers(split)}
            found |= {caption: i % GROUPS for i, caption in enumerate(sorted(captions, key=digest_of))}
        return found

    def groups(self, captions: Sequence[str]) -> Tensor:
        return torch.tensor([self._group_of[caption] for caption in captions])

    @cached_property
    def _new_captions(self) -> set[str]:
        """The held-out captions with a word that occurs in no caption and no tag of the training split."""
        known = self.pictures.words(self.config.seen_split)
        held_out = {self.pictures.captions[number] for number in self.pictures.numbers(self.config.held_out_split)}
        return {caption for caption in held_out if words_of(caption) - known}

    def captions_by_words(self) -> dict[str, int]:
        """Return the number of distinct held-out captions without and with a new word."""
        held_out = {self.pictures.captions[number] for number in self.pictures.numbers(self.config.held_out_split)}
        new = len(self._new_captions)
        return {"held_out_known": len(held_out) - new, "held_out_new": new} if held_out else {}

    def subsets(self, part: str, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the indices of a part's images, and of those of each kind of held-out captions, by name."""
        found = {part: list(range(len(captions)))}
        if part == "held_out":
            new = [caption in self._new_captions for caption in captions]
            found["held_out_known"] = [i for i, is_new in enumerate(new) if not is_new]
            found["held_out_new"] = [i for i, is_new in enumerate(new) if is_new]
        return {name: torch.tensor(indices) for name, indices in found.items() if name == part or len(indices) >= 3}

    def distances(self, gallery: Gallery, part: str, choice: Choice) -> dict[str, Interval]:
        """Return the Frechet and kernel distances of a gallery to the real images of a choice."""
        digest = digest_of([choice.reference, self.pictures.identity, GROUPS])
        name = f"distances-{digest}.{self.scorers.main.name}.safetensors"

        def make() -> dict[str, Tensor]:
            features, reference = self.scorers.main.see(gallery), self.reference(choice)
            groups, figures = self.groups(choice.prompts), {}
            for subset, chosen in self.subsets(part, choice.prompts).items():
                sets = features[chosen], reference[chosen], groups[chosen]
                figures[f"frechet_distance_{subset}"] = frechet_interval(*sets)
                figures[f"kernel_distance_{subset}"] = kernel_interval(*sets)
            return {
                key: torch.tensor([found.mean, *found.deviations], dtype=torch.float64)
                for key, found in figures.items()
            }

        # Cached: the root of a matrix of 1,280 or 2,048 rows takes longer than generating a small model's images.
        found = {key: value.tolist() for key, value in sorted(cached(gallery.folder / name, make).items())}
        return {key: interval_of(value[:1], value[1:]) for key, value in found.items()}

    def measure_real(self) -> dict[str, Interval]:
        """Return the metrics of real images: floors of the distances, and a perfect model's values of the others."""
        values: dict[str, list[Interval]] = defaultdict(list)
        for seed in self.config.seeds:
            for part in self.splits():
                choice = self.choice(part, seed)
                gallery = self.real_gallery(choice.floor, "other real pictures")
                _append(values, self.distances(gallery, part, choice))
                captions = [self.pictures.captions[number] for number in choice.floor]
                known, captions = self._unknown_to_scorer(part, gallery, captions)
                if known is gallery or seed == self.config.seeds[0]:  # images of a style are the same for all seeds
                    _append(values, self._agreement(known, part, captions))
                if part == "seen" and choice.paired and self.config.diversity_prompts:
                    pairs = torch.stack([self.reference(choice), self.scorers.main.see(gallery)], dim=1)
                    values["diversity"].append(diversity_interval(pairs, self.groups(choice.prompts)))
        return {key: merged(intervals) for key, intervals in values.items()}

    def _unknown_to_scorer(self, part: str, gallery: Gallery, captions: list[str]) -> tuple[Gallery, list[str]]:
        """Return real images and captions for the alignment: of the style unseen by the scorer, if there is one."""
        style = self.scorers.alignment.unseen_style if self.scorers.alignment else ""
        numbers = self.pictures.numbers(self.splits()[part][0])
        own = [number for number in numbers if self.pictures.styles[number] == style]
        if not style or not own:
            return gallery, captions
        return self.real_gallery(own, f"real pictures in style {style}"), [self.pictures.captions[i] for i in own]

    def _agreement(self, gallery: Gallery, part: str, prompts: Sequence[str]) -> dict[str, Interval]:
        """Return the metrics of how well images match their prompts."""
        of_images = {}
        if self.scorers.alignment:
            of_images["alignment"] = self.scorers.alignment.wins(gallery, prompts)
        if self.scorers.clip:
            of_images["clip_score"] = self.scorers.clip.cosines(gallery, prompts)
        groups = self.groups(prompts)
        return {
            f"{name}_{subset}": mean_interval(of_image[chosen], groups[chosen])
            for name, of_image in of_images.items()
            for subset, chosen in self.subsets(part, prompts).items()
        }

    def measure(self, pipeline: Any, model: str, name: str, steps: int, shown: Sequence[str]) -> Row:
        """Generate a model's images and return the row with their metrics."""
        config = self.config
        sampler = Sampler(pipeline, steps, config.guidance_scale, config.batch_size)
        work = self.folder / CACHE / f"{model[:12]}-{steps}-{config.guidance_scale:g}"
        values: dict[str, list[Interval]] = defaultdict(list)
        for seed in config.seeds:
            for part in self.splits():
                choice = self.choice(part, seed)
                gallery = _gallery(sampler, work, choice.prompts, f"{seed}/{part}", f"{name}, {steps} steps")
                _append(values, self.distances(gallery, part, choice))
                _append(values, self._agreement(gallery, part, choice.prompts))
            if config.diversity_prompts:
                values["diversity"].append(self._diversity(sampler, work, seed, name))
        row = Row(name, steps, config.guidance_scale, model, {}, self._seconds(sampler, work, shown))
        if steps > 1 and config.straightness_prompts:
            straight = [self._straightness(pipeline, model, seed) for seed in config.seeds]
            values["straightness"] = [interval_of([part.total]) for part in straight]
            columns = zip(*(part.per_bin for part in straight), strict=True)
            per_bin = tuple(math.fsum(bins) / len(straight) for bins in columns)
            paths = self._trajectories(pipeline, model, shown[0])
            row = replace(row, per_bin=per_bin, edges=straight[0].edges, trajectories=paths)
        shown_gallery = _gallery(sampler, work, shown, f"{config.seeds[0]}/shown", f"{name}, {steps} steps")
        shown_gallery.pictures(0)
        figures = {key: merged(intervals) for key, intervals in values.items()}
        return replace(row, figures=figures, gallery=str(shown_gallery.folder.relative_to(self.folder)))

    def _diversity(self, sampler: Sampler, work: Path, seed: int, name: str) -> Interval:
        config = self.config
        prompts = _distinct(self.choice("seen", seed).prompts)[: config.diversity_prompts]
        repeated = [prompt for prompt in prompts for _ in range(config.diversity_pictures)]
        gallery = _gallery(sampler, work, repeated, f"{seed}/diversity", f"{name}, diversity")
        features = self.scorers.main.see(gallery).view(len(prompts), config.diversity_pictures, -1)
        return diversity_interval(features, self.groups(prompts))

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


def _append(values: dict[str, list[Interval]], figures: dict[str, Interval]) -> None:
    for key, interval in figures.items():
        values[key].append(interval)


def _distinct(prompts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(prompts))
