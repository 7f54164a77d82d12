"""Give one object another attribute or method for a while; its class and all other objects keep theirs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Shadow `owner.name` by an attribute of the instance; afterwards, show again what was there before."""
    before = vars(owner).get(name, _ABSENT)
    object.__setattr__(owner, name, value)  # neither a component of a pipeline nor a submodule of a module
    try:
        yield
    finally:
        if before is _ABSENT:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)
