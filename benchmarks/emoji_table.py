"""The table of the emoji model: teacher, 2-Rectified Flow and one step, side by side, on captions seen and held out.

    python benchmarks/emoji_table.py --teacher work/teacher --reflow work/reflow --distilled work/distilled \\
        --data work/data --weights work/weights --alignment work/alignment

Every row draws the same captions from the same noise. Pictures are kept in the work folder as they come: kill it and
run the same command again, and it goes on. The figures:

- Frechet distance of MobileNetV2 features to real pictures, one per caption. Each caption has two real pictures: one
  set is the reference, the other gives the floor, what real pictures of the same captions and number score.
- Alignment: R-precision (1 of 100), by the judge that examples/emoji/alignment.py trained. For real pictures it is
  taken on the style that the judge never saw.
- S(Z) per dimension, over the model's own trajectory; a diffusion model from where its schedule begins.
- Seconds per image: median of single pictures, from prompt to pixels.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import rectified_diffusers  # noqa: F401  (makes our pipelines known to the loader)
from rectified_diffusers.evaluation.alignment import AlignmentModel, SentenceFeatures, retrieval
from rectified_diffusers.evaluation.frechet import MobileNetV2Features, frechet_distance, statistics_of
from rectified_diffusers.evaluation.straightness import pipeline_straightness

CANDIDATES = 100
NOTES = """
Frechet: {num_prompts} pictures, MobileNetV2 at {judge[image_size]} pixels, against as many real ones; the row of real
pictures is the floor at this size. Alignment: R-precision (1 of {candidates}) on {num_prompts} pictures of seen
captions and {held_out_pictures} of held-out ones; of real pictures, in the one style that the judge never saw
({judge[unseen_style]}).

    {command}

Commit {commit}; {hardware}, {threads} threads; {date}; {versions}.
"""


@dataclass(frozen=True)
class Row:
    """One model at one number of steps."""

    name: str
    folder: Path
    steps: int
    guidance_scale: float


@dataclass(frozen=True)
class Real:
    """Real pictures by number: two for each seen caption, those of the unseen style, and the captions of all."""

    seen: list[str]
    held_out: list[str]
    reference: list[int]
    floor: list[int]
    unseen_style: list[int]
    rows: list[dict]


def rows_of(args: argparse.Namespace) -> list[Row]:
    return [
        Row("diffusion teacher", args.teacher, 25, args.teacher_guidance),
        Row("2-RF", args.reflow, 25, args.reflow_guidance),
        Row("2-RF", args.reflow, 1, args.reflow_guidance),
        Row("distilled", args.distilled, 1, 1.0),
    ]


def choose_real(args: argparse.Namespace, unseen_style: str) -> Real:
    """Draw the captions and their real pictures; distinct captions first, then again with other pictures."""
    rows = [json.loads(line) for line in (args.data / "rows.jsonl").open(encoding="utf-8")]
    by_caption: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row["split"] == "train":
            by_caption[row["label"]].append(i)
    draw = random.Random(args.seed)
    pairs = []  # (round, shuffled order, caption, two pictures)
    for label, pictures in sorted(by_caption.items()):
        order = draw.random()
        draw.shuffle(pictures)
        pairs += [(i, order, label, pictures[i : i + 2]) for i in range(0, len(pictures) - 1, 2)]
    if args.num_prompts > len(pairs):
        raise SystemExit(f"--num-prompts must be at most {len(pairs)}, the pairs of real pictures of a caption.")
    chosen = sorted(pairs)[: args.num_prompts]
    held_out = sorted({row["label"] for row in rows if row["split"] == "caption"})
    return Real(
        seen=[label for _, _, label, _ in chosen],
        held_out=(held_out * args.pictures_per_held_out_caption),
        reference=[pictures[0] for *_, pictures in chosen],
        floor=[pictures[1] for *_, pictures in chosen],
        unseen_style=[i for i, row in enumerate(rows) if row["style"] == unseen_style and row["split"] != "pair"],
        rows=rows,
    )


def load_pipeline(folder: Path, device: str) -> Any:
    """Load a pipeline; a diffusion one is given the solver of the triplets, DPM-Solver++."""
    pipeline = DiffusionPipeline.from_pretrained(str(folder)).to(device)
    if pipeline.scheduler.config.get("prediction_type") != "flow_prediction":
        config = pipeline.scheduler.config
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_noise(pipeline: Any, count: int, seed: str) -> Tensor:
    """Noise of a batch as a function of the seed alone, the same for every model."""
    number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "big") >> 1
    size = pipeline.unet.config.sample_size
    shape = (count, pipeline.unet.config.in_channels, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def draw_pictures(pipeline: Any, row: Row, prompts: list[str], noise: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) uint8."""
    pictures = pipeline(
        prompts,
        num_inference_steps=row.steps,
        guidance_scale=row.guidance_scale,
        latents=noise.to(pipeline.device),
        output_type="pt",
    ).images
    return (pictures * 255).round().clamp(0, 255).to("cpu", torch.uint8)


def cache_folder(row: Row, prompts: list[str], args: argparse.Namespace) -> Path:
    """A folder of the work folder for exactly these pictures: the weights, the settings and the captions name it."""
    digest = hashlib.sha256(json.dumps([row.steps, row.guidance_scale, args.seed, args.batch_size, prompts]).encode())
    for file in sorted(row.folder.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    name = row.name.replace(" ", "-")
    folder = args.work / f"{name}-{row.steps}-{digest.hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def generate(pipeline: Any, row: Row, prompts: list[str], folder: Path, args: argparse.Namespace) -> Tensor:
    """Pictures (N, 3, H, W) uint8 of the prompts, batch by batch; batches that are on disk are read."""
    batches = []
    for first in tqdm(range(0, len(prompts), args.batch_size), desc=f"{row.name}, {row.steps} steps"):
        path = folder / f"{first:06}.safetensors"
        if not path.exists():
            some = prompts[first : first + args.batch_size]
            noise = draw_noise(pipeline, len(some), f"{args.seed}/{first}")
            save_file({"images": draw_pictures(pipeline, row, some, noise)}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        batches.append(load_file(path)["images"])
    return torch.cat(batches)


def seconds_per_image(pipeline: Any, row: Row, prompts: list[str], repeats: int = 9) -> float:
    """Median time of one picture, after one to warm up."""
    times = []
    for prompt in [prompts[0], *prompts[:repeats]]:
        noise = draw_noise(pipeline, 1, prompt)
        begin = time.perf_counter()
        draw_pictures(pipeline, row, [prompt], noise)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def once(path: Path, make: Any) -> Any:
    """What `make` returns, as JSON; from `path` if it was made before."""
    if not path.exists():
        path.with_suffix(".tmp").write_text(json.dumps(make()), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


class Judge:
    """Features of pictures, and how well they show their captions."""

    def __init__(self, args: argparse.Namespace, labels: list[str], size: int) -> None:
        self.features = MobileNetV2Features(args.weights / "mobilenet_v2.safetensors", size).to(args.device)
        self.model = AlignmentModel.load(args.alignment / "alignment.safetensors")
        self.numbers = {label: i for i, label in enumerate(labels)}
        with torch.no_grad():
            self.texts = self.model.embed_texts(SentenceFeatures(args.weights / "minilm")(labels))

    def see(self, images: Tensor) -> Tensor:
        return torch.cat([self.features(batch).cpu() for batch in tqdm(images.split(32), desc="features")])

    @torch.no_grad()
    def r_precision(self, features: Tensor, captions: list[str]) -> float:
        numbers = torch.tensor([self.numbers[caption] for caption in captions])
        return retrieval(self.model.embed_images(features), self.texts, numbers, CANDIDATES).r_precision


def measure_real(real: Real, images: Tensor, judge: Judge) -> tuple[dict, Any]:
    """The row of real pictures: the floor of the distance, and the alignment of the unseen style."""
    reference = statistics_of([judge.see(images[real.reference])])
    floor = statistics_of([judge.see(images[real.floor])])
    features = judge.see(images[real.unseen_style])
    alignment = {}
    for split, name in (("train", "seen"), ("caption", "held_out")):
        part = [i for i, picture in enumerate(real.unseen_style) if real.rows[picture]["split"] == split]
        captions = [real.rows[real.unseen_style[i]]["label"] for i in part]
        alignment[f"alignment_{name}"] = judge.r_precision(features[part], captions)
    return {"name": "real pictures", "frechet_distance": frechet_distance(floor, reference), **alignment}, reference


def measure(row: Row, real: Real, reference: Any, judge: Judge, args: argparse.Namespace) -> dict:
    """All figures of one row."""
    prompts = real.seen + real.held_out
    folder = cache_folder(row, prompts, args)
    pipeline = load_pipeline(row.folder, args.device)
    features = judge.see(generate(pipeline, row, prompts, folder, args))
    seen, held_out = features.split([len(real.seen), len(real.held_out)])
    result = {
        **{"name": row.name, "steps": row.steps, "guidance_scale": row.guidance_scale},
        "frechet_distance": frechet_distance(statistics_of([seen]), reference),
        "alignment_seen": judge.r_precision(seen, real.seen),
        "alignment_held_out": judge.r_precision(held_out, real.held_out),
        "seconds_per_image": once(folder / "seconds.json", lambda: seconds_per_image(pipeline, row, real.seen)),
    }
    if row.steps > 1:
        some, steps = real.seen[: args.straightness_prompts], args.straightness_steps
        options = {"batch_size": args.batch_size, "seed": args.seed}
        make = lambda: asdict(pipeline_straightness(pipeline, some, row.guidance_scale, steps, **options))  # noqa: E731
        result["straightness"] = once(folder / f"straightness-{len(some)}-{steps}.json", make)
    return result


def provenance(args: argparse.Namespace) -> dict:
    """Command, commit, hardware, date, versions."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()  # noqa: E731
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    cpu = re.search(r"model name\s*: (.*)", info)
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": (git("rev-parse", "--verify", "--quiet", "HEAD") or "none")
        + (" with changes" if git("status", "--porcelain") else ""),
        "hardware": gpu or f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "versions": ", ".join(
            f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "torchvision")
        ),
    }


def as_markdown(results: dict) -> str:
    """The table, the straightness per bin, and where they come from."""
    settings = results["settings"]
    head = "| | steps | guidance | Frechet | alignment, seen | alignment, held out | S(Z) | s / image |"
    lines = ["# Emoji: teacher, 2-Rectified Flow, one step", "", head, "|---|---|---|---|---|---|---|---|"]
    for row in results["rows"]:
        total, seconds = row.get("straightness", {}).get("total"), row.get("seconds_per_image")
        cells = [row["name"], row.get("steps", ""), row.get("guidance_scale", ""), f"{row['frechet_distance']:.1f}"]
        cells += [f"{row['alignment_seen']:.3f}", f"{row['alignment_held_out']:.3f}"]
        cells += [f"{total:.4f}" if total else "", f"{seconds:.3f}" if seconds else ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "Straightness S(Z) per dimension: mean of the integrand in each bin of t.", ""]
    for row in results["rows"]:
        if "straightness" in row:
            bins, edges = row["straightness"]["per_bin"], row["straightness"]["edges"]
            lines += [f"- {row['name']}, t from {edges[0]:.3f}: " + ", ".join(f"{value:.4f}" for value in bins)]
    return "\n".join([*lines, NOTES.format(**settings, candidates=CANDIDATES, **results["provenance"])])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("teacher", "reflow", "distilled"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--data", type=Path, required=True, help="folder that examples/emoji/data.py wrote")
    parser.add_argument("--weights", type=Path, required=True, help="folder that examples/emoji/weights.py wrote")
    parser.add_argument("--alignment", type=Path, required=True, help="folder that examples/emoji/alignment.py wrote")
    parser.add_argument("--num-prompts", type=int, default=1000, help="pictures of seen captions")
    parser.add_argument("--pictures-per-held-out-caption", type=int, default=4)
    parser.add_argument("--teacher-guidance", type=float, default=5.0)
    parser.add_argument("--reflow-guidance", type=float, default=1.5)
    parser.add_argument("--straightness-prompts", type=int, default=64)
    parser.add_argument("--straightness-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("work/emoji_table"), help="folder of the pictures")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/emoji_table"), help="without suffix")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    card = json.loads((args.alignment / "alignment.json").read_text(encoding="utf-8"))
    real = choose_real(args, card["unseen_style"])
    images = load_file(args.data / "images.safetensors")["images"]
    judge = Judge(args, sorted({row["label"] for row in real.rows}), card["image_size"])
    first, reference = measure_real(real, images, judge)
    del images
    rows = [first, *(measure(row, real, reference, judge, args) for row in rows_of(args))]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings |= {"held_out_pictures": len(real.held_out), "judge": card}
    results = {"rows": rows, "settings": settings, "provenance": provenance(args)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(as_markdown(results), encoding="utf-8")
    print(as_markdown(results))


if __name__ == "__main__":
    main()
