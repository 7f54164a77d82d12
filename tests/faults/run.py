"""Run the campaign and print its table.

    python -m tests.faults.run --tries 20 --kills 100 --output benchmarks/results/faults.md

What the tries showed is kept at once in a JSON file beside the table, and no try is done twice: a campaign of hours
that was stopped goes on with the same command. `--again` does those of the faults and workloads that are named anew.

Exit code 1 if anything was lost, was there twice or came out otherwise than undisturbed. Faults of whole disks mount
small ones and need root; without it they are listed as not tried.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import provenance
from tqdm import tqdm

from tests.faults import kept
from tests.faults.campaign import FAULTS, NEEDS_MOUNT, NEEDS_PROCESSES, Reference, Try
from tests.faults.kept import Found
from tests.faults.workloads import PROGRAMS, make_workloads

KILL = "SIGKILL"
WORKLOADS = ("triplets", *PROGRAMS)


@dataclass
class Row(Found):
    """The tries of one fault on one workload, and those that went wrong one by one."""

    fault: str
    workload: str
    tries: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        lost, duplicated = (sum(failure[name] for failure in self.failures) for name in ("lost", "duplicated"))
        counts = (self.tries, self.tries - len(self.failures), lost, duplicated) if self.tries else ("not tried",) * 4
        return f"| {self.fault} | {self.workload} | {' | '.join(map(str, counts))} |"


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
    known = {(row["fault"], row["workload"]): Row(**row) for row in kept.read(arguments.output) or ()}
    rows = {cell: known.get(cell, Row(*cell)) for cell in ((fault, name) for fault in FAULTS for name in WORKLOADS)}
    cells = [(fault, workload) for fault in arguments.faults for workload in arguments.workloads]
    if arguments.again:
        rows |= {cell: Row(*cell) for cell in cells}
    with tempfile.TemporaryDirectory() as work:
        tries = {**dict.fromkeys(FAULTS, arguments.tries), KILL: arguments.kills}
        save = partial(kept.save, arguments.output, list(rows.values()))
        run_campaign([rows[cell] for cell in cells], tries, Path(work), save)
    text = (
        f"{sum(row.tries for row in rows.values())} tries. A try survives if the same command, run again, ends in "
        "files equal, bit for bit, to those of a run that nothing disturbed, or first in an error that names the file "
        "and the remedy, which then helps. Lost and duplicated are triplets, or logged steps of a training."
    )
    lines = ["| fault | command | tries | survived | lost | duplicated |", *map(str, rows.values())]
    command = f"python -m tests.faults.run --tries {arguments.tries} --kills {arguments.kills}"
    table = kept.render("Faults", text, lines, command, rows.values())
    failures = [(str(row), failure) for row in rows.values() for failure in row.failures]
    print(table, *(f"{row}: {failure}" for row, failure in failures), sep="\n")
    if arguments.output:
        arguments.output.write_text(table, encoding="utf-8")
    return 1 if failures else 0


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
                row.tries += 1
                row.failures += [] if verdict.survived else [{"number": number, **asdict(verdict)}]
                row.note(commit)
                save()
                bar.update()


if __name__ == "__main__":
    sys.exit(main())
