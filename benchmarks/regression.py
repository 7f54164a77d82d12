"""Rerun the small benchmarks and compare them with the committed results, to see what a change did.

    python benchmarks/regression.py             # one to two minutes on a quiet core
    python benchmarks/regression.py --update    # the results become those that later runs are compared with

It measures, with the bundled model and the emoji teacher: startup in new processes, the time of an image, the memory
of a weight delta, the images themselves, their distance to the teacher's images, and the teacher's straightness. Times
are CPU times of one thread, which other programs disturb less than the time that passes. They depend on the machine,
so the rows that count are ratios of two times of one run. A "!" marks a row that moved by more than its tolerance.
docs/regression.md explains how to read it.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from machine import median, provenance, write_results
from rectified_diffusers import RectifiedFlowPipeline, bundled_checkpoint, optimize
from rectified_diffusers.evaluation.features import MobileNetV2Features
from rectified_diffusers.evaluation.straightness import pipeline_straightness

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "examples" / "emoji" / "teacher"
COMMITTED = ROOT / "benchmarks" / "results" / "regression"
APPLE = ROOT / ".ci" / "references" / "apple.png"
TEACHER_STEPS, TEACHER_GUIDANCE = 8, 3.0
PROMPTS = ("red apple", "fox", "snowman", "pizza", "green frog", "sailboat", "crying face", "blue book", "dog face")
PROMPTS += ("rocket", "crescent moon", "red heart", "cat face", "bear", "tropical fish", "christmas tree", "sun")
PROMPTS += ("soccer ball", "cactus", "tiger face", "blue heart", "mushroom", "grinning face", "bicycle", "umbrella")

DELTA = r"""
import re, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from rectified_diffusers import compute_weight_delta

folder, tensors, rows = Path(sys.argv[1]), 20, int(sys.argv[2])
def peak():  # not ru_maxrss, which a process inherits from its parent
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def make(name, count, size):
    files = [folder / f"{name}-{kind}.safetensors" for kind in ("tuned", "base", "delta")]
    for file in files[:2]:
        save_file({f"layers.{i}": torch.randn(size) for i in range(count)}, file)
    return files
small, large = make("small", 1, 9), make("large", tensors, rows)
compute_weight_delta(*small)  # the first call loads code
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
compute_weight_delta(*large)
print((peak() - before) / (4 * tensors * rows))
"""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        value: None if it could not be measured; `note` says why.
        tolerance: relative change beyond which the row is marked; None for rows that depend on the machine.
    """

    what: str
    value: float | None
    unit: str
    tolerance: float | None
    note: str = ""


def run(words: list[str], threads: int, **variables: str) -> str:
    """Run Python with these arguments and environment variables in a new process and return its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(words[:3])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def children() -> float:
    """Return the CPU seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cost(call: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Return the CPU seconds of a call."""
    begin = clock()
    call()
    return clock() - begin


def startup(args: argparse.Namespace) -> Iterator[Row]:
    """Measure new processes, in turns, so that a disturbance hits all of them."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "rectified_diffusers.cli"]
        ways = {
            "import torch": ["-c", "import torch"],
            "--help": [*command, "--help"],
            "first image": [*command, "generate", PROMPTS[0], "-o", f"{folder}/a.png", "--device", "cpu"],
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, words in ways.items():
                times[name].append(cost(lambda words=words: run(words, args.threads), children))
    found = {name: median(each) for name, each in times.items()}
    yield Row("import torch in a new process", found["import torch"], "CPU s", None)
    for name in ("--help", "first image"):
        yield Row(f"{name} / import torch", found[name] / found["import torch"], "", 0.3)


def latency(args: argparse.Namespace, pipeline: Any) -> Iterator[Row]:
    """Measure an image of the bundled model, in units of a matrix product of 512 x 512 and of each other."""
    matrix, count = torch.randn(512, 512), 0

    def image(steps: int) -> float:
        nonlocal count
        count += 1  # a new prompt, so that no cached embedding is timed
        return cost(lambda: pipeline(f"red apple {count}", num_inference_steps=steps))

    def turns() -> dict[str, float]:
        times: dict[str, list[float]] = {"product": [], "one": [], "four": []}
        for turn in range(-1, 3 * args.rounds):
            each = {"one": image(1), "four": image(4), "product": cost(lambda: matrix @ matrix)}
            if turn >= 0:
                for name, spent in each.items():
                    times[name].append(spent)
        return {name: median(each) for name, each in times.items()}

    plain = turns()
    with optimize(pipeline, compile=False):
        fast = turns()
    yield Row("one image, once loaded", 1e3 * plain["one"], "CPU ms", None)
    yield Row("one image / matrix product", plain["one"] / plain["product"], "", 0.3)
    yield Row("four steps / one step", plain["four"] / plain["one"], "", 0.15)
    yield Row("optimized / plain", fast["one"] / plain["one"], "", 0.15)


def memory(args: argparse.Namespace) -> Iterator[Row]:
    """Measure the peak memory of making a weight delta, in sizes of the model."""
    what = "peak memory of a weight delta / model"
    if not Path("/proc/self/clear_refs").exists():
        yield Row(what, None, "", 0.25, "the peak is read from /proc")
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = 2_000 if args.small else 1_000_000
        returning = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # else kept memory of freed tensors hides that of later ones
        yield Row(what, float(run(["-c", DELTA, folder, str(rows)], args.threads, **returning)), "", 0.25)


def images(call: Callable[..., Any], count: int, **options: Any) -> torch.Tensor:
    """Generate images `(N, 3, H, W)` uint8: the prompts in turn, image i with seed i."""
    found = []
    for start in range(0, count, 25):
        numbers = range(start, min(start + 25, count))
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        prompts = [PROMPTS[number % len(PROMPTS)] for number in numbers]
        found += [np.asarray(image) for image in call(prompts, generator=generators, **options).images]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def quality(args: argparse.Namespace, pipeline: Any) -> Iterator[Row]:
    """Compare the images with the stored one and with the teacher's; measure the teacher's straightness."""
    apple = pipeline("a red apple", generator=torch.Generator().manual_seed(0)).images[0]
    levels = np.abs(np.asarray(apple, int) - np.asarray(Image.open(APPLE).convert("RGB"), int))
    yield Row("image of an apple, largest difference from the stored one", float(levels.max()), "levels of 255", 0.0)
    teacher = DiffusionPipeline.from_pretrained(TEACHER)
    teacher.set_progress_bar_config(disable=True)
    guided = {"num_inference_steps": TEACHER_STEPS, "guidance_scale": TEACHER_GUIDANCE}
    student, taught = images(pipeline, args.images), images(teacher, args.images, **guided)
    what = "feature distance to the teacher's image of the same noise / of another"
    try:
        network = MobileNetV2Features(args.mobilenet_weights)
    except (OSError, ImportError) as error:
        yield Row(what, None, "", 0.02, str(error))
    else:
        seen = [torch.cat([network(part) for part in each.split(25)]) for each in (student, taught)]
        distances = torch.cdist(seen[0], seen[1])
        same = distances.diagonal().sum()
        others = (distances.sum() - same) / (args.images - 1)
        yield Row(what, (same / others).item(), "", 0.02)
    spread = student.float().div(255).std(dim=0).mean().item()
    yield Row("spread of the images, standard deviation over all", spread, "", 0.01)
    prompts = list(PROMPTS[: args.straightness_prompts])
    found = pipeline_straightness(teacher, prompts, guidance_scale=1.0, steps=20)
    yield Row("straightness S(Z) of the teacher", found.total, "", 0.02)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    yield from startup(args)
    pipeline = RectifiedFlowPipeline.from_pretrained(bundled_checkpoint())
    pipeline.set_progress_bar_config(disable=True)
    yield from latency(args, pipeline)
    yield from memory(args)
    yield from quality(args, pipeline)


def show(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def compare(before: list[Row], now: list[Row]) -> list[str]:
    """Return the lines of a table: what was committed, what is now, and the change in percent."""
    earlier, names = {row.what: row for row in before}, {row.what for row in now}
    lines = ["| | committed | now | change | |", "|---|---|---|---|---|"]
    for row in now:
        old = earlier[row.what].value if row.what in earlier else None
        change, mark = "", "new" if row.what not in earlier else ""
        if old is not None and row.value is not None:
            relative = (row.value - old) / abs(old) if old else float(row.value != old)
            change = f"{100 * relative:+.1f} %" if old else f"{row.value - old:+.4g}"
            mark = "!" if row.tolerance is not None and abs(relative) > row.tolerance else ""
        unit = f" {row.unit}" if row.unit else ""
        lines.append(f"| {row.what} | {show(old)}{unit} | {show(row.value)}{unit} | {change} | {mark} |")
    lines += [f"| {what} | {show(row.value)} | gone | | |" for what, row in earlier.items() if what not in names]
    lines += ["", *(f"- {row.what}: {re.split(r'[.(]', row.note)[0].strip()}" for row in now if row.note)]
    return lines


def machine_of(facts: dict[str, str]) -> str:
    details = [f"{name} {facts[name]}" for name in ("threads", "load at the start", "date")]
    return ", ".join([facts["hardware"], *details])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the results to --committed")
    parser.add_argument(
        "--committed", type=Path, default=ROOT / "benchmarks/results/regression", help="without suffix"
    )
    parser.add_argument("--mobilenet-weights", type=Path, help="as of `evaluate`; downloaded if not set")
    parser.add_argument("--images", type=int, default=100, help="of the model and of its teacher")
    parser.add_argument("--straightness-prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of new processes; images get three times as many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a small weight delta, to test the script")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts, rows = provenance(), []
    for row in measure(args):
        print(f"{row.what}: {show(row.value)} {row.unit} {row.note[:200]}".rstrip(), flush=True)
        rows.append(row)
    path = args.committed.with_suffix(".json")
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"provenance": None, "rows": []}
    lines = ["", *compare([Row(**row) for row in stored["rows"]], rows), ""]
    if stored["provenance"]:
        lines += [f"- committed: {machine_of(stored['provenance'])}, commit {stored['provenance']['commit']}"]
    print(*lines, f"- now: {machine_of(facts)}, commit {facts['commit']}", sep="\n")
    if args.update:
        table = [f"| {row.what} | {show(row.value)} {row.unit} |" for row in rows]
        results = {"provenance": facts, "rows": [asdict(row) for row in rows]}
        write_results(args.committed, results, ["# Regression", "", "| | |", "|---|---|", *table], quiet=True)


if __name__ == "__main__":
    main()
