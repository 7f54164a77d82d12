"""Options as dataclass fields, and the command line generated from them.

An option is defined once: the dataclass field holds its name, type and default, `option` its help text, and
`__post_init__` its checks. This module converts such a class to arguments of a command, and parsed arguments to an
instance. It imports only the standard library, so that `--help` responds at once.
"""

import argparse
import dataclasses
import os
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

LARGEST = 10**9
LARGEST_OF = {
    **dict.fromkeys(("height", "width", "size"), 1 << 14),
    **dict.fromkeys(("steps", "num_inference_steps", "lora_rank", "frames"), 10**5),
    "num_images": 10**6,
}
"""Whole numbers above these are mistakes, which would otherwise compute or wait without end; a seed may be larger."""

_WORDS = {int: "a whole number", float: "a number", str: "a text", Path: "a path", bool: "True or False"}
_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}


def option(
    default: Any,
    help: str,
    *,
    flags: Sequence[str] = (),
    shown: str | None = None,
    **argument: Any,
) -> Any:
    """Declare a dataclass field that is also a command-line option.

    Args:
        default: `dataclasses.MISSING` for a required option.
        help: one sentence, the only description of the option; the default is appended where it is shown.
        flags: instead of `--name`; a name without dashes makes it a positional argument.
        shown: what `--help` shows as the default, where None stands for a computed value.
        argument: settings of `add_argument` that replace those made from the type.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "flags": flags, "shown": shown, "argument": argument}
    )


def flag(help: str) -> Any:
    """Declare a bool field that is False unless its option, which takes no value, is given."""
    return option(False, help, action="store_true")


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add one `--argument` per field of `config_class` to the parser, the required ones first.

    `Literal` fields become choices, `bool` a pair `--x / --no-x`, `tuple[X, ...]` a list, and `X | None` also takes
    the word `none`. Arguments that are not passed are absent from the namespace: only the dataclass has defaults.
    """
    types_of = get_type_hints(config_class)
    for field in sorted(_fields(config_class), key=lambda field: field.default is not MISSING):
        names = field.metadata["flags"] or [f"--{field.name.replace('_', '-')}"]
        settings = {**_argument(config_class, field, types_of[field.name]), **field.metadata["argument"]}
        if names[0].startswith("-"):
            settings |= {"dest": field.name, "required": field.default is MISSING}
        parser.add_argument(*names, default=argparse.SUPPRESS, help=_help(field), **settings)


def options_from(namespace: argparse.Namespace, config_class: type[Config]) -> Config:
    """Return the config built from what `add_options` parsed; its `__post_init__` checks the values."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items()}
    for name, value in given.items():
        require_bounded(name, value)
    return config_class(**{field.name: given[field.name] for field in _fields(config_class) if field.name in given})


def require_bounded(name: str, value: Any) -> None:
    """Raise a ValueError if the value of an option is a whole number beyond its limit."""
    limit = LARGEST_OF.get(name, LARGEST)
    if isinstance(value, int) and value > limit and not name.endswith("seed"):
        raise ValueError(f"{name} must be at most {limit:,}, got {value:,}.")


def check_options(config: Any) -> None:
    """Check every option against its type and every `Literal` against its values, which Python itself does not check.

    Call it first in `__post_init__`, so that later checks can compare numbers. A whole number is accepted as a number,
    a text as a path, and a list as a tuple; True is not accepted as a number.

    Raises:
        TypeError: a value of another type, such as one text instead of several.
        ValueError: a value that is not among those of a `Literal`.
    """
    types_of = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        base, optional = _without_none(types_of[field.name])
        value = getattr(config, field.name)
        require_bounded(field.name, value)
        if get_origin(base) is Literal and value not in get_args(base) and not (optional and value is None):
            known = ", ".join(map(repr, get_args(base)))
            raise ValueError(f"{field.name} must be one of {known}, got {value!r}.")
        many = get_origin(base) is tuple
        words = _WORDS.get(get_args(base)[0] if many else base)
        if words is None or (optional and value is None) or _has_type(value, base):
            continue
        expected = f"a tuple, each item {words}" if many else words
        raise TypeError(
            f"{field.name} must be {expected}{' or None' if optional else ''}, got {value!r} of type "
            f"{type(value).__name__}; convert it."
        )


def _has_type(value: Any, base: Any) -> bool:
    if get_origin(base) is tuple:
        return isinstance(value, (tuple, list)) and all(_has_type(item, get_args(base)[0]) for item in value)
    if isinstance(value, bool):
        return base is bool
    accepted = {float: (int, float), Path: (str, os.PathLike)}
    return isinstance(value, accepted.get(base, base))


def _fields(config_class: type) -> list[dataclasses.Field]:
    """Return the fields that can be set, all of them declared by `option` or `flag`."""
    return [field for field in dataclasses.fields(config_class) if field.init]


def _help(field: dataclasses.Field) -> str:
    """Return the field's help text with its default, escaped for argparse, which expands `%(...)s`."""
    if not str(next(iter(field.metadata["flags"]), "-")).startswith("-"):  # positional
        return field.metadata["help"].replace("%", "%%")
    default = field.metadata["shown"] or _shown(field.default)
    note = "required" if field.default is MISSING else f"default: {default}"
    return f"{field.metadata['help']} ({note})".replace("%", "%%")


def _shown(default: Any) -> str:
    """Return a default as a user would type it."""
    if default is None:
        return "none"
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    return str(default) or "empty"


def _argument(config_class: type, field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` that follow from the field's type."""
    base, optional = _without_none(hint)
    choices: Any = None
    many = get_origin(base) is tuple and get_args(base)[1:] == (Ellipsis,)
    if many:
        base = get_args(base)[0]
    if get_origin(base) is Literal:
        choices = get_args(base)
        base = type(choices[0])
    if base is bool and not many and not optional:
        return {"action": argparse.BooleanOptionalAction}
    if base not in _METAVARS:
        raise TypeError(
            f"{config_class.__name__}.{field.name} is {hint}, which has no form on the command line; use int, float, "
            "str, bool, Path, a Literal, a tuple[X, ...] of one of them, or X | None."
        )
    argument: dict[str, Any] = {"type": _optional(base) if optional else base, "metavar": _METAVARS[base]}
    if choices is not None:
        argument["choices"] = [*choices, None] if optional else list(choices)
        argument["metavar"] = "{" + ",".join(map(str, choices)) + "}"
    if many:
        argument["nargs"] = "*"
    return argument


def expanded_path(text: str) -> Path:
    """Return a path with `~` expanded, which shells leave as it is in `--output-dir=~/runs`."""
    return Path(os.path.expanduser(text))  # unlike Path.expanduser, leaves the home of an unknown user unchanged


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Split `X | None` into X and True; return any other type with False."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    rest = [part for part in get_args(hint) if part is not type(None)]
    return (rest[0], True) if len(rest) == 1 else (hint, False)


def _optional(base: type) -> Callable[[str], Any]:
    """Return a parser of `base` that reads the word `none` as None."""
    parser = expanded_path if base is Path else base

    def parse(text: str) -> Any:
        return None if text.lower() == "none" else parser(text)

    parse.__name__ = base.__name__  # argparse shows it in "invalid int value"
    return parse
