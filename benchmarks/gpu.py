"""Run everything that needs a GPU within a time budget: tests, latency, training, triplets, cold start.

    python benchmarks/gpu.py --budget 600 --output results
    python benchmarks/gpu.py --budget 600 --output results        # again: runs what is missing
    python benchmarks/gpu.py --device cpu --small --budget 600    # a test run with narrow models

The parts run in order of importance, each in a separate process that writes its results as they arrive. A part that
exceeds its time is stopped, and its measurements so far are kept. The error of a failed part is recorded. A part that
cannot finish in the remaining time is skipped. The output folder contains results.json, report.md and log.txt. If the
machine stops commands after ten minutes, set a budget that is half a minute shorter.

No weights and no network are needed: the copy of this repository on the machine may omit `examples/emoji` and
`src/rectified_diffusers/assets`. Install missing packages from wheels, usually just one:

    pip download --no-deps --dest wheels diffusers                           # where there is a network
    pip install --no-index --no-deps --find-links wheels diffusers           # on the machine with the GPU

The package itself need not be installed. For a copy without its .git, set BENCHMARK_COMMIT=$(git rev-parse HEAD).
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from machine import commit, now

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "scipy", "pytest", "hypothesis")
RESERVE = 5.0  # seconds of the budget for ending the last part and writing


@dataclass(frozen=True)
class Part:
    """One script with its arguments.

    Args:
        name: in the results; with the same output folder a finished part is not run again.
        words: the script and its arguments, after `python`; `--output` is added.
        least: seconds in which it gives its first results. With less left it is skipped.
        share: of the whole budget that it may take.
    """

    name: str
    words: tuple[str, ...]
    least: float
    share: float = 1.0


def parts_of(args: argparse.Namespace) -> list[Part]:
    """List the parts, most important first."""
    on = ("--device", args.device, *(["--small"] if args.small else []))
    size = ("--rounds", "1", "--warm-up", "0") if args.small else ("--rounds", "5")
    half = ("eager-half",) if args.device.startswith("cuda") else ()
    batch = "2" if args.small else "8"

    def latency(model: str, batches: str, least: float) -> list[Part]:
        """Eager variants first: they compile nothing, so their results arrive early."""
        words = ("benchmarks/latency.py", *on, *size, "--model", model, "--batches", batches)
        words += ("--apart",) if model == "sdxl" and batches != "1" else ()  # one process in memory at a time
        slow = () if model == "stacked" or "--apart" in words else ("sd",)
        few = () if (model, batches) == ("sd15", "1") and not args.small else ("--sd-steps", "2")
        name = f"{model}, batch {batches}"
        return [
            Part(f"latency of {name}", (*words, "--ways", "eager", *half, *slow, *few), least),
            Part(f"latency of {name}, optimized", (*words, "--ways", "fast", "tiny"), 2 * least),
        ]

    training = ("--batch-size", "2", "--steps", "2") if args.small else ("--batch-size", "16", "--steps", "15")
    teacher = (
        ("--triplets", "4", "--batch", "2", "--steps", "2") if args.small else ("--triplets", "32", "--batch", "16")
    )
    dtype = "float16" if args.device.startswith("cuda") else "float32"
    ways = ("eager", "optimized") if args.small else ("eager", "compiled")
    on_model = (*on, "--model", "sd15")
    checkpointing = ("--mixed-precision", "bf16", "--gradient-checkpointing", "off", "on", "--no-save")
    repeats = ("--repeats", "1" if args.small else "2")
    return [
        Part("tests", ("benchmarks/gpu_tests.py", "--device", args.device), 30, share=0.2),
        *latency("sd15", "1", 30),
        Part("training", ("benchmarks/training.py", *on_model, *checkpointing, *training), 40),
        Part(
            "triplets", ("benchmarks/triplets.py", *on, "--teacher", "sd15", "--dtype", dtype, *teacher, *repeats), 40
        ),
        Part("cold start", ("benchmarks/cold_start.py", *on_model, "--rounds", "1", "--ways", *ways), 40),
        *latency("sd15", batch, 40),
        *latency("sdxl", "1", 45),
        *latency("stacked", "1", 40),
        *latency("sdxl", batch, 60),
        *latency("stacked", batch, 60),
    ]


class Results:
    """The output folder: the measurements so far, complete after each part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "results.json"
        self.state: dict[str, Any] = {"runs": [], "running": None, "parts": {}}
        if file.exists():
            self.state = json.loads(file.read_text(encoding="utf-8"))
        if self.state["running"]:  # this command was killed in the middle of a part
            self.keep(self.state["running"], {"status": "stopped"})

    @property
    def part(self) -> Path:
        """Where a running part writes, without suffix."""
        return self.folder / "part"

    def is_done(self, name: str) -> bool:
        return self.state["parts"].get(name, {}).get("status") == "done"

    def begin(self, name: str) -> None:
        self.state["running"] = name
        self.write()

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Store the output and status of a part; keep the results of an earlier try if there are none."""
        row = {**row, "date": now()}
        for key, suffix in (("results", ".json"), ("report", ".md")):
            file = self.part.with_suffix(suffix)
            if file.exists():
                text = file.read_text(encoding="utf-8")
                row[key] = json.loads(text) if suffix == ".json" else text
                file.unlink()
            file.with_suffix(f"{suffix}.partial").unlink(missing_ok=True)
        earlier = self.state["parts"].get(name, {})
        if "results" not in row:
            row = {**{key: earlier[key] for key in ("results", "report") if key in earlier}, **row}
        self.state["parts"][name] = row
        self.state["running"] = None
        self.write()

    def write(self) -> None:
        for name, text in (("results.json", json.dumps(self.state, indent=1) + "\n"), ("report.md", self.report())):
            partial = self.folder / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.folder / name)

    def report(self) -> str:
        lines = ["# On a GPU", ""]
        for run in self.state["runs"]:
            lines += ["- " + "; ".join(f"{key}: {value}" for key, value in run.items())]
        lines += ["", "| part | status | seconds |", "|---|---|---|"]
        rows = self.state["parts"].items()
        lines += [f"| {name} | {row['status']} | {row.get('seconds', '')} |" for name, row in rows]
        for name, row in rows:
            lines += ["", f"## {name}", ""]
            lines += ["```", row["error"], "```", ""] if "error" in row else []
            lines += [line.replace("# ", "### ", 1) if line.startswith("# ") else line for line in _lines(row)]
        return "\n".join(lines) + "\n"


def _lines(row: dict[str, Any]) -> list[str]:
    return row.get("report", "").splitlines()


def environment(device: str) -> dict[str, Any]:
    """Describe the machine without importing torch, which takes seconds."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        gpu = ""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} unknown")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": now(),
        "commit": commit(),
        "device": device,
        "GPU, driver, memory": gpu or "none",
        "CPUs": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": ", ".join(versions),
    }


@contextmanager
def process_of(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a script in a process group of its own, which is ended completely afterwards."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    known = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=known,
            preexec_fn=os.setpgrp,
        )
        try:
            yield process
        finally:
            for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0)):
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    break
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    continue
            process.wait()


def run_part(part: Part, results: Results, limit: float) -> None:
    """Run a part for at most `limit` seconds and keep its results."""
    log = results.folder / "log.txt"
    words = [*part.words, "--output", str(results.part.absolute())]
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {part.name}, {limit:.0f} s at most: {shlex.join(['python', *words])}\n")
    start, begin = log.stat().st_size, time.monotonic()
    row: dict[str, Any] = {"status": "stopped", "command": shlex.join(["python", *words]), "limit": round(limit, 1)}
    results.begin(part.name)
    try:
        with process_of(words, log) as process:
            code = process.wait(limit)
        row["status"] = "done" if code == 0 else "failed"
        if code:
            text = log.read_bytes()[start:].decode(errors="replace")
            row["error"] = f"exit status {code}\n{text[-2000:]}"
    except subprocess.TimeoutExpired:
        row["status"] = "over time"
    finally:
        row["seconds"] = round(time.monotonic() - begin, 1)
        results.keep(part.name, row)


def run(parts: Sequence[Part], results: Results, budget: float) -> None:
    """Run the parts that are not done, in order, as long as the budget lasts."""
    deadline = time.monotonic() + budget - RESERVE
    for part in parts:
        if results.is_done(part.name):
            print(f"{part.name}: done before", flush=True)
            continue
        limit = min(deadline - time.monotonic(), part.share * budget)
        if limit < part.least:
            results.keep(part.name, {"status": f"skipped: {max(limit, 0):.0f} s left, {part.least:.0f} needed"})
        else:
            run_part(part, results, limit)
        row = results.state["parts"][part.name]
        print(f"{part.name}: {row['status']}, {row.get('seconds', 0)} s", flush=True)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=600, help="seconds for the entire run")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"), help="folder of the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="narrow models, for a test on a CPU")
    parser.add_argument("--only", nargs="+", default=[], help="prefixes of the parts to run")
    return parser.parse_args(words)


def main() -> None:
    args = parse_arguments()
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        sys.exit(f"Not installed: {', '.join(missing)}. Install them first; the head of this script says how.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    results = Results(args.output)
    results.state["runs"].append(environment(args.device))
    parts = parts_of(args)
    if args.only:
        parts = [part for part in parts if part.name.startswith(tuple(args.only))]
    run(parts, results, args.budget)
    print(results.report())


if __name__ == "__main__":
    main()
