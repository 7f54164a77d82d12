"""rectified-diffusers --print-completion: print a shell script that completes commands, options and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rectified_diffusers.cli.shared import CommandError

SHELLS = ("bash", "zsh", "tcsh")
FOLDERS = ("model", "teacher", "triplets", "controlnet", "data", "output_dir")  # argument names


class PrintCompletion(argparse.Action):
    """Print the script that shtab generates from the parser, and exit."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            import shtab
        except ImportError as error:
            raise CommandError("completion needs shtab: pip install shtab") from error
        for action in _arguments(parser):
            if action.dest in FOLDERS:
                action.complete = shtab.DIRECTORY  # pyright: ignore[reportAttributeAccessIssue]
            elif action.type is Path or "FILE" in str(action.metavar):
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
        print(shtab.complete(parser, str(values)))
        parser.exit()


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of all its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _arguments(command)
        else:
            yield action
