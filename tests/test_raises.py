"""The walk of all raises, which decides with a coverage report whether each is reached by a test."""

import json

import pytest

from tests import raises

SOURCE = """\
def f(x):
    if x > 1:
        raise ValueError(
            "too large"
        )
    try:
        return 1 / x
    except ZeroDivisionError as error:
        raise TypeError("zero") from error
    except OSError:
        raise
"""
FOUND = [
    raises.Raise("a.py", 3, "ValueError"),
    raises.Raise("a.py", 9, "TypeError"),
    raises.Raise("a.py", 11, ""),
]


def report(executed, excluded=(), *, branches=(19, 20), name="src/rectified_diffusers/a.py"):
    file = {"executed_lines": list(executed), "excluded_lines": list(excluded)}
    return {"files": {name: file}, "totals": {"covered_branches": branches[0], "num_branches": branches[1]}}


def test_raises_are_found_with_their_lines():
    assert list(raises.raises_in(SOURCE, "a.py")) == FOUND
    assert str(FOUND[0]) == "a.py:3: raise ValueError"


def test_a_raise_is_reached_if_its_line_ran_or_is_excluded():
    assert raises.unreached(iter(FOUND), report([1, 2, 3], [11])) == [FOUND[1]]
    assert raises.unreached(iter(FOUND), report([3, 9, 11], name="src/rectified_diffusers/b.py")) == FOUND


def test_a_report_without_branches_is_refused():
    assert raises.percent_of_branches(report([])) == 95.0
    with pytest.raises(ValueError, match="branch = true"):
        raises.percent_of_branches(report([], branches=(0, 0)))


@pytest.mark.parametrize(("executed", "branches", "code"), [((3, 9, 11), 95, 0), ((3, 9), 95, 1), ((3, 9, 11), 94, 1)])
def test_exit_code(tmp_path, monkeypatch, capsys, executed, branches, code):
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "report.json").write_text(json.dumps(report(executed, branches=(branches, 100))))
    monkeypatch.setattr(raises, "SOURCE", tmp_path)
    assert raises.main([str(tmp_path / "report.json")]) == code
    assert ("a.py:11: raise\n" in capsys.readouterr().out) == (11 not in executed)


def test_the_source_is_walked():
    found = list(raises.raises_below(raises.SOURCE))
    assert len(found) > 300
    assert {"flow/loss.py", "cli/shared.py", "pipelines/scheduler.py"} <= {each.path for each in found}
