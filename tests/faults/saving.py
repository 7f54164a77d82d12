"""Kill trainings at random moments of writing a checkpoint in the background, and run them again.

    python -m tests.faults.saving --kills 50

Writing is slowed down, so that steps go on meanwhile. Each run has to end in the files of one that was not killed.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rectified_diffusers.training import writer
from tests.faults.campaign import Reference, Try, Verdict
from tests.faults.workloads import make_workloads

SLOWNESS = 0.1  # seconds for each file


def write_slowly() -> None:
    """Make each file of a checkpoint take longer than a step, in the middle of its bytes."""
    write = writer.write_file

    def slow(path: Path, snapshot: Any) -> Any:
        result = write(path, snapshot)
        with path.open("r+b") as file:
            content = file.read()
            file.truncate(len(content) // 2)
            time.sleep(SLOWNESS)
            file.seek(0)
            file.write(content)
        return result

    writer.write_file = slow


def kill_in_a_save(case: Try) -> tuple[Verdict, bool]:
    """Kill at a random moment of one of the saves; return also whether it left a checkpoint half written."""
    command, saves, seen = case.start(write_slowly), case.chance.randint(1, 3), set[str]()
    while command.wait(0.001) is None and len(seen) < saves:
        seen |= {path.name for path in (case.folder / "checkpoints").glob(".tmp-*")}
    if command.wait(case.chance.uniform(0, 4 * SLOWNESS)) is None:
        command.kill()
    in_a_save = any((case.folder / "checkpoints").glob(".tmp-*"))
    return case.run_and_judge(), in_a_save


def run(kills: int, work: Path) -> tuple[int, list[Verdict]]:
    """Return how many kills left a checkpoint half written, and the verdicts that are not good."""
    torch.set_num_threads(1)  # threads do not survive a fork
    workload = make_workloads(work)["reflow"]
    reference = Reference.of(workload, work / "reference")
    halves, failures = 0, []
    for number in tqdm(range(kills), unit="kill", file=sys.stderr):
        folder = work / "try"
        verdict, in_a_save = kill_in_a_save(Try(workload, folder, reference, random.Random(number)))
        halves += in_a_save
        failures += [] if verdict.survived else [verdict]
        shutil.rmtree(folder)
    return halves, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as work:
        halves, failures = run(kills, Path(work))
    print(f"{kills} kills, {halves} of them with a checkpoint half written: {len(failures)} failed", *failures)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
