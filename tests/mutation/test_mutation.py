"""The mutants themselves: what is changed, what is left, and that a running process takes the change over."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.mutation import run
from tests.mutation.explained import EXPLAINED
from tests.mutation.mutants import Functions, mutants_of

SOURCE = '''\
"""A module."""
from functools import cached_property, lru_cache

LIMIT = 3

def small(x: int = 2) -> bool:
    """Is it small?"""
    if x < 0:
        raise ValueError(f"{x + 1} is negative: {x - 1}")
    return x <= LIMIT and not x == 1

class Box:
    @cached_property
    def size(self) -> int:
        total = 0
        total += 5
        return max(total, key=str, default="none") if total is None else total

    @classmethod
    @lru_cache
    def name(cls) -> str:
        print("made", end="")
        return "box"
'''


def names(source: str) -> list[str]:
    return [mutant.name.removeprefix("a.py: ") for mutant in mutants_of(source, "a.py")]


def test_what_is_changed():
    assert names(SOURCE) == [
        "small: if x < 0: -> if not x < 0:",
        "small: x < 0 -> x <= 0",
        "small: x < 0 -> x >= 0",
        "small: 0 -> 1",
        "small: raise ValueError(f'{x + 1} is negative: {x - 1}') -> pass",
        "small: return x <= LIMIT and (not x == 1) -> return None",
        "small: x <= LIMIT and (not x == 1) -> x <= LIMIT or not x == 1",
        "small: x <= LIMIT -> x < LIMIT",
        "small: x <= LIMIT -> x > LIMIT",
        "small: not x == 1 -> x == 1",
        "small: x == 1 -> x != 1",
        "small: 1 -> 2",
        "small: 1 -> 0",
        "Box.size: 0 -> 1",
        "Box.size: total += 5 -> total -= 5",
        "Box.size: 5 -> 6",
        "Box.size: 5 -> 0",
        "Box.size: return max(total, key=str, default='none') if total is None else total -> return None",
        "Box.size: max(total, key=str, default='none') if total is None else total -> "
        "max(total, key=str, default='none') if not total is None else total",
        "Box.size: total is None -> total is not None",
        "Box.size: max(total, key=str, default='none') -> max(total, default='none')",
        "Box.size: max(total, key=str, default='none') -> max(total, key=str)",
        "Box.size: 'none' -> 'noneX'",
        "Box.name: print('made', end='') -> pass",
        "Box.name: print('made', end='') -> print('made')",
        "Box.name: 'made' -> 'madeX'",
        "Box.name: '' -> 'X'",
        "Box.name: return 'box' -> return None",
        "Box.name: 'box' -> 'boxX'",
    ]


def test_equal_changes_are_numbered():
    assert names("def f(x):\n    return x + 1 + 1\n")[3:] == [
        "f: 1 -> 2",
        "f: 1 -> 0",
        "f: 1 -> 2 (2)",
        "f: 1 -> 0 (2)",
    ]


@pytest.fixture
def module(tmp_path: Path) -> Any:
    file = tmp_path / "a.py"
    file.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("mutated_in_a_test", file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "call", "before", "after"),
    [
        ("small: x <= LIMIT -> x < LIMIT", lambda module: module.small(3), True, False),
        ("Box.size: 5 -> 6", lambda module: module.Box().size, 5, 6),
        ("Box.name: 'box' -> 'boxX'", lambda module: module.Box.name(), "box", "boxX"),
    ],
)
def test_a_process_takes_a_mutant_over(module, name, call, before, after):
    functions = Functions({"a.py": Path(module.__file__)})
    (mutant,) = [mutant for mutant in mutants_of(SOURCE, "a.py") if mutant.name == f"a.py: {name}"]
    if "Box.name" not in name:  # which remembers its result
        assert call(module) == before
    functions.become(mutant)
    assert call(module) == after


def test_what_is_explained_is_a_mutant():
    files = [file for group in run.TESTS for file in run._files_of(group)]
    known = {mutant.name for file in files for mutant in mutants_of((run.SOURCE / file).read_text(), file)}
    assert sorted(EXPLAINED.keys() - known) == []


def test_survivors_have_to_be_explained(monkeypatch):
    outcomes = {"flow/ode.py: f: 1 -> 2": run.SURVIVED, "flow/ode.py: f: 1 -> 0": run.NOT_REACHED}
    kept = {"flow": {"mutants": {**outcomes, "flow/ode.py: f: 2 -> 3": run.KILLED}}}
    monkeypatch.setattr(run, "EXPLAINED", {"flow/ode.py: f: 1 -> 2": "One is as good as two."})
    table, unexplained = run.render(kept)
    assert unexplained == ["flow/ode.py: f: 1 -> 0"]
    assert "| flow/ode.py | 3 | 1 | 2 | 1 |" in table
    assert "- One is as good as two.\n    - `flow/ode.py: f: 1 -> 2`" in table
