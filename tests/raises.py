"""Is every `raise` of the source reached by a test, and how many of its branches are?

    make coverage

runs the tests with coverage.py as `.coveragerc` says, writes its report, and then

    python -m tests.raises coverage.json

Exit code 1 if a `raise` was not reached, or less than 95 % of the branches were taken. What needs another machine, a
GPU or a launcher, says so in the source: `# pragma: no cover` and the reason.
"""

import argparse
import ast
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent.parent / "src" / "rectified_diffusers"
MIN_BRANCHES = 95.0  # per cent


@dataclass(frozen=True)
class Raise:
    """A `raise` statement: where it is, and what it says up to the first bracket."""

    path: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: raise {self.what}".rstrip()


def raises_in(source: str, path: str) -> Iterator[Raise]:
    """Yield the `raise` statements of a source text, in the order of their lines."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    for node in sorted(found, key=lambda node: node.lineno):
        what = "" if node.exc is None else ast.unparse(node.exc).partition("(")[0]
        yield Raise(path, node.lineno, what)


def raises_below(folder: Path) -> Iterator[Raise]:
    """Yield the `raise` statements of all files below a folder, with paths relative to it."""
    for file in sorted(folder.rglob("*.py")):
        yield from raises_in(file.read_text(encoding="utf-8"), file.relative_to(folder).as_posix())


def unreached(found: Iterator[Raise], report: Mapping[str, Any]) -> list[Raise]:
    """Pick the raises that a JSON report of coverage.py does not count as executed, nor as excluded by a pragma.

    A file that the report does not have was never imported: none of its raises is reached.
    """
    lines = {}
    for name, file in report["files"].items():
        path = Path(name).as_posix().rpartition("rectified_diffusers/")[2]
        lines[path] = {*file["executed_lines"], *file["excluded_lines"]}
    return [each for each in found if each.line not in lines.get(each.path, ())]


def percent_of_branches(report: Mapping[str, Any]) -> float:
    """Return the share of branches that were taken, in per cent; a report without branches is refused."""
    totals = report["totals"]
    if not totals.get("num_branches"):
        raise ValueError("the report counts no branches; run coverage with branch = true, as in .coveragerc.")
    return 100 * totals["covered_branches"] / totals["num_branches"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("report", type=Path, help="JSON report of coverage.py, with branches")
    report = json.loads(parser.parse_args(argv).report.read_text(encoding="utf-8"))
    missed, branches = unreached(raises_below(SOURCE), report), percent_of_branches(report)
    print(*missed, sep="\n", end="\n" if missed else "")
    total = sum(1 for _ in raises_below(SOURCE))
    print(
        f"{total - len(missed)} of {total} raises reached; {branches:.1f} % of branches, at least {MIN_BRANCHES:g} %"
    )
    return 1 if missed or branches < MIN_BRANCHES else 0


if __name__ == "__main__":
    sys.exit(main())
