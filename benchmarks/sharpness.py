"""When does reflow before distillation pay? A sharp and a smooth toy teacher, at equal total budget.

    OMP_NUM_THREADS=1 python benchmarks/sharpness.py          # 13 minutes on one core
    python benchmarks/sharpness.py --small --output /tmp/sharpness

InstaFlow (arXiv:2309.06380) reports that distilling the teacher directly gives a poor one-step model, and that
distilling its 2-RF gives a good one. This script compares the two on

- a sharp teacher: the exact flow of a mixture of 600 narrow Gaussians in 32 dimensions, in closed form. Students start
  from new weights;
- a smooth teacher: a network of the student's size, trained on the same data to predict epsilon. Students start as the
  flow of that network (`matched`, what `snr_matching` does) or from its weights as they are (`bare`).

A recipe with budget T takes T training steps and N pairs:

- direct: T steps of distillation on N pairs of the teacher;
- 2-RF: T / 2 steps of reflow on N / 2 pairs of the teacher, then T / 2 of distillation on N / 2 pairs of the 2-RF;
- 2-RF, teacher's pairs: the same, but distilled on N / 2 further pairs of the teacher. This separates the effect of
  the coupling from the effect of the better start.

N is proportional to T, and a pair costs the same number of evaluations whether the teacher or the 2-RF makes it. So
all recipes are equal in pairs, in steps, and in network evaluations: those that generate the pairs, and 3 for each
training example (one forward pass, and a backward pass that counts as two). The training of the smooth teacher is not
counted.

Each cell is stored in --work when it is finished; a run that was killed continues from there.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from machine import provenance, write_results
from rectified_diffusers.evaluation.intervals import Interval, interval_of
from rectified_diffusers.evaluation.metrics import frechet_distance
from rectified_diffusers.flow import FixedTime, Uniform, euler
from rectified_diffusers.seeds import generator_of
from sharpness_figure import draw_figure
from sharpness_toys import Flow, Mixture, Pairs, Size, Stage, Toys, draw_pairs

STARTS = {"sharp": ("new",), "smooth": ("matched", "bare")}
RECIPES = {"direct": "direct", "2rf": "2-RF", "2rf-teacher": "2-RF, teacher's pairs"}
METRICS = {
    "own_error": "error on own held-out pairs",
    "teacher_error": "error on the teacher's held-out pairs",
    "frechet": "Frechet distance to the teacher",
    "sliced": "sliced Wasserstein distance to the teacher",
    "mode_distance": "distance to the nearest mode",
}
SMALL = Size(
    dimensions=4,
    modes=8,
    width=16,
    batch_size=32,
    evaluations=4,
    teacher_steps=20,
    samples=64,
    projections=8,
    chunk=32,
)


@dataclass(frozen=True)
class Cell:
    """One trained student."""

    seed: int
    teacher: str
    start: str
    recipe: str
    steps: int
    learning_rate: float

    @property
    def name(self) -> str:
        return "-".join(map(str, dataclasses.astuple(self)))


def relative_error(predicted: Tensor, data: Tensor) -> float:
    """Return the squared error as a share of the data's variance: predicting the mean of all data gives 1."""
    return ((predicted - data).square().sum() / (data - data.mean(0)).square().sum()).item()


def sliced_wasserstein(first: Tensor, second: Tensor, projections: int) -> float:
    """Return the root mean square of the 2-Wasserstein distances of two equally large sets along random directions."""
    directions = torch.randn(first.shape[1], projections, generator=generator_of("directions"))
    directions = directions / directions.norm(dim=0)
    return ((first @ directions).sort(0).values - (second @ directions).sort(0).values).square().mean().sqrt().item()


def mode_distance(samples: Tensor, mixture: Mixture) -> float:
    """Return the root mean square distance to the nearest mode, relative to the data: 1 is as sharp as the data."""
    nearest = torch.cat([torch.cdist(part, mixture.means).amin(1) for part in samples.split(1024)])
    return (nearest.square().mean() / samples.shape[1]).sqrt().item() / mixture.std


class Bench:
    """The toys of one seed and the last reflowed flow; no result depends on which cells are requested."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size, self.seed, self.toys = size, seed, Toys(size, seed)
        self.reflowed: tuple[Cell, Flow] | None = None

    def references(self, teacher: str) -> tuple[Pairs, Tensor]:
        """Return held-out pairs and, from other noise, the samples that distances are measured to."""
        held_out, other = (self.toys.pairs(teacher, self.size.samples, use) for use in ("held out", "reference"))
        return held_out, other.data

    def distances(self, samples: Tensor, reference: Tensor, prefix: str = "") -> dict[str, float]:
        return {
            f"{prefix}frechet": frechet_distance(samples, reference),
            f"{prefix}sliced": sliced_wasserstein(samples, reference, self.size.projections),
            f"{prefix}mode_distance": mode_distance(samples, self.toys.mixture),
        }

    def reflow(self, cell: Cell, stage: Stage) -> Flow:
        """Run a cell's stage of reflow, or return the result of the same stage of another recipe."""
        shared = dataclasses.replace(cell, recipe="reflow")
        if self.reflowed is None or self.reflowed[0] != shared:
            self.reflowed = shared, stage.train(self.toys.student(cell.start), self.size, shared.name)
        return self.reflowed[1]

    def run(self, cell: Cell) -> dict[str, float]:
        """Train the student of a cell and measure it."""
        size, rate, half = self.size, cell.learning_rate, cell.steps // 2
        held_out, reference = self.references(cell.teacher)
        own, found = held_out, {}
        if cell.recipe == "direct":
            pairs = self.toys.pairs(cell.teacher, size.pairs(cell.steps), "training")
            stages = [Stage(FixedTime(0), pairs, cell.steps, rate)]
            start = self.toys.student(cell.start)
        else:
            pairs = self.toys.pairs(cell.teacher, size.pairs(half), "training")
            stages = [Stage(Uniform(), pairs, half, rate)]
            start = self.reflow(cell, stages[0])
            if cell.recipe == "2rf":
                pairs = draw_pairs(start, size.pairs(half), size, cell.name, "pairs")
                own = draw_pairs(start, size.samples, size, self.seed, cell.teacher, "held out")  # of the same noise
                found = {"transport_cost": own.transport_cost, **self.distances(own.data, reference, "flow_")}
            else:
                pairs = self.toys.pairs(cell.teacher, size.pairs(cell.steps), "training")[size.pairs(half) :]
            stages.append(Stage(FixedTime(0), pairs, half, rate))
        student = stages[-1].train(start, size, cell.name)
        with torch.no_grad():
            made = euler(student, held_out.noise, 1)
        return {
            "evaluations": sum(stage.evaluations(size) for stage in stages),
            "own_error": relative_error(made, own.data),
            "teacher_error": relative_error(made, held_out.data),
            **self.distances(made, reference),
            **found,
        }

    def teacher(self, teacher: str) -> dict[str, float]:
        """Measure a teacher against itself, which is the floor of the distances, and against its data."""
        held_out, reference = self.references(teacher)
        data = self.toys.mixture.sample(self.size.samples, generator_of(self.seed, "data"))
        return {
            **self.distances(held_out.data, reference),
            **self.distances(held_out.data, data, "data_"),
            "transport_cost": held_out.transport_cost,
            "transport_cost_independent": Pairs(held_out.noise, reference).transport_cost,
        }


def cells_of(seed: int, args: argparse.Namespace) -> Iterator[Cell]:
    """List the cells of a seed: every recipe at every budget, and one budget also with other learning rates."""
    rate = args.learning_rate
    for teacher, starts in STARTS.items():
        for start in starts:
            for steps in args.budgets:
                yield from (Cell(seed, teacher, start, recipe, steps, rate) for recipe in RECIPES)
            for other in (float(f"{rate / 3:.2g}"), float(f"{rate * 3:.2g}")):
                yield from (Cell(seed, teacher, start, recipe, args.grid_budget, other) for recipe in RECIPES)


class Store:
    """One file per finished cell, in a separate folder for each size."""

    def __init__(self, work: Path, size: Size) -> None:
        text = json.dumps(dataclasses.asdict(size), sort_keys=True)
        self.folder = work / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Any) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if not path.exists():
            begin = time.process_time()
            found = {"figures": make(), "seconds": time.process_time() - begin}
            whole = path.with_suffix(".new")
            whole.write_text(json.dumps(found), encoding="utf-8")
            whole.replace(path)
            print(f"{name}: {found['seconds']:.1f} s", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))


def summary(values: Sequence[float]) -> dict[str, Any]:
    return dataclasses.asdict(interval_of(values))


def rows_of(found: dict[Cell, dict[str, float]]) -> list[dict[str, Any]]:
    """Combine the seeds of each kind of cell, with each recipe's ratio to `direct` per seed."""
    rows = []
    seeds = sorted({cell.seed for cell in found})
    for cell in [cell for cell in found if cell.seed == seeds[0]]:
        of_seeds = [found[dataclasses.replace(cell, seed=seed)] for seed in seeds]
        direct = [found[dataclasses.replace(cell, seed=seed, recipe="direct")] for seed in seeds]
        row: dict[str, Any] = dataclasses.asdict(cell) | {"evaluations": of_seeds[0]["evaluations"]}
        del row["seed"]
        for key in of_seeds[0].keys() - {"evaluations"}:
            row[key] = summary([figures[key] for figures in of_seeds])
        if cell.recipe != "direct":
            for key in METRICS:
                ratios = [ours[key] / theirs[key] for ours, theirs in zip(of_seeds, direct, strict=True)]
                row[f"{key}_ratio"] = summary(ratios)
        rows.append(dict(sorted(row.items())))
    return rows


def text_of(figure: dict[str, Any]) -> str:
    return f"{Interval(**figure):.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", *("| " + " | ".join(words) + " |" for words in (head, ["---"] * len(head), *rows))]


COST = "E abs(data - noise)^2 / d"
TEACHER = {
    "frechet": "Frechet floor",
    "sliced": "sliced floor",
    "mode_distance": METRICS["mode_distance"],
    "data_frechet": "Frechet distance to the data",
    "transport_cost": f"{COST}, its pairs",
    "transport_cost_independent": "independent pairs",
}
FLOW = {
    "transport_cost": COST,
    "flow_frechet": METRICS["frechet"],
    "flow_sliced": METRICS["sliced"],
    "flow_mode_distance": METRICS["mode_distance"],
}


def report_lines(results: dict[str, Any], args: argparse.Namespace) -> list[str]:
    lines = ["# When reflow before distillation pays", "", f"![Curves over the budget]({args.output.name}.png)", ""]
    lines += ["± is the 95% confidence interval of the mean over the seeds. An error is squared and a share of the"]
    lines += [
        "data's variance; the 'own' pairs of a 2-RF's student are the 2-RF's. The distance to the nearest mode is"
    ]
    lines += ["1 for the data. A floor is the teacher's distance to itself, from other noise.", "", "## Teachers"]
    rows = [[name, *(text_of(found[key]) for key in TEACHER)] for name, found in results["teachers"].items()]
    lines += table(["teacher", *TEACHER.values()], rows)
    head = ["teacher", "start", "recipe", "steps", "evaluations", "learning rate", *METRICS.values(), "/ direct"]
    by_rate: dict[bool, list[list[str]]] = {True: [], False: []}
    flows = []
    for row in results["rows"]:
        words = [row["teacher"], row["start"], RECIPES[row["recipe"]], str(row["steps"])]
        words += [f"{row['evaluations'] / 1e6:.3g}M", f"{row['learning_rate']:g}"]
        words += [text_of(row[name]) for name in METRICS]
        words += [text_of(row["frechet_ratio"]) if "frechet_ratio" in row else ""]
        by_rate[row["learning_rate"] == args.learning_rate].append(words)
        if row["recipe"] == "2rf" and row["learning_rate"] == args.learning_rate:
            flows.append([*words[:2], str(row["steps"] // 2), *(text_of(row[name]) for name in FLOW)])
    lines += ["", "## Budgets", *table(head, by_rate[True]), ""]
    lines += ["The last column is the ratio of the Frechet distances, seed by seed."]
    lines += ["", "## Other learning rates", *table(head, by_rate[False])]
    lines += ["", "## The 2-RF itself, undistilled"]
    lines += table(["teacher", "start", "steps of reflow", *FLOW.values()], flows)
    return [*lines, "", f"{results['cpu_seconds']:.0f} s of one core. {json.dumps(results['size'])}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000], help="training steps")
    parser.add_argument(
        "--grid-budget", type=int, default=1000, help="the budget at which learning rates are compared"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--small", action="store_true", help="a test run of seconds, on tiny toys")
    parser.add_argument("--work", type=Path, default=Path("work/sharpness"), help="folder of finished cells")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sharpness"), help="without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = Size()
    if args.small:
        size, args.budgets, args.grid_budget, args.seeds = SMALL, [4, 8], 8, args.seeds[:2]
    results: dict[str, Any] = {"provenance": provenance()}
    store, found, teachers, seconds = Store(args.work, size), {}, {name: [] for name in STARTS}, 0.0
    for seed in args.seeds:
        bench = Bench(size, seed)
        for teacher, of_seeds in teachers.items():
            kept = store.get(f"{seed}-{teacher}", lambda bench=bench, teacher=teacher: bench.teacher(teacher))
            of_seeds.append(kept["figures"])
            seconds += kept["seconds"]
        for cell in cells_of(seed, args):
            kept = store.get(cell.name, lambda bench=bench, cell=cell: bench.run(cell))
            found[cell] = kept["figures"]
            seconds += kept["seconds"]
    results["size"] = dataclasses.asdict(size)
    results["cpu_seconds"] = seconds
    results["teachers"] = {
        name: {key: summary([figures[key] for figures in of_seeds]) for key in of_seeds[0]}
        for name, of_seeds in teachers.items()
    }
    results["rows"] = rows_of(found)
    write_results(args.output, results, report_lines(results, args))
    draw_figure(results, args.learning_rate, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
