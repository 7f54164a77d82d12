"""Makers for the tests of `StudioProcess` that need no torch: the process starts without the seconds of its import."""

import os


class Nothing:
    """Stands where a studio would."""


def fail_to_make() -> Nothing:
    raise OSError("no weights")


def die() -> Nothing:
    os._exit(9)
