"""The command line: rectified-diffusers COMMAND; one module per command.

The options of a command are the fields of its dataclasses: the config of the public function that it calls, where
there is one, and the command's own options such as files and the device. torch and diffusers are imported only when a
command runs, so that `--help` and argument errors respond immediately.

Errors that the user can fix (a bad argument, a missing file or package, a value that a config refuses, a run that
diverged) print one line to stderr and exit with code 2; `--debug` adds the traceback. Any other error is a bug and
keeps its traceback.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from rectified_diffusers import __version__
from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.cli import delta, demo, evaluate, export, generate, inspect, interpolate, training, triplets
from rectified_diffusers.cli.completion import SHELLS, PrintCompletion
from rectified_diffusers.cli.shared import PROG, CommandError, Parser, options_of

_PLAIN_ERRORS = CommandError, UnsupportedPipelineError, ValueError, OSError, ImportError, FloatingPointError
_MEMORY = re.compile("allocate|out of memory|Storage size calculation overflowed")
COMMANDS = (generate, interpolate, demo, inspect, triplets, training, evaluate, export, delta)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 after a user error, 130 after Ctrl-C."""
    arguments = argparse.Namespace(debug=False, resumable=False)
    try:
        arguments = build_parser().parse_args(_decoded(sys.argv[1:] if argv is None else argv))
        arguments.run(*options_of(arguments))
    except _PLAIN_ERRORS as error:
        if arguments.debug:
            raise
        print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if arguments.debug or not (isinstance(error, MemoryError) or _MEMORY.search(str(error))):
            raise
        print(f"{PROG}: error: not enough memory: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command to continue" if arguments.resumable else "\nstopped", file=sys.stderr)
        return 130
    return 0


def _decoded(argv: Sequence[str]) -> list[str]:
    """Return arguments with the bytes that Python could not decode in the locale's encoding decoded as UTF-8."""
    try:
        return [argument.encode("utf-8", "surrogateescape").decode("utf-8") for argument in argv]
    except UnicodeDecodeError as error:
        raise CommandError(f"expected arguments in UTF-8, got {error.object!r}") from error


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROG, description="Text-to-image in one step: generate images, and train one-step models.")
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help=f"Print a completion script for {', '.join(SHELLS)}; load it in the shell's start-up file",
    )
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in COMMANDS:
        module.add_to(commands)
    return parser
