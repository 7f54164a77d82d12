"""Store the results of an evaluation: rows of metrics as JSON, which can be extended, and as a Markdown table."""

import json
import os
import platform
import re
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rectified_diffusers.evaluation.intervals import Interval
from rectified_diffusers.evaluation.tables import markdown_of
from rectified_diffusers.files import write_atomically

FILE = "evaluation.json"
TABLE = "evaluation.md"
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
        trainings: number of models, trained with different seeds, that the row is the mean of.
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
    trainings: int = 1

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
        reference: name, steps and guidance of the row that the others are compared with; empty without one.
        captions: number of distinct held-out captions, by whether all of their words occur in training.
        coupling: transport cost of the triplets, see `metrics.transport_cost`; empty if the data are no triplets.

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
    reference: tuple[Any, ...] = ()
    captions: dict[str, int] = field(default_factory=dict)
    coupling: dict[str, Interval] = field(default_factory=dict)

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
        return cls.of(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Evaluation":
        """Return the evaluation that a JSON file holds, also one of an earlier version."""
        rows = [{**row, "figures": _intervals(row["figures"])} for row in content["rows"]]
        rows = [Row(**{**row, **{key: tuple(row[key]) for key in ("per_bin", "edges")}}) for row in rows]
        changes = {"real": _intervals(content["real"]), "prompts": tuple(content["prompts"]), "rows": tuple(rows)}
        changes["reference"] = tuple(content.get("reference", ()))  # not in files of earlier versions
        changes["coupling"] = _intervals(content.get("coupling", {}))
        return cls(**(content | changes))

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
        """Return the Markdown tables and their notes."""
        return markdown_of(self)

    def reference_row(self) -> Row | None:
        """Return the row that the others are compared with; None without one."""
        return next((row for row in self.rows if row.key == self.reference), None)

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
    """Return intervals as JSON holds them; those of earlier versions have no deviations."""
    return {
        key: Interval(value["mean"], value["half_width"], tuple(value["values"]), tuple(value.get("deviations", ())))
        for key, value in figures.items()
    }
