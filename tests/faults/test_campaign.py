"""A short, seeded part of the campaign and of the fuzzing; the whole is `make faults`."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.faults import fuzz, run, saving
from tests.faults.campaign import FAULTS, NEEDS_MOUNT, Reference, Verdict
from tests.faults.run import WORKLOADS, Row, run_campaign
from tests.faults.workloads import Workload
from tests.marks import slow_but

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks its processes")


def failures(workloads: list[str], tries: int, folder: Path) -> list[object]:
    """Apply every fault to the workloads; return what went wrong."""
    rows = [Row(fault, workload) for fault in FAULTS for workload in workloads]
    run_campaign(rows, dict.fromkeys(FAULTS, tries), folder)
    not_tried = NEEDS_MOUNT if os.geteuid() else ()
    assert [row.fault for row in rows if row.tries != tries and row.fault not in not_tried] == []
    return [(str(row), failure) for row in rows for failure in row.failures]


@pytest.mark.very_slow
@pytest.mark.parametrize("workloads", [["triplets"], ["reflow"]], ids=str)
def test_nothing_is_lost(workloads: list[str], tmp_path: Path) -> None:
    assert failures(workloads, 1, tmp_path) == []


@pytest.mark.very_slow
def test_nothing_is_lost_in_the_other_commands(tmp_path: Path) -> None:
    assert failures([name for name in WORKLOADS if name not in ("triplets", "reflow")], 2, tmp_path) == []


@pytest.mark.very_slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_kill_in_a_save_changes_nothing(processes: int, tmp_path: Path) -> None:
    row, saved = saving.Row(processes), []
    saving.run(row, 4, tmp_path, lambda: saved.append(row.kills))
    assert row.failures == []
    assert row.halves > 0
    assert saved == [1, 2, 3, 4]


def test_a_try_is_kept_and_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload("reflow", (), lambda folder: Counter())
    monkeypatch.setattr(run, "make_workloads", lambda folder: {"reflow": workload})
    monkeypatch.setattr(Reference, "of", lambda *given: Reference({}, Counter(), 0.0, 0))
    chances, verdicts = [], [Verdict(0, 0), Verdict(0, 1), Verdict(0, 0), Verdict(0, 0)]
    monkeypatch.setitem(FAULTS, "SIGKILL", lambda case: chances.append(case.chance.random()) or verdicts.pop(0))
    table = tmp_path / "table.md"
    words = ["--faults", "SIGKILL", "--workloads", "reflow", "--output", str(table)]
    assert [run.main([*words, "--kills", str(tries)]) for tries in (1, 3, 3)] == [0, 1, 1]
    assert len(set(chances)) == 3
    assert "| SIGKILL | reflow | 3 | 2 | 0 | 1 |" in table.read_text()
    assert "| two writers | distill | not tried |" in table.read_text()
    assert run.main([*words, "--kills", "1", "--again"]) == 0
    assert chances[3:] == chances[:1]
    assert "| SIGKILL | reflow | 1 | 1 | 0 | 0 |" in table.read_text()


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Target]:
    return fuzz.make_targets(tmp_path_factory.mktemp("fuzz"))


TARGETS = (
    *("shard", "triplets", "manifest", "delta", "described-delta"),
    *("prompts-txt", "prompts-jsonl", "checkpoint", "arguments"),
)


@pytest.mark.parametrize("name", slow_but(["shard", "delta", "prompts-jsonl", "arguments"], TARGETS))
def test_inputs_are_taken_or_refused(name: str, targets: dict[str, fuzz.Target]) -> None:
    count = fuzz.Count()
    fuzz.fuzz(name, targets[name], count, 300)
    assert not count.crashes
    assert count.inputs == 300
    assert count.refused > 30


def test_crashes_are_counted_by_the_number_of_their_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(value: float) -> None:
        if value < 0.5:
            raise ValueError("small")
        if value > 0.9:
            raise KeyError("large")

    target = fuzz.Target(lambda chance: chance.random(), read)
    monkeypatch.setattr(fuzz, "make_targets", lambda folder: {"numbers": target})
    table = tmp_path / "table.md"
    assert [fuzz.main(["--examples", str(count), "--output", str(table)]) for count in (50, 100)] == [1, 1]
    kept = json.loads((tmp_path / "table.json").read_text())["numbers"]
    assert kept["taken"] + kept["refused"] + len(kept["crashes"]) == 100
    assert f"| numbers | 100 | {kept['taken']} | {kept['refused']} | {len(kept['crashes'])} |" in table.read_text()
    with pytest.raises(KeyError, match="large"):
        fuzz.main(["--repeat", "numbers", next(iter(kept["crashes"]))])


def test_every_target_is_fuzzed_here(targets: dict[str, fuzz.Target]) -> None:
    assert set(targets) == set(TARGETS)
