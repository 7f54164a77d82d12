"""Run the campaign and print its table.

    python -m tests.faults.run --tries 20 --kills 100 --output benchmarks/results/faults.md

What the tries showed is kept at once in a JSON file beside the table, and no try is done twice: a campaign of hours
that was stopped goes on with the same command. `--again` does those of the faults and workloads that are named anew.

Exit code 1 if anything was lost, was there twice or came out otherwise than undisturbed. Faults of whole disks mount
small ones and need root; without it they are listed as not tried.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import now, provenance
from tqdm import tqdm

from tests.faults.campaign import FAULTS, NEEDS_MOUNT, NEEDS_PROCESSES, Reference, Try
from tests.faults.workloads import make_workloads

KILL = "SIGKILL"
WORKLOADS = ("triplets", "reflow", "distill", "progressive")


@dataclass
class Row:
    """The tries of one fault on one workload, those that went wrong one by one, and when and of what they were."""

    fault: str
    workload: str
    tries: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    dates: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lost, duplicated = (sum(failure[name] for failure in self.failures) for name in ("lost", "duplicated"))
        counts = (self.tries, self.tries - len(self.failures), lost, duplicated) if self.tries else ("not tried",) * 4
        return f"| {self.fault} | {self.workload} | {' | '.join(map(str, counts))} |"


class Kept:
    """Rows of all faults and workloads in a JSON file, or in memory alone."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        kept = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else []
        rows = {(row["fault"], row["workload"]): Row(**row) for row in kept}
        cells = [(fault, workload) for fault in FAULTS for workload in WORKLOADS]
        self.rows = {cell: rows.get(cell, Row(*cell)) for cell in cells}

    def save(self) -> None:
        if self.file:
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps([asdict(row) for row in self.rows.values()], indent=1) + "\n")
            partial.replace(self.file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tries", type=int, default=20, help="of each fault on each workload (default: 20)")
    parser.add_argument("--kills", type=int, default=100, help="tries of SIGKILL on each workload (default: 100)")
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--again", action="store_true", help="do the tries of these faults and workloads anew")
    parser.add_argument(
        "--output", type=Path, help="file for the table, Markdown; the .json beside it keeps the tries"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # threads do not survive a fork
    kept = Kept(arguments.output.with_suffix(".json") if arguments.output else None)
    cells = [(fault, workload) for fault in arguments.faults for workload in arguments.workloads]
    if arguments.again:
        kept.rows |= {cell: Row(*cell) for cell in cells}
    with tempfile.TemporaryDirectory() as work:
        tries = {**dict.fromkeys(FAULTS, arguments.tries), KILL: arguments.kills}
        run_campaign([kept.rows[cell] for cell in cells], tries, Path(work), kept.save)
    command = f"python -m tests.faults.run --tries {arguments.tries} --kills {arguments.kills}"
    table = render(list(kept.rows.values()), command)
    failures = [(str(row), failure) for row in kept.rows.values() for failure in row.failures]
    print(table, *(f"{row}: {failure}" for row, failure in failures), sep="\n")
    if arguments.output:
        arguments.output.write_text(table, encoding="utf-8")
    return 1 if failures else 0


def render(rows: list[Row], command: str) -> str:
    """Return the table of the rows, with its date and environment."""
    machine = provenance()
    dates = sorted(date for row in rows for date in row.dates) or ["none"]
    lines = [
        "# Faults",
        "",
        f"{sum(row.tries for row in rows)} tries. A try survives if the same command, run again, ends in files equal, "
        "bit for bit, to those of a run that nothing disturbed, or first in an error that names the file and the "
        "remedy, which then helps. Lost and duplicated are triplets, or logged steps of a training.",
        "",
        "| fault | command | tries | survived | lost | duplicated |",
        "|---|---|---|---|---|---|",
        *map(str, rows),
        "",
        f"    {command}",
        "",
        f"commit {', '.join(sorted({commit for row in rows for commit in row.commits}))}; hardware "
        f"{machine['hardware']}; threads 1; date {dates[0]} to {dates[-1]}; versions {machine['versions']}.",
    ]
    return "\n".join(lines) + "\n"


def run_campaign(
    rows: list[Row], tries: Mapping[str, int], work: Path, save: Callable[[], object] = lambda: None
) -> None:
    """Do what is missing of the tries of every row, of which each fault has a number.

    They are compared with undisturbed runs, which are made first.
    """
    commit = provenance()["commit"]  # of what is loaded here, from which every try is forked
    workloads = make_workloads(work)
    references: dict[str, Reference] = {}
    with tqdm(total=sum(tries[row.fault] for row in rows), unit="try", file=sys.stderr, mininterval=10) as bar:
        for row in rows:
            wanted = tries[row.fault]
            bar.update(min(row.tries, wanted))
            missing = range(row.tries, 0 if row.fault in NEEDS_MOUNT and os.geteuid() else wanted)
            workload = replace(workloads[row.workload], processes=2 if row.fault in NEEDS_PROCESSES else 1)
            name = f"{workload.name}-{workload.processes}"
            if missing and name not in references:
                references[name] = Reference.of(workload, work / f"{name}-reference")
            for number in missing:
                folder = work / f"{name}-try"
                chance = random.Random(f"{row.fault}/{row.workload}/{number}")
                verdict = FAULTS[row.fault](Try(workload, folder, references[name], chance))
                shutil.rmtree(folder, ignore_errors=True)
                _add(row, commit, {} if verdict.survived else {"number": number, **asdict(verdict)})
                save()
                bar.update()


def _add(row: Row, commit: str, failure: dict[str, Any]) -> None:
    row.tries += 1
    row.failures += [failure] if failure else []
    row.commits = sorted({*row.commits, commit})
    row.dates = [*row.dates[:1], now()]


if __name__ == "__main__":
    sys.exit(main())
