"""Marks for the cases of a test."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return cases for `parametrize`; those that are not among the fast ones are slow.

    A tuple has the values of several parameters.
    """
    return [
        pytest.param(*(case if isinstance(case, tuple) else [case]), marks=() if case in fast else pytest.mark.slow)
        for case in cases
    ]
