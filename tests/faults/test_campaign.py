"""A short, seeded part of the campaign and of the fuzzing; the whole is `make faults`."""

import argparse
import os
from pathlib import Path

import pytest

from tests.faults import fuzz
from tests.faults.campaign import FAULTS
from tests.faults.run import WORKLOADS, run_campaign

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks its processes")


@pytest.mark.parametrize("workloads", [["triplets"], ["reflow"]], ids=str)
def test_nothing_is_lost(workloads: list[str], tmp_path: Path) -> None:
    arguments = argparse.Namespace(faults=list(FAULTS), workloads=workloads, tries=1, seed=7)
    rows = list(run_campaign(arguments, tmp_path))
    assert [(row.fault, verdict) for row in rows for verdict in row.verdicts if not verdict.survived] == []
    assert {row.fault for row in rows} == set(FAULTS)


@pytest.mark.slow
def test_nothing_is_lost_in_the_other_commands(tmp_path: Path) -> None:
    others = [name for name in WORKLOADS if name not in ("triplets", "reflow")]
    arguments = argparse.Namespace(faults=list(FAULTS), workloads=others, tries=2, seed=7)
    rows = list(run_campaign(arguments, tmp_path))
    assert [(row.fault, verdict) for row in rows for verdict in row.verdicts if not verdict.survived] == []


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Target]:
    return fuzz.make_targets(tmp_path_factory.mktemp("fuzz"))


TARGETS = (
    *("shard", "triplets", "manifest", "delta", "described-delta"),
    *("prompts-txt", "prompts-jsonl", "checkpoint", "arguments"),
)


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_are_taken_or_refused(name: str, targets: dict[str, fuzz.Target]) -> None:
    assert sum(fuzz.fuzz(targets[name], 60)) >= 60


def test_every_target_is_fuzzed_here(targets: dict[str, fuzz.Target]) -> None:
    assert set(targets) == set(TARGETS)
