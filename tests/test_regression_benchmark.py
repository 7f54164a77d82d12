"""`benchmarks/regression.py`: what it prints of two runs, and all of its parts at a tiny size."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import Pooled
from tests.test_gpu_benchmark import load

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "regression.json"


@pytest.fixture
def regression(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load(monkeypatch, "regression")


@pytest.mark.parametrize(
    ("before", "now", "tolerance", "change", "mark"),
    [
        (2.0, 2.1, 0.1, "+5.0 %", ""),
        (2.0, 2.5, 0.1, "+25.0 %", "!"),
        (2.0, 1.5, 0.1, "-25.0 %", "!"),
        (-2.0, -2.5, 0.1, "-25.0 %", "!"),
        (2.0, 9.0, None, "+350.0 %", ""),  # a time, which depends on the machine
        (0.0, 0.0, 0.0, "+0", ""),
        (0.0, 1.0, 0.0, "+1", "!"),
        (None, 1.0, 0.1, "", ""),
        (1.0, None, 0.1, "", ""),
    ],
)
def test_a_row_shows_its_change_and_whether_it_is_more_than_its_tolerance(
    regression: Any, before: float | None, now: float | None, tolerance: float | None, change: str, mark: str
) -> None:
    old, new = (regression.Row("time", value, "s", tolerance) for value in (before, now))
    cells = [cell.strip() for cell in regression.compare([old], [new])[2].strip("|").split("|")]
    assert cells == ["time", f"{regression.show(before)} s", f"{regression.show(now)} s", change, mark]


def test_new_rows_rows_that_are_gone_and_reasons(regression: Any) -> None:
    old = [regression.Row("gone", 1.0, "", 0.1)]
    new = [regression.Row("new", None, "", 0.1, "No weights (a long reason). More of it.")]
    assert regression.compare(old, new)[2:] == [
        "| new | not measured | not measured |  | new |",
        "| gone | 1 | gone | | |",
        "",
        "- new: No weights",
    ]


@pytest.mark.slow
def test_a_run_is_compared_with_the_run_before(
    regression: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(regression, "MobileNetV2Features", lambda weights: Pooled())
    monkeypatch.setattr(regression, "TEACHER_STEPS", 2)
    words = ["--images", "3", "--straightness-prompts", "1", "--rounds", "1", "--small"]
    monkeypatch.setattr(sys, "argv", ["regression.py", *words, "--committed", str(tmp_path / "run"), "--update"])
    regression.main()
    stored = json.loads((tmp_path / "run.json").read_text())
    assert all(row["value"] is not None for row in stored["rows"])
    assert {row["what"] for row in stored["rows"]} >= {"--help / import torch", "optimized / plain"}
    capsys.readouterr()
    monkeypatch.setattr(regression, "startup", lambda args: iter(()))  # the processes of the first run are enough
    monkeypatch.setattr(regression, "memory", lambda args: iter(()))
    monkeypatch.setattr(sys, "argv", sys.argv[:-1])
    regression.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    repeated = [line for line in table if "feature distance" in line or "spread" in line or "S(Z)" in line]
    assert [line.split("|")[-3].strip() for line in repeated] == ["+0.0 %"] * 3


def test_the_committed_results_have_every_row(regression: Any) -> None:
    stored = json.loads(RESULTS.read_text())
    rows = [regression.Row(**row) for row in stored["rows"]]
    assert all(row.value is not None for row in rows)
    assert [line for line in regression.compare(rows, rows) if line.endswith("! |")] == []
    assert {"hardware", "load at the start", "commit"} <= stored["provenance"].keys()
