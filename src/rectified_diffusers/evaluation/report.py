"""Store the results of an evaluation: rows of metrics as JSON, which can be extended, and as a Markdown table."""

import json
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rectified_diffusers.evaluation.metrics import CONFIDENCE, Interval
from rectified_diffusers.files import write_atomically

FILE = "evaluation.json"
TABLE = "evaluation.md"
REAL = "real pictures"
FLOORED = "frechet_distance"
FIGURES = {  # key, heading and format, in the order of the table
    "frechet_distance_seen": ("Frechet, seen", ".2f"),
    "frechet_distance_held_out": ("Frechet, held out", ".2f"),
    "kernel_distance_seen": ("kernel, seen", ".4f"),
    "kernel_distance_held_out": ("kernel, held out", ".4f"),
    "alignment_seen": ("alignment, seen", ".3f"),
    "alignment_held_out": ("alignment, held out", ".3f"),
    "clip_score_seen": ("CLIP score, seen", ".3f"),
    "clip_score_held_out": ("CLIP score, held out", ".3f"),
    "diversity": ("diversity", ".3f"),
    "straightness": ("S(Z)", ".4f"),
}
_PACKAGES = (
    "rectified_diffusers",
    "torch",
    "diffusers",
    "transformers",
    "torchvision",
    "torch-fidelity",
    "open_clip_torch",
)


@dataclass(frozen=True)
class Row:
    """The metrics of one model at one number of steps.

    Attributes:
        model: digest of the model's weights.
        per_bin, edges: the integrand of S(Z) per bin of t, mean over seeds, and the bin edges; see
            `straightness.Straightness`. Empty if not measured.
        gallery: folder of the model's images for the first seed, relative to the report's folder.
        trajectories: file of the model's trajectories, relative to the report's folder; empty if not recorded.
    """

    name: str
    steps: int
    guidance_scale: float
    model: str
    figures: dict[str, Interval]
    seconds_per_image: float
    per_bin: tuple[float, ...] = ()
    edges: tuple[float, ...] = ()
    gallery: str = ""
    trajectories: str = ""

    @property
    def key(self) -> tuple[str, int, float]:
        return self.name, self.steps, self.guidance_scale


@dataclass(frozen=True)
class Evaluation:
    """Comparable rows: the same captions and noise, measured by the same scorers.

    Attributes:
        settings: all settings that affect the metrics, besides the model.
        real: metrics of real images. For the distances, this is the floor: the distance between sets of real images.
        prompts: the first captions of the first seed, used in the grids.

    Example:
        ```python
        evaluation = Evaluation.read("metrics")  # the output folder of `evaluate`
        print(evaluation.as_markdown())
        ```
    """

    settings: dict[str, Any]
    real: dict[str, Interval] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def with_row(self, row: Row) -> "Evaluation":
        """Return the evaluation with a row added. It replaces a row with the same name, steps and guidance."""
        if any(old.key == row.key for old in self.rows):
            return replace(self, rows=tuple(row if old.key == row.key else old for old in self.rows))
        return replace(self, rows=(*self.rows, row))

    def write(self, folder: Path) -> None:
        """Write the JSON and Markdown files, each atomically."""
        for name, text in ((FILE, json.dumps(asdict(self), indent=2) + "\n"), (TABLE, self.as_markdown())):
            write_atomically(folder / name, lambda partial, text=text: partial.write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, folder: str | Path) -> "Evaluation":
        """Read an evaluation that `write` wrote."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"Expected the folder of an evaluation, but there is no {path}.")
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [{**row, "figures": _intervals(row["figures"])} for row in content["rows"]]
        rows = [Row(**{**row, **{key: tuple(row[key]) for key in ("per_bin", "edges")}}) for row in rows]
        content |= {"real": _intervals(content["real"]), "prompts": tuple(content["prompts"]), "rows": tuple(rows)}
        return cls(**content)

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any]) -> "Evaluation":
        """Return the evaluation in the folder, which must have the same settings, or a new one if there is none."""
        settings = json.loads(json.dumps(settings))  # tuples are lists in the file
        if not (folder / FILE).exists():
            return cls(settings)
        found = cls.read(folder)
        for name in settings:
            if found.settings.get(name) != settings[name]:
                raise ValueError(
                    f"{folder} holds an evaluation with {name}={found.settings.get(name)!r}, got {name}="
                    f"{settings[name]!r}. Their metrics are not comparable. Use the same value, or another output_dir."
                )
        return found

    def as_markdown(self) -> str:
        """Return the Markdown table and its notes. Each Frechet distance is shown with its floor."""
        keys = [key for key in FIGURES if any(key in figures for figures in self._all_figures())]
        heads = ["", "steps", "guidance", *(FIGURES[key][0] for key in keys), "s / image"]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines.append(f"| {' | '.join([REAL, '', '', *(self._cell(self.real, key) for key in keys), ''])} |")
        for row in self.rows:
            cells = [row.name, str(row.steps), f"{row.guidance_scale:g}"]
            cells += [self._cell(row.figures, key, with_floor=True) for key in keys]
            lines.append(f"| {' | '.join([*cells, f'{row.seconds_per_image:.3f}'])} |")
        lines += ["", *self._straightness_lines(), *self._notes()]
        return "\n".join(lines) + "\n"

    def rows_with_straightness(self) -> list[Row]:
        """Return one row per name and guidance that has straightness values, which need more than one step."""
        found: dict[tuple[str, float], Row] = {}
        for row in self.rows:
            if row.per_bin:
                found.setdefault((row.name, row.guidance_scale), row)
        return list(found.values())

    def title(self, row: Row) -> str:
        """Return the name of a row, with its guidance if rows of this name have several."""
        scales = {other.guidance_scale for other in self.rows if other.name == row.name}
        return f"{row.name}, guidance {row.guidance_scale:g}" if len(scales) > 1 else row.name

    def _all_figures(self) -> Iterable[dict[str, Interval]]:
        return [self.real, *(row.figures for row in self.rows)]

    def _cell(self, figures: dict[str, Interval], key: str, with_floor: bool = False) -> str:
        if key not in figures:
            return ""
        spec, floor = FIGURES[key][1], self.real.get(key)
        text = format(figures[key], spec)
        if with_floor and key.startswith(FLOORED) and floor is not None:
            text += f" (floor {floor.mean:{spec}})"
        return text

    def _straightness_lines(self) -> list[str]:
        rows = self.rows_with_straightness()
        if not rows:
            return []
        lines = ["S(Z) per dimension, mean of the integrand in each bin of t:", ""]
        for row in rows:
            values = ", ".join(f"{value:.4f}" for value in row.per_bin)
            lines.append(f"- {row.name}, guidance {row.guidance_scale:g}, t from {row.edges[0]:.3f}: {values}")
        return [*lines, ""]

    def _notes(self) -> list[str]:
        settings, made = self.settings, self.provenance
        notes = [
            f"{settings['num_pictures']} images per seed compared with as many real images, seeds "
            f"{', '.join(map(str, settings['seeds']))}; ± is the {CONFIDENCE:.0%} confidence interval of the mean "
            f"over seeds. Features of the distances: {settings['features']}. The row of real pictures is the floor: "
            "the values of as many other real images.",
        ]
        if settings.get("alignment"):
            notes.append(f"Alignment: R-precision, 1 of {settings['candidates']} ({settings['alignment']}).")
        if made:
            notes.append(f"{made['hardware']}, {made['threads']} threads; {made['date']}; {made['versions']}.")
        return [line for note in notes for line in (note, "")][:-1]


def provenance(device: Any) -> dict[str, Any]:
    """Return the machine, the date and the package versions of an evaluation."""
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue  # an optional package
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.is_file() else None
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "hardware": gpu or f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "versions": ", ".join(versions),
    }


def _intervals(figures: dict[str, Any]) -> dict[str, Interval]:
    return {
        key: Interval(value["mean"], value["half_width"], tuple(value["values"])) for key, value in figures.items()
    }
