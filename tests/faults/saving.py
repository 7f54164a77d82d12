"""Kill trainings at random moments of writing a checkpoint in the background, and run them again.

    python -m tests.faults.saving --kills 50 --processes 2 --output benchmarks/results/saving.md

Writing is slowed down, so that steps go on meanwhile. Each run has to end in the files of one that was not killed.
What the kills showed is kept at once in a JSON file beside the table, and no kill is done twice.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import provenance
from tqdm import tqdm

from rectified_diffusers.training import checkpoint_writing
from tests.faults import kept
from tests.faults.campaign import Reference, Try, Verdict
from tests.faults.kept import Found
from tests.faults.workloads import make_workloads

SLOWNESS = 0.1  # seconds for each file


def write_slowly() -> None:
    """Make each file of a checkpoint take longer than a step, in the middle of its bytes."""
    write = checkpoint_writing.write_file

    def slow(path: Path, snapshot: Any) -> Any:
        result = write(path, snapshot)
        with path.open("r+b") as file:
            content = file.read()
            file.truncate(len(content) // 2)
            time.sleep(SLOWNESS)
            file.seek(0)
            file.write(content)
        return result

    checkpoint_writing.write_file = slow


def kill_in_a_save(case: Try) -> tuple[Verdict, bool]:
    """Kill at a random moment of one of the saves; return also whether it left a checkpoint half written."""
    command, saves, seen = case.start(write_slowly), case.chance.randint(1, 3), set[str]()
    while command.wait(0.001) is None and len(seen) < saves:
        seen |= {path.name for path in (case.folder / "checkpoints").glob(".tmp-*")}
    if command.wait(case.chance.uniform(0, 4 * SLOWNESS)) is None:
        command.kill()
    in_a_save = any((case.folder / "checkpoints").glob(".tmp-*"))
    return case.run_and_judge(), in_a_save


@dataclass
class Row(Found):
    """Kills of trainings of a number of processes: how many left a checkpoint half written, and what went wrong."""

    processes: int
    kills: int = 0
    halves: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"| {self.processes} | {self.kills} | {self.halves} | {self.kills - len(self.failures)} |"


def run(row: Row, kills: int, work: Path, save: Callable[[], object] = lambda: None) -> None:
    """Do what is missing of a number of kills."""
    commit = provenance()["commit"]  # of what is loaded here, from which every try is forked
    torch.set_num_threads(1)  # threads do not survive a fork
    workload = replace(make_workloads(work)["reflow"], processes=row.processes)
    reference = Reference.of(workload, work / "reference")
    for number in tqdm(range(row.kills, kills), unit="kill", file=sys.stderr):
        folder = work / "try"
        verdict, in_a_save = kill_in_a_save(Try(workload, folder, reference, random.Random(number)))
        row.kills, row.halves = number + 1, row.halves + in_a_save
        row.failures += [] if verdict.survived else [{"number": number, **asdict(verdict)}]
        row.note(commit)
        save()
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1, help="of each training, connected by gloo")
    parser.add_argument(
        "--output", type=Path, help="file for the table, Markdown; the .json beside it keeps the kills"
    )
    args = parser.parse_args()
    rows = {row["processes"]: Row(**row) for row in kept.read(args.output) or ()}
    row = rows.setdefault(args.processes, Row(args.processes))
    with tempfile.TemporaryDirectory() as work:
        run(row, args.kills, Path(work), partial(kept.save, args.output, list(rows.values())))
    text = (
        "A training of 6 steps saves every 2, and each file takes longer than a step. All its processes are killed at "
        "a random moment of a save, and the same command is run again. It survives if its files then equal, bit for "
        "bit, those of a run that was not killed: the kept checkpoints, the log and the finished pipeline."
    )
    lines = ["| processes | kills | left a checkpoint half written | survived |", *map(str, rows.values())]
    command = f"python -m tests.faults.saving --kills {args.kills} --processes {args.processes}"
    table = kept.render("Kills in a save", text, lines, command, rows.values())
    print(table, *row.failures, sep="\n")
    if args.output:
        args.output.write_text(table, encoding="utf-8")
    return 1 if row.failures else 0


if __name__ == "__main__":
    sys.exit(main())
