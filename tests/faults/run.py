"""Run the campaign and print its table.

    python -m tests.faults.run --tries 100 --output benchmarks/results/faults.md

Exit code 1 if anything was lost, was there twice or came out otherwise than undisturbed. Faults of whole disks mount
small ones and need root; without it they are listed as not tried.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from tests.faults.campaign import FAULTS, NEEDS_MOUNT, Reference, Try, Verdict
from tests.faults.workloads import make_workloads

WORKLOADS = ("triplets", "reflow", "distill", "progressive")


@dataclass
class Row:
    """The verdicts of one fault on one workload."""

    fault: str
    workload: str
    verdicts: list[Verdict] = field(default_factory=list)

    def __str__(self) -> str:
        survived, lost, duplicated = (
            sum(getattr(verdict, name) for verdict in self.verdicts) for name in ("survived", "lost", "duplicated")
        )
        counts = (len(self.verdicts), survived, lost, duplicated) if self.verdicts else ("not tried", "", "", "")
        return f"| {self.fault} | {self.workload} | {' | '.join(map(str, counts))} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tries", type=int, default=100, help="of each fault on each workload (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--output", type=Path, help="file for the table, Markdown")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as work:
        rows = list(run_campaign(arguments, Path(work)))
    complaints = [f"{row.fault}, {row.workload}: {v.complaint}" for row in rows for v in row.verdicts if v.complaint]
    header = "| fault | command | tries | survived | lost | duplicated |\n|---|---|---|---|---|---|\n"
    command = f"python -m tests.faults.run --tries {arguments.tries} --seed {arguments.seed}"
    table = f"`{command}`\n\n{header}" + "".join(f"{row}\n" for row in rows)
    print(table + "".join(f"\n{complaint}" for complaint in complaints))
    if arguments.output:
        arguments.output.write_text(table)
    return 0 if all(verdict.survived for row in rows for verdict in row.verdicts) else 1


def run_campaign(arguments: argparse.Namespace, work: Path) -> Iterator[Row]:
    """Do every fault to every workload, and yield their rows."""
    workloads = make_workloads(work)
    chosen = [workloads[name] for name in arguments.workloads]
    references = {workload.name: Reference.of(workload, work / f"{workload.name}-reference") for workload in chosen}
    with tqdm(total=len(arguments.faults) * len(chosen) * arguments.tries, unit="try", file=sys.stderr) as bar:
        for fault in arguments.faults:
            for workload in chosen:
                row = Row(fault, workload.name)
                tries = 0 if fault in NEEDS_MOUNT and os.geteuid() else arguments.tries
                for number in range(tries):
                    chance = random.Random(f"{arguments.seed}/{fault}/{workload.name}/{number}")
                    folder = work / f"{workload.name}-try"
                    row.verdicts.append(FAULTS[fault](Try(workload, folder, references[workload.name], chance)))
                    shutil.rmtree(folder, ignore_errors=True)
                    bar.update()
                yield row


if __name__ == "__main__":
    sys.exit(main())
