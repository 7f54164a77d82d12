"""Run the tests with a marker and write each outcome at once, so that none is lost if time runs out.

    python benchmarks/gpu_tests.py
    python benchmarks/gpu_tests.py --marker gpu --files tests/test_gpu.py

Only files that name the marker are collected: importing all the others takes minutes.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from machine import provenance, write_results

ROOT = Path(__file__).parents[1]


class Recorder:
    """A plugin of pytest that keeps the outcome of each test; `save` is called after each."""

    def __init__(self, save: Callable[[], None]) -> None:
        self.tests: list[dict[str, Any]] = []
        self.save = save

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            if not report.passed:
                row["text"] = report.longreprtext[-3000:]
            self.tests.append(row)
            self.save()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tests.append({"test": report.nodeid, "outcome": "error", "text": report.longreprtext[-3000:]})
            self.save()


def files_with(marker: str) -> list[str]:
    """Find the test files that use a marker."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if f"mark.{marker}" in file.read_text(encoding="utf-8")]


def as_markdown(marker: str, tests: list[dict[str, Any]]) -> list[str]:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in Counter(row["outcome"] for row in tests).items())
    lines = [
        f"# Tests marked {marker}",
        "",
        counts or "none so far",
        "",
        "| test | outcome | seconds |",
        "|---|---|---|",
    ]
    lines += [f"| {row['test']} | {row['outcome']} | {row.get('seconds', '')} |" for row in tests]
    for row in tests:
        if row["outcome"] in ("failed", "error"):
            lines += ["", f"{row['test']}:", "", "```", row["text"], "```"]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--marker", default="gpu")
    parser.add_argument("--device", default="cuda", help="device name for the report")
    parser.add_argument("--files", nargs="+", help="test files (default: those that name the marker)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu_tests"), help="without suffix")
    args = parser.parse_args()
    results: dict[str, Any] = {"provenance": provenance(args.device)}

    def save() -> None:
        results["tests"] = recorder.tests
        write_results(args.output, results, as_markdown(args.marker, recorder.tests), quiet=True)

    recorder = Recorder(save)
    words = ["-v", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-m", args.marker]
    code = int(pytest.main([*words, *(args.files or files_with(args.marker))], plugins=[recorder]))
    save()
    return code


if __name__ == "__main__":
    sys.exit(main())
