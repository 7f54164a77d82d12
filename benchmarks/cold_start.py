"""Measure startup times in new processes: import, --help, and the first image of the bundled model.

    python benchmarks/cold_start.py
    python benchmarks/cold_start.py --device cuda --model sd15    # a saved pipeline of random weights, also compiled

Reports medians over --rounds new processes, with the files in the system's cache, next to the project's targets.
--imports also reports the packages with the longest import times before the first image. --model measures, for each
process, the imports, loading a pipeline of that shape from 16-bit files to the device, and the first image: eager,
optimized, and compiled. Compiled code stays in torch's cache on disk, so a second process compiles less. The first one
compiles everything if the cache was empty, which the report says.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from getpass import getuser
from pathlib import Path
from typing import Any

from machine import median, provenance, seconds, write_results

DRAW = """
import time
from rectified_diffusers import RectifiedFlowPipeline, bundled_checkpoint
pipeline = RectifiedFlowPipeline.from_pretrained(bundled_checkpoint())
pipeline.set_progress_bar_config(disable=True)
times = []
for i in range(12):
    begin = time.perf_counter()
    pipeline(f"a red apple, number {i}")
    times.append(time.perf_counter() - begin)
print(sorted(times[2:])[5])
"""
STAGES = """
import json, sys, time
times, begin = {}, time.perf_counter()
def done(name):
    global begin
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    times[name], begin = time.perf_counter() - begin, time.perf_counter()
folder, device, way = sys.argv[1:]
import torch
from rectified_diffusers import RectifiedFlowPipeline, RectifiedFlowXLPipeline, StackedUNet, optimize
done("imports")
cls = RectifiedFlowXLPipeline if "sdxl" in folder else RectifiedFlowPipeline
pipeline = cls.from_pretrained(folder, dtype=torch.float16 if device.startswith("cuda") else torch.float32).to(device)
pipeline.set_progress_bar_config(disable=True)
if way != "eager":
    optimize(pipeline, compile=way == "compiled")
done("loading")
for name in ("first picture", "second picture", "third picture"):
    pipeline(f"a red apple, the {name}")
    done(name)
print(json.dumps(times))
"""
COMMAND = [sys.executable, "-m", "rectified_diffusers.cli"]


def run(words: list[str], threads: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    done.check_returncode()
    return done.stdout


def imports(words: list[str], threads: int) -> list[tuple[str, float]]:
    """Return the import seconds of each package's own modules, longest first, including the cost of measuring."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    words = [words[0], "-X", "importtime", *words[1:]]
    told = subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stderr
    spent: Counter[str] = Counter()
    for own, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)", told, re.MULTILINE):
        spent[module.split(".")[0]] += int(own)
    return [(name, microseconds / 1e6) for name, microseconds in spent.most_common(12)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        draw = [*COMMAND, "generate", "a red apple", "-o", f"{folder}/a.png", "--device", "cpu"]
        ways = {
            "import rectified_diffusers": ([sys.executable, "-c", "import rectified_diffusers"], None),
            "--help": ([*COMMAND, "--help"], 0.3),
            "generate --help": ([*COMMAND, "generate", "--help"], 0.3),
            "generate, first picture written": (draw, 8.0),
            "generate --fast, first picture written": ([*draw, "--fast"], 8.0),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        once = []
        for _ in range(args.rounds):
            for name, (words, _) in ways.items():
                times[name].append(seconds(lambda words=words: run(words, args.threads), "cpu"))
            once.append(float(run([sys.executable, "-c", DRAW], args.threads)))
        spent = imports(draw, args.threads) if args.imports else []
    rows: list[dict[str, Any]] = [
        {"what": name, "seconds": median(times[name]), "target": target} for name, (_, target) in ways.items()
    ]
    rows.append({"what": "one picture once loaded", "seconds": median(once), "target": 0.1})
    return {"rows": rows, "imports": spent}


def compile_cache() -> Path:
    return Path(
        os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / f"torchinductor_{getuser()}"
    )


def measure_model(args: argparse.Namespace, results: dict[str, Any], save: Callable[[], None]) -> None:
    """Load and generate in new processes; call `save` after each."""
    results |= {"stages": [], "compile cache": "filled" if compile_cache().exists() else "empty"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, args.model)
        make = [sys.executable, __file__, "--device", args.device, "--model", args.model, "--make", str(path)]
        run([*make, *(["--small"] if args.small else [])], args.threads)
        for way in args.ways:
            for _ in range(args.rounds):
                words = [sys.executable, "-c", STAGES, str(path), args.device, way]
                spent = json.loads(run(words, args.threads).splitlines()[-1])
                results["stages"].append({"way": way, **spent})
                save()


def make_folder(args: argparse.Namespace) -> None:
    """Save a pipeline of random weights, in float16 for a GPU."""
    import torch

    from models import make_pipeline

    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    make_pipeline(args.model, dtype, args.device, small=args.small).save_pretrained(args.make)


def model_as_markdown(args: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    columns = ["imports", "loading", "first picture", "second picture", "third picture"]
    lines = [
        f"# Cold start: {args.model}, {args.device}",
        "",
        f"| process | {' | '.join(columns)} | until the first |",
    ]
    lines.append("|---|" + "---|" * (len(columns) + 1))
    for row in results["stages"]:
        whole = sum(row[name] for name in columns[:3])
        lines.append(f"| {row['way']} | {' | '.join(f'{row[name]:.2f}' for name in columns)} | {whole:.2f} |")
    return [
        *lines,
        "",
        f"- seconds; the cache of compiled code was {results['compile cache']} before the first process",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--imports", action="store_true", help="also report import times by package")
    parser.add_argument("--model", choices=("sd15", "stacked", "sdxl"), help="a shape with random weights")
    parser.add_argument("--device", default="cpu", help="device of --model")
    ways = ("eager", "optimized", "compiled")
    parser.add_argument("--ways", choices=ways, nargs="+", default=ways, help="variants of --model")
    parser.add_argument("--small", action="store_true", help="a narrow model, to test --model")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cold_start"), help="without suffix")
    args = parser.parse_args()
    if args.make:
        return make_folder(args)
    if args.model:
        results: dict[str, Any] = {"provenance": provenance(args.device) | {"threads": str(args.threads)}}
        save = lambda: write_results(args.output, results, model_as_markdown(args, results), quiet=True)  # noqa: E731
        measure_model(args, results, save)
        print(args.output.with_suffix(".md").read_text(encoding="utf-8"))
        return None
    results = {"provenance": provenance() | {"threads": str(args.threads)}, **measure(args)}
    lines = ["# Cold start", "", "| | seconds | target |", "|---|---|---|"]
    lines += [f"| {row['what']} | {row['seconds']:.3f} | {row['target'] or ''} |" for row in results["rows"]]
    if results["imports"]:
        lines += ["", "| package | seconds of its own modules |", "|---|---|"]
        lines += [f"| {name} | {spent:.2f} |" for name, spent in results["imports"]]
    return write_results(args.output, results, lines)


if __name__ == "__main__":
    main()
