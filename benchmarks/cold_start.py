"""How long the first answer takes: importing, --help, and the first picture of the bundled model, in new processes.

    python benchmarks/cold_start.py

Medians of --rounds new processes each, with the files in the system's cache; the targets are those of the project.
With --imports, the packages that the first picture spends most of its imports on.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
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
COMMAND = [sys.executable, "-m", "rectified_diffusers.cli"]


def run(words: list[str], threads: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout


def imports(words: list[str], threads: int) -> list[tuple[str, float]]:
    """Seconds that each package's own modules took to import, most first; the bookkeeping is in them."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--imports", action="store_true", help="also say which packages the imports are of")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cold_start"), help="without suffix")
    args = parser.parse_args()
    results = {"provenance": provenance() | {"threads": str(args.threads)}, **measure(args)}
    lines = ["# Cold start", "", "| | seconds | target |", "|---|---|---|"]
    lines += [f"| {row['what']} | {row['seconds']:.3f} | {row['target'] or ''} |" for row in results["rows"]]
    if results["imports"]:
        lines += ["", "| package | seconds of its own modules |", "|---|---|"]
        lines += [f"| {name} | {spent:.2f} |" for name, spent in results["imports"]]
    write_results(args.output, results, lines)


if __name__ == "__main__":
    main()
