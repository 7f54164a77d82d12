"""Marks for the cases of a test."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return cases for `parametrize`; those that are not among the fast ones are slow.

    A tuple has the values of several parameters. The keys of a dictionary are the ids of its values, and `fast` names
    some of them.
    """
    named = cases.items() if isinstance(cases, dict) else ((case, case) for case in cases)
    ids = (lambda name: {"id": name}) if isinstance(cases, dict) else (lambda name: {})
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else [case]),
            marks=() if name in fast else pytest.mark.slow,
            **ids(name),
        )
        for name, case in named
    ]
