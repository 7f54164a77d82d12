"""Run the mutants and print the table.

    python -m tests.mutation.run --output benchmarks/results/mutation.md
    python -m tests.mutation.run --files flow/ode.py

The tests are collected once, and each mutant is a fork of that process: it runs the tests that reach its lines, the
quickest first, up to the first that fails. What became of a mutant is kept in a JSON file, until its file changes; of
a survivor, until the tests do. Exit code 1 if a mutant survives that `explained.py` does not know.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import coverage
import pytest
from _pytest.runner import runtestprotocol
from benchmarks.machine import provenance
from tqdm import tqdm

from tests.mutation.explained import EXPLAINED
from tests.mutation.mutants import Functions, Mutant, mutants_of

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "rectified_diffusers"
TESTS = {
    "flow": ["tests/flow"],
    "pipelines/scheduler.py": ["tests/test_schedulers.py"],  # more use it, and say less of what it does
    "data": ["tests/data"],
}
FORK = multiprocessing.get_context("fork")
SURVIVED, KILLED, TIMED_OUT, NOT_REACHED = "survived", "killed", "timed out", "not reached"
SECONDS, WAIT = 20, 120  # of the processor beyond ten times what the tests take; by the clock


class Reached:
    """Which tests reach which lines, and how long they take: asked of one whole run of the tests."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.seconds: dict[str, float] = kept["seconds"]
        self.lines: dict[str, dict[str, list[str]]] = kept["lines"]

    def tests_of(self, mutant: Mutant) -> list[str]:
        lines = self.lines.get(mutant.path, {})
        found = {test for line in mutant.lines for test in lines.get(str(line), ())}
        return sorted(found, key=lambda test: self.seconds[test])


class Runner:
    """A plugin of pytest that takes the place of its loop over the tests."""

    def __init__(self, files: list[str], kept: dict[str, Any], save: Any) -> None:
        self.files, self.kept, self.save = files, kept, save

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        sources = {path: (SOURCE / path).read_text(encoding="utf-8") for path in self.files}
        texts = [file.read_text(encoding="utf-8") for file in sorted({item.path for item in session.items})]
        self._forget_what_changed({"tests": "".join(texts), **sources})
        if "reached" not in self.kept:
            self.kept["reached"] = _in_a_fork(lambda: _reach(items, self.files))
        reached, functions = Reached(self.kept["reached"]), Functions({path: SOURCE / path for path in self.files})
        mutants = [mutant for path, source in sources.items() for mutant in mutants_of(source, path)]
        for mutant in tqdm(mutants, unit="mutant", mininterval=10):
            if mutant.name not in self.kept["mutants"]:
                tests_of = [items[test] for test in reached.tests_of(mutant)]
                seconds = sum(reached.seconds[item.nodeid] for item in tests_of)
                self.kept["mutants"][mutant.name] = _outcome(mutant, functions, tests_of, seconds)
                self.save(self.kept)
        return True

    def _forget_what_changed(self, texts: dict[str, str]) -> None:
        """Drop the mutants of files that changed, and the survivors if tests did: a new one may fail at them."""
        before = self.kept.get("hashes", {})
        now = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        changed = {name for name in now if now[name] != before.get(name)}
        if changed:
            self.kept.pop("reached", None)
        mutants = self.kept.get("mutants", {}).items()
        self.kept["hashes"] = before | now
        self.kept["mutants"] = {
            name: outcome
            for name, outcome in mutants
            if name.partition(":")[0] not in changed and (outcome in (KILLED, TIMED_OUT) or "tests" not in changed)
        }


def _reach(items: dict[str, pytest.Item], files: list[str]) -> dict[str, Any]:
    """Run all tests, each in a context of its own, and return what they reached."""
    watch = coverage.Coverage(data_file=None, include=[str(SOURCE / path) for path in files], config_file=False)
    watch.start()
    seconds: dict[str, float] = {}
    for (name, item), following in zip_longest(items.items(), list(items.values())[1:]):
        watch.switch_context(name)
        began = time.process_time()
        if not _passes(item, following):
            raise RuntimeError(f"{name} fails without any mutant.")
        seconds[name] = time.process_time() - began
    watch.stop()
    data = watch.get_data()
    lines = {
        path: {
            str(line): [test for test in tests if test]
            for line, tests in data.contexts_by_lineno(str(SOURCE / path)).items()
        }
        for path in files
    }
    return {"seconds": seconds, "lines": lines}


def _outcome(mutant: Mutant, functions: Functions, items: list[pytest.Item], seconds: float) -> str:
    """Run tests in a fork that the mutant has taken over, and say what became of it."""
    if not items:
        return NOT_REACHED

    def work() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        limit = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime + 10 * seconds) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        functions.become(mutant)
        sys.exit(not all(_passes(item, following) for item, following in zip_longest(items, items[1:])))

    process = FORK.Process(target=work)
    process.start()
    process.join(WAIT)
    process.kill()
    process.join()
    code = process.exitcode or 0
    return TIMED_OUT if code < 0 else KILLED if code else SURVIVED


def _passes(item: pytest.Item, following: pytest.Item | None) -> bool:
    """Run one test; what another one that follows does not need is taken down."""
    return all(report.passed or report.skipped for report in runtestprotocol(item, log=False, nextitem=following))


def _in_a_fork(work: Any) -> Any:
    """Return what `work` returns in a fork."""
    read, write = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: write.send(work()))
    process.start()
    write.close()
    try:
        return read.recv()
    except EOFError:
        raise RuntimeError("the tests do not pass without any mutant") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--groups", nargs="*", choices=list(TESTS), default=list(TESTS))
    parser.add_argument("--files", nargs="*", help="below src/rectified_diffusers (default: all of the groups)")
    parser.add_argument("--keep", type=Path, default=Path("build/mutation.json"), help="what is known of each mutant")
    parser.add_argument("--output", type=Path, help="file for the table, Markdown")
    options = parser.parse_args(argv)
    kept = json.loads(options.keep.read_text(encoding="utf-8")) if options.keep.exists() else {}
    options.keep.parent.mkdir(parents=True, exist_ok=True)
    for group in options.groups:
        files = [path for path in _files_of(group) if not options.files or path in options.files]
        if not files:
            continue

        def save(found: dict[str, Any], group: str = group) -> None:
            kept[group] = found
            options.keep.write_text(json.dumps(kept), encoding="utf-8")

        words = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *TESTS[group]]
        if pytest.main(words, plugins=[Runner(files, kept.setdefault(group, {}), save)]) not in (0, 5):
            return 1
    table, unexplained = render(kept)
    print(table, *unexplained, sep="\n")
    if options.output:
        options.output.write_text(table, encoding="utf-8")
    return 1 if unexplained else 0


def _files_of(group: str) -> list[str]:
    path = SOURCE / group
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    return [file.relative_to(SOURCE).as_posix() for file in files if file.name != "__init__.py"]


def render(kept: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the table of the files, and the survivors without an explanation."""
    outcomes = {name: outcome for group in kept.values() for name, outcome in group["mutants"].items()}
    lines = ["# Mutants", "", "| file | mutants | killed | survived | explained |", "|---|---|---|---|---|"]
    for path in sorted({name.partition(":")[0] for name in outcomes}):
        lines.append(_row(path, {name: each for name, each in outcomes.items() if name.startswith(f"{path}:")}))
    lines += [_row("all", outcomes), "", "Survivors, by why no test can or need tell them from the source:", ""]
    survivors = list(_survivors(outcomes))
    reasons = {EXPLAINED[name]: [] for name in survivors if name in EXPLAINED}
    for name in survivors:
        if name in EXPLAINED:
            reasons[EXPLAINED[name]].append(name)
    for reason, names in reasons.items():
        lines += [f"- {reason}", *(f"    - `{name}`" for name in names)]
    made = provenance()
    lines += ["", "    python -m tests.mutation.run", ""]
    lines += [f"commit {made['commit']}; hardware {made['hardware']}; date {made['date']}; {made['versions']}."]
    return "\n".join(lines) + "\n", [name for name in survivors if name not in EXPLAINED]


def _row(path: str, outcomes: dict[str, str]) -> str:
    survivors = list(_survivors(outcomes))
    explained = sum(name in EXPLAINED for name in survivors)
    return f"| {path} | {len(outcomes)} | {len(outcomes) - len(survivors)} | {len(survivors)} | {explained} |"


def _survivors(outcomes: dict[str, str]) -> Iterator[str]:
    return (name for name, outcome in outcomes.items() if outcome in (SURVIVED, NOT_REACHED))


if __name__ == "__main__":
    sys.exit(main())
