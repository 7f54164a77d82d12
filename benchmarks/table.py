"""The paper's table on real captioned pictures: each way to few steps, with the same budget of training, three seeds.

    python benchmarks/table.py --teacher work/teacher --data work/data --prompts work/prompts.txt \\
        --weights work/weights --alignment work/alignment --budget cpu

Every row begins with the diffusion teacher and has the same number of training examples, divided among its stages as
ROWS says; a stage whose steps are more work, of the stacked U-Net or of distribution matching, has fewer. Stages that
rows share are trained once. Triplets are made by the teacher or, after a reflow, by the reflowed model; what they cost
is no part of the budget and is in the second table. `--initialisation snr_matching` lets every row that trains begin
as the teacher's flow, as progressive distillation does in any case; but for the stacked one, if the teacher predicts
epsilon: a stack is new to its second half, whose errors the conversion of epsilon multiplies by 14 at the noise. The
first triplets are the same for all seeds; a seed decides the training, all triplets after it and what the evaluation
draws. Kill it and run the same command again: triplets, trainings and evaluations go on.

Budgets: `cpu` is a day on two cores for the emoji model, `gpu` a few hours on one GPU, `tiny` a test. Each number can
be given by itself. CIFAR-10 or COCO need a teacher, a folder of pictures with metadata.jsonl, and nothing else.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

import rectified_diffusers  # noqa: F401  (makes our pipelines known to the loader)
from machine import provenance
from rectified_diffusers.data.config import RealTripletConfig, TripletConfig
from rectified_diffusers.data.dataset import open_triplets
from rectified_diffusers.data.generate import generate_triplets
from rectified_diffusers.data.generate_real import generate_real_triplets
from rectified_diffusers.data.images import read_pictures
from rectified_diffusers.data.prompts import read_prompts
from rectified_diffusers.evaluation.config import EvaluationConfig
from rectified_diffusers.evaluation.evaluate import evaluate
from rectified_diffusers.evaluation.metrics import interval_of
from rectified_diffusers.evaluation.report import Evaluation
from rectified_diffusers.models.latents import latent_shape
from rectified_diffusers.models.stacked_unet import StackedUNet
from rectified_diffusers.training.config import (
    DistillConfig,
    DistributionMatchingConfig,
    ProgressiveConfig,
    ReflowConfig,
)
from rectified_diffusers.training.distill import DistillTrainer
from rectified_diffusers.training.dmd import DistributionMatchingTrainer
from rectified_diffusers.training.progressive import ProgressiveTrainer
from rectified_diffusers.training.reflow import ReflowTrainer

TRAINERS: dict[str, tuple[Any, Any]] = {
    "reflow": (ReflowTrainer, ReflowConfig),
    "distill": (DistillTrainer, DistillConfig),
    "progressive": (ProgressiveTrainer, ProgressiveConfig),
    "dmd": (DistributionMatchingTrainer, DistributionMatchingConfig),
}
PROGRESSIVE_START = 32  # Euler steps of the teacher of the first round
LPIPS_RATE = 1 / 3  # learning rate of the lpips stage, relative to the others
MATCHING_RATE = 1 / 10  # likewise of distribution matching
FAKE_UPDATES = 5  # of distribution matching


@dataclass(frozen=True)
class Stage:
    """One training: its trainer, its share of the row's budget, and what of its config is not the default."""

    method: str
    share: Fraction
    options: Mapping[str, Any] = field(default_factory=dict)
    stacked: bool = False  # of a doubled U-Net, which is doubled where it is not yet
    discriminator: bool = False  # of distribution matching, which compares with real pictures by it

    @property
    def cost(self) -> Fraction:
        """The work of a step, in steps of a reflow, of which each is three forward passes: one, and one backward."""
        # Of distribution matching: a pass of the student and three of the fake for each update of that, three of the
        # student for its own, one of the fake, two of the guided teacher. With a discriminator the fake sees as many
        # real ones, and the student's update goes through it forwards and backwards once more.
        passes = 7 * FAKE_UPDATES + 9 if self.discriminator else 4 * FAKE_UPDATES + 6
        matching = Fraction(passes, 3) if self.method == "dmd" else Fraction(1)
        return matching * (2 if self.stacked else 1)


@dataclass(frozen=True)
class Line:
    """One row: a chain of stages from the teacher on, and how the result draws."""

    name: str
    stages: tuple[Stage, ...]
    steps: int
    guidance: str = "none"  # whose guidance it is drawn with: teacher, reflow or none
    triplets: int = 1  # times the number of the budget
    real: Fraction = Fraction(0)  # share of the triplets whose data is a real picture


def reflow(share: str, **options: Any) -> Stage:
    return Stage("reflow", Fraction(share), options)


def distillation(share: str, stacked: bool = False) -> tuple[Stage, ...]:
    """L2 first, then LPIPS, as the paper does: half of the share each."""
    half = Fraction(share) / 2
    return tuple(Stage("distill", half, {"loss": loss}, stacked) for loss in ("l2", "lpips"))


def progressive(steps: int) -> Line:
    options = {"teacher_steps": PROGRESSIVE_START, "student_steps": steps, "initialisation": "snr_matching"}
    return Line("progressive distillation", (Stage("progressive", Fraction(1), options),), steps)


ROWS = {
    "teacher-25": Line("diffusion teacher, DPM-Solver++", (), 25, "teacher"),
    "teacher-8": Line("diffusion teacher, DPM-Solver++", (), 8, "teacher"),
    "2rf-25": Line("2-RF", (reflow("1"),), 25, "reflow"),
    "2rf-1": Line("2-RF", (reflow("1"),), 1, "reflow"),
    "teacher-distill": Line("teacher + distillation", distillation("1"), 1),
    "progressive-4": progressive(4),
    "progressive-2": progressive(2),
    "progressive-1": progressive(1),
    "2rf-distill": Line("2-RF + distillation", (reflow("1/2"), *distillation("1/2")), 1),
    "3rf-distill": Line("3-RF + distillation", (reflow("1/3"), reflow("1/3"), *distillation("1/3")), 1),
    "stacked-distill": Line(
        "2-RF + distillation, stacked U-Net", (reflow("1/2"), *distillation("1/2", stacked=True)), 1
    ),
}


@dataclass(frozen=True)
class Budget:
    """Size of it all; `steps` are the optimizer steps of a row."""

    steps: int
    batch_size: int
    num_triplets: int
    num_pictures: int
    learning_rate: float = 3e-4
    ema_decay: float = 0.999
    warmup_steps: int = 100
    triplet_steps: int = 25
    straightness_prompts: int = 32
    straightness_steps: int = 100


BUDGETS = {
    "tiny": Budget(12, 4, 16, 8, 1e-3, 0.5, 0, 4, straightness_prompts=2, straightness_steps=10),
    "cpu": Budget(2_000, 64, 10_000, 500, ema_decay=0.995),
    "gpu": Budget(12_000, 256, 100_000, 1_000),
}


def begun(line: Line, initialisation: str, prediction_type: str) -> Line:
    """Give the line whose first stage begins in that way, where it does not say itself.

    One that is to be stacked keeps the bare weights if the teacher's prediction type is epsilon.
    """
    stacked = any(stage.stacked for stage in line.stages)
    if not line.stages or initialisation == "weights" or (stacked and prediction_type == "epsilon"):
        return line
    first, *others = line.stages
    first = replace(first, options={"initialisation": initialisation, **first.options})
    return replace(line, stages=(first, *others))


class Table:
    """Trains and evaluates rows in the work folder, and gathers them over the seeds."""

    def __init__(self, args: argparse.Namespace, lines: Mapping[str, Line]) -> None:
        self.args, self.budget = args, args.size
        scheduler = json.loads((args.teacher / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        prediction_type = scheduler.get("prediction_type", "epsilon")  # diffusers' default; old configs leave it out
        self.lines = {name: begun(line, args.initialisation, prediction_type) for name, line in lines.items()}
        self.prompts = read_prompts(args.prompts)
        self.work: Path = args.work

    def run(self) -> Evaluation:
        reports = []
        for seed in self.args.seeds:
            made = [self.evaluate(line, self.train(line, line.stages, seed), seed) for line in self.lines.values()]
            keys = [(line.name, line.steps, self.guidance(line.guidance)) for line in self.lines.values()]
            rows = [next(row for row in made[-1].rows if row.key == key) for key in keys]
            reports.append(replace(made[-1], rows=tuple(rows)))  # in our order, without rows of other calls
        return merged(reports)

    def guidance(self, whose: str) -> float:
        return {"teacher": self.args.teacher_guidance, "reflow": self.args.reflow_guidance, "none": 1.0}[whose]

    def load(self, folder: Path) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(str(folder))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.args.device)

    def train(self, line: Line, stages: tuple[Stage, ...], seed: int) -> Path:
        """Give the folder of the model after a chain of stages, trained if it is not there."""
        if not stages:
            return self.args.teacher
        *before, stage = stages
        before = tuple(before)
        source = before
        while source and source[-1].method != "reflow":
            source = source[:-1]  # triplets come from the last flow, or from the teacher
        dataset = self.triplets(line, source, seed)
        model = self.train(line, before, seed)
        real = [self.real_triplets(self.args.teacher, self.budget.num_triplets // 4)] if stage.discriminator else []
        folder = self.folder(stage.method, model, *dataset, *real, self.config(stage, Path(), seed))
        if not (folder / "model_index.json").exists():
            self.train_stage(stage, model, dataset, real, folder, seed)
        return folder

    def folder(self, kind: str, *what: object) -> Path:
        """Name a folder by what is in it and a digest of all that it depends on, relative to the work folder."""
        said = json.dumps([str(part).replace(str(self.work), "") for part in what])
        return self.work / f"{kind}-{hashlib.blake2b(said.encode(), digest_size=5).hexdigest()}"

    def triplets(self, line: Line, source: tuple[Stage, ...], seed: int) -> list[Path]:
        """Give the folders of the triplets that a teacher or a reflowed model drew, or found for real pictures."""
        whose = "reflow" if source else "teacher"
        model, count = self.train(line, source, seed), line.triplets * self.budget.num_triplets
        seed = seed + 1 if source else 0  # the first triplets are for all seeds, and need other noise than these
        real = int(count * line.real)
        guidance = self.guidance(whose)
        config = TripletConfig(num_triplets=count - real, guidance_scale=guidance, **self.sampling(seed))
        folder = self.folder("triplets", model, config)
        if not (folder / "done").exists():
            generate_triplets(self.load(model), self.prompts, folder, config)
            (folder / "done").touch()
        return [folder, self.real_triplets(model, real, seed)] if real else [folder]

    def real_triplets(self, model: Path, count: int, seed: int = 0) -> Path:
        """Give the folder of triplets whose data is real pictures and whose noise a model found."""
        config = RealTripletConfig(num_triplets=count, inversion_time=self.args.inversion_time, **self.sampling(seed))
        folder = self.folder("real", model, config)
        if not (folder / "done").exists():
            generate_real_triplets(self.load(model), self.args.data, folder, config)
            (folder / "done").touch()
        return folder

    def sampling(self, seed: int) -> dict[str, Any]:
        return {
            "num_inference_steps": self.budget.triplet_steps,
            "batch_size": self.budget.batch_size,
            "seed": seed,
            "mixed_precision": self.args.mixed_precision,
        }

    def steps(self, stage: Stage) -> int:
        """Give the optimizer steps of a stage: its share of the budget, half of that if each costs twice."""
        return max(1, int(int(self.budget.steps * stage.share) / stage.cost))

    def config(self, stage: Stage, output_dir: Path, seed: int) -> Any:
        budget, (_, config_class) = self.budget, TRAINERS[stage.method]
        options = dict(stage.options)
        lpips = str(options.get("loss", "")).startswith("lpips")
        rate = MATCHING_RATE if stage.method == "dmd" else LPIPS_RATE if lpips else 1
        common = {
            "output_dir": output_dir,
            "batch_size": budget.batch_size,
            "learning_rate": budget.learning_rate * rate,
            "lr_schedule": "cosine",
            "ema_decay": budget.ema_decay,
            "warmup_steps": budget.warmup_steps,
            "mixed_precision": self.args.mixed_precision,
            "save_every_steps": max(1, budget.steps // 20),
            "seed": seed,
        }
        if lpips:
            common["lpips_weights"] = self.args.weights / "lpips_alexnet.safetensors"
        steps = self.steps(stage)
        if stage.method == "progressive":
            rounds = (options["teacher_steps"] // options["student_steps"]).bit_length() - 1
            common |= {"steps_per_round": max(1, steps // rounds), "warmup_steps": budget.warmup_steps // rounds}
            common["teacher_guidance_scale"] = self.guidance("teacher")
        else:
            common["max_steps"] = steps
        if stage.method == "dmd":
            common |= {"fake_updates": FAKE_UPDATES, "teacher_guidance_scale": self.guidance("teacher")}
            common["warmup_steps"] = min(budget.warmup_steps, steps // 10)
        return config_class(**{**common, **options})

    def train_stage(
        self, stage: Stage, model: Path, triplets: list[Path], real: list[Path], folder: Path, seed: int
    ) -> None:
        trainer_class, _ = TRAINERS[stage.method]
        pipeline = self.load(model)
        if stage.stacked and not isinstance(pipeline.unet, StackedUNet):
            pipeline.unet = StackedUNet.from_unet(pipeline.unet)
        own: dict[str, Any] = {}
        if stage.method == "dmd":
            own = {"teacher": self.load(self.args.teacher), "real": open_triplets(real) if real else None}
        at_once = not folder.exists()
        begin = time.perf_counter()
        trainer_class(pipeline, open_triplets(triplets), self.config(stage, folder, seed), **own).train()
        if at_once:
            (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - begin), encoding="utf-8")

    def evaluate(self, line: Line, model: Path, seed: int) -> Evaluation:
        args, budget = self.args, self.budget
        pipeline = self.load(model)
        size = latent_shape(pipeline)[1] * pipeline.vae_scale_factor
        config = EvaluationConfig(
            steps=(line.steps,),
            guidance_scale=self.guidance(line.guidance),
            seeds=(seed,),
            num_pictures=budget.num_pictures,
            feature_size=args.feature_size,
            mobilenet_weights=args.weights / "mobilenet_v2.safetensors",
            alignment=args.alignment,
            sentence_encoder=str(args.weights / "minilm"),
            straightness_prompts=budget.straightness_prompts,
            straightness_steps=budget.straightness_steps,
            batch_size=budget.batch_size,
        )
        pictures = read_pictures(args.data, size)
        return evaluate(pipeline, pictures, self.work / f"evaluation-{seed}", config, line.name)

    def costs(self) -> list[dict[str, Any]]:
        """Say what each row was trained on: optimizer steps, examples, and seconds where a training ran at one go."""
        rows = []
        for line in self.lines.values():
            steps = [self.config(stage, Path(), 0).max_steps for stage in line.stages]
            folders = [self.train(line, line.stages[:i], self.args.seeds[0]) for i in range(1, len(steps) + 1)]
            timed = [folder / "seconds.json" for folder in folders]
            whole = all(path.exists() for path in timed)
            rows.append(
                {
                    "name": line.name,
                    "steps": line.steps,
                    "stages": [f"{stage.method} {dict(stage.options)}" for stage in line.stages],
                    "optimizer_steps": steps,
                    "examples": sum(steps) * self.budget.batch_size,
                    "triplets": line.triplets * self.budget.num_triplets if line.stages else 0,
                    "seconds": sum(json.loads(path.read_text()) for path in timed) if whole else None,
                }
            )
        return rows


def merged(reports: list[Evaluation]) -> Evaluation:
    """Put the evaluations of several trainings, each with its own seed, into one with intervals over the seeds."""
    first = reports[0]
    gather = lambda figures: {  # noqa: E731
        key: interval_of([value for own in figures for value in own[key].values]) for key in figures[0]
    }
    rows = []
    for of_seeds in zip(*(report.rows for report in reports), strict=True):
        per_bin = tuple(sum(bins) / len(bins) for bins in zip(*(row.per_bin for row in of_seeds), strict=True))
        seconds = sorted(row.seconds_per_image for row in of_seeds)[len(of_seeds) // 2]
        figures = gather([row.figures for row in of_seeds])
        rows.append(replace(of_seeds[0], figures=figures, per_bin=per_bin, seconds_per_image=seconds, model=""))
    seeds = [seed for report in reports for seed in report.settings["seeds"]]
    real = gather([report.real for report in reports])
    return replace(first, settings={**first.settings, "seeds": seeds}, real=real, rows=tuple(rows))


def cost_table(costs: list[dict[str, Any]]) -> str:
    lines = ["| | steps | stages | optimizer steps | examples | triplets | training, s |", "|---" * 7 + "|"]
    for row in costs:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        cells = [
            row["name"],
            row["steps"],
            "; ".join(row["stages"]) or "none",
            " + ".join(map(str, row["optimizer_steps"])),
        ]
        lines.append(f"| {' | '.join(map(str, [*cells, row['examples'], row['triplets'], seconds]))} |")
    return "\n".join(lines)


def write(output: Path, title: str, report: Evaluation, costs: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write the results as JSON and Markdown."""
    made = provenance(args.device)
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {**asdict(report), "costs": costs, "budget": asdict(args.size), "made": made}
    output.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    note = (
        f"    {made['command']}\n\nCommit {made['commit']}; {made['hardware']}; {made['date']}; {made['versions']}.\n"
    )
    parts = [f"# {title}", report.as_markdown().strip(), cost_table(costs), note]
    output.with_suffix(".md").write_text("\n\n".join(parts), encoding="utf-8")
    print("\n\n".join(parts))


def add_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("--teacher", type=Path, required=True, help="pipeline folder of the diffusion teacher")
    parser.add_argument("--data", type=Path, required=True, help="folder of real pictures, as `evaluate --data` takes")
    parser.add_argument("--prompts", type=Path, required=True, help="prompts of the triplets")
    parser.add_argument("--weights", type=Path, required=True, help="folder that examples/emoji/weights.py wrote")
    parser.add_argument("--alignment", type=Path, help="folder that examples/emoji/alignment.py wrote")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu", help="size of it all (default: cpu)")
    counts = ("steps", "warmup_steps", "batch_size", "num_triplets", "triplet_steps", "num_pictures")
    for name in (*counts, "straightness_prompts"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the budget's")
    for name in ("learning_rate", "ema_decay"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help="instead of the budget's")
    parser.add_argument("--initialisation", choices=["weights", "snr_matching"], default="weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher-guidance", type=float, default=3.0)
    parser.add_argument("--reflow-guidance", type=float, default=1.5)
    parser.add_argument("--inversion-time", type=float, default=0.9, help="of rows with real pairs (default: 0.9)")
    parser.add_argument("--feature-size", type=int, default=128, help="pixels at which MobileNetV2 sees the pictures")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("work/table"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results") / output, help="without suffix")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    given = {name: value for name in asdict(BUDGETS["tiny"]) if (value := getattr(args, name, None)) is not None}
    args.size = replace(BUDGETS[args.budget], **given)
    return args


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser, "table")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}"
    )
    args = parsed(parser)
    table = Table(args, {name: ROWS[name] for name in args.rows})
    write(args.output, "One step and its alternatives", table.run(), table.costs(), args)


if __name__ == "__main__":
    main()
