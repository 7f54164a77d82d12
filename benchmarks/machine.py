"""Helpers of the speed benchmarks: provenance of a run, speed of the machine, medians of times."""

import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # and in the functions: who only names commit and date does not wait for torch
    import torch


def provenance(device: str = "cpu") -> dict[str, str]:
    """Return command, commit, hardware, date and versions."""
    import torch

    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    cpu = re.search(r"model name\s*: (.*)", info)
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in info]
    processor = f"{cpu[1] if cpu else platform.processor()} {' '.join(flags)}, {os.cpu_count()} CPUs"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "hardware": torch.cuda.get_device_name() if device.startswith("cuda") else processor,
        "threads": str(torch.get_num_threads()),
        "load at the start": f"{os.getloadavg()[0]:.1f}",
        "date": now(),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")),
    }


def commit() -> str:
    """Return the commit of the code; set BENCHMARK_COMMIT for a copy of the code without its repository."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    named = git("rev-parse", "--verify", "--quiet", "HEAD") or os.environ.get("BENCHMARK_COMMIT", "none")
    return named + (" with changes" if git("status", "--porcelain") else "")


def now() -> str:
    """Return date and time to the minute, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="minutes")


def write_results(output: Path, results: dict[str, Any], lines: Sequence[str], quiet: bool = False) -> None:
    """Print a report and write it to OUTPUT.md, with its provenance at the end, and the results to OUTPUT.json.

    At any time the files are complete: the previous ones or the new ones.
    """
    text = "\n".join([*lines, "", *(f"- {key}: {value}" for key, value in results["provenance"].items()), ""])
    output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(results, indent=2) + "\n"), (".md", text)):
        partial = output.with_suffix(f"{suffix}.partial")
        partial.write_text(content, encoding="utf-8")
        partial.replace(output.with_suffix(suffix))
    if not quiet:
        print(text, flush=True)


def write_page(path: Path, lines: Sequence[str], facts: dict[str, str]) -> None:
    """Print a report and write it to a file, with the command and the other facts of `provenance` at the end."""
    others = "; ".join(f"{name} {value}" for name, value in facts.items() if name != "command")
    text = "\n".join([*lines, "", f"    {facts['command']}", "", f"{others}."])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str) -> float:
    """Return the wall time of one call, including the work that it queued on a GPU."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def rates(dtype: "torch.dtype", device: str, small: bool = False) -> tuple[float, float]:
    """Measure the peak rates of this machine: FLOP/s of a matrix product, bytes/s of a copy (reads and writes).

    Args:
        small: too small for an exact rate, to test a script.
    """
    import torch

    size, length = (8192, 2**30) if device.startswith("cuda") else (2048, 2**27)
    size, length = (256, 2**20) if small else (size, length)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(call: Callable[[], object]) -> float:
        call()
        return min(seconds(call, device) for _ in range(7))

    return 2 * size**3 / best(lambda: torch.mm(a, b, out=out)), 2 * length / best(lambda: target.copy_(source))


def peak_memory(device: str) -> float:
    """Return the peak memory of this process so far, in GB."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
