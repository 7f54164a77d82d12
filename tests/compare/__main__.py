"""Run every command with two versions of the source, and compare their output files byte by byte.

    python -m tests.compare --before COMMIT
    python -m tests.compare --before COMMIT --after COMMIT --only reflow evaluate

A version is a commit, checked out into a temporary git worktree, or a folder; `--after` is this working tree unless
given. Both run the lines of `COMMANDS` on the same tiny models and the bundled one, in one thread, each in a folder of
its own with the same relative paths. Then each runs the lines of `OLD` in a copy of what the first has written: its
triplets, checkpoints and saved folders are read, resumed and trained on.

`files.py` says when two files are equal. Exit code 1 if a file differs or lacks on one side, or if a command fails.

A command runs in a fork of a process that has imported torch and diffusers already, as `python -m
rectified_diffusers.cli` would without them: the imports take longer than the work.
"""

import argparse
import atexit
import gc
import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.compare.commands import COMMANDS, OLD
from tests.compare.files import difference, is_compared

ROOT = Path(__file__).parents[2]

LIBRARIES = ("torchvision", "accelerate", "peft", "scipy.linalg", "diffusers.pipelines.auto_pipeline")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "80"}


def serve() -> None:
    """Import the libraries, print the package's location, and run the commands from stdin: folder, name and words."""
    for library in LIBRARIES:
        importlib.import_module(library)
    package = importlib.util.find_spec("rectified_diffusers")
    reply(package.origin if package and package.origin else "nowhere")
    gc.freeze()
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            code = run_here(*json.loads(line))
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)  # shutting down the interpreter would take two more seconds
        _, status = os.waitpid(child, 0)
        reply(str(os.waitstatus_to_exitcode(status)))


def reply(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run_here(folder: str, name: str, words: list[str]) -> int:
    """Run a command in this process, its output appended to `NAME.out` and `NAME.err`, and return its exit code."""
    os.chdir(folder)
    for number, path in ((0, os.devnull), (1, f"{name}.out"), (2, f"{name}.err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.argv = ["rectified-diffusers", *words]
    try:
        if words[0] == "-c":
            exec(words[1], {})
        else:
            runpy.run_module("rectified_diffusers.cli", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        return 1
    return 0


class Version:
    """A version of the source, and a process that runs its commands."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        path = os.pathsep.join([str(tree / "src"), str(ROOT)])
        command = [sys.executable, "-c", "from tests.compare.__main__ import serve; serve()"]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        origin = self._answer()
        if not Path(origin).is_relative_to(tree):
            raise RuntimeError(f"{tree} was asked for, and {origin} is imported.")

    def _answer(self) -> str:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the process of {self.tree} has ended.")
        return line.strip()

    def run(self, folder: Path, name: str, line: str) -> int:
        words = shlex.split(line)
        asked = words if words[0].startswith("-") else [*words, "--json"]
        print(json.dumps([str(folder), name, asked]), file=self.process.stdin, flush=True)
        return int(self._answer())

    def close(self) -> None:
        self.process.communicate()


def wanted(only: list[str]) -> list[str]:
    """Return the commands that begin with the names in `only`, and those whose files they read; all if it is empty."""
    lines = {**COMMANDS, **OLD}
    unknown = [each for each in only if not any(name.startswith(each) for name in lines)]
    if unknown:
        raise SystemExit(f"no command {unknown[0]!r}; there are {', '.join(lines)}")
    found = {name for name in lines if not only or any(name.startswith(each) for each in only)}
    for name in reversed(lines):
        if name in found:
            words = [re.findall(r"[\w-]+", line)[1:] for line in lines[name]]
            found |= COMMANDS.keys() & {word for line in words for word in line}
    return [name for name in lines if name in found]


@contextmanager
def tree_of(version: str) -> Iterator[Path]:
    """Yield the folder of a version; a commit is checked out for the duration of the block."""
    if Path(version).is_dir():
        yield Path(version).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), version], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the time and size of every file below a folder, by name, except for `inputs`, which is a link."""
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return {str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.stat().st_size) for file in files}


def _is_unknown(name: str, folder: Path) -> bool:
    return f"argument command: invalid choice: '{name}'" in (folder / f"{name}.err").read_text()


class Comparison:
    """Two folders in which two versions run the same commands."""

    def __init__(self, versions: Iterable[Version], folders: Iterable[Path]) -> None:
        self.versions, self.folders = tuple(versions), tuple(folders)
        self.rows: list[tuple[str, int, list[str]]] = []

    def run(self, name: str, lines: list[str]) -> None:
        """Run a command, and compare the files that it wrote or changed."""
        began, written, problems = time.perf_counter(), set(), []
        for version, folder in zip(self.versions, self.folders, strict=True):
            seen = stamps(folder)
            codes = [version.run(folder, name, line) for line in lines]
            if folder == self.folders[0] and any(codes) and _is_unknown(name, folder):
                break  # the version before does not have this command
            written |= {file for file, stamp in stamps(folder).items() if seen.get(file) != stamp}
            if any(codes):
                last = (folder / f"{name}.err").read_text().splitlines()[-1:]
                problems.append(f"failed in {folder.name}: {''.join(last)}")
        compared = sorted(file for file in written if is_compared(file))
        for file in compared:
            found = difference(*(folder / file for folder in self.folders))
            problems += [f"{file}: {found}"] if found else []
        self.rows.append((name, len(compared), problems))
        print(f"{name}: {len(compared)} files, {time.perf_counter() - began:.1f} s", *problems, sep="\n  ", flush=True)

    def table(self) -> str:
        rows = [f"| {name} | {files} | {len(problems)} |" for name, files, problems in self.rows]
        return "\n".join(["| command | files | differences |", "|---|---|---|", *rows])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare what two versions of the source write.")
    parser.add_argument("--before", required=True, metavar="VERSION", help="commit, or folder of a working tree")
    parser.add_argument("--after", default=str(ROOT), metavar="VERSION", help="likewise (default: this working tree)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="commands whose names begin so")
    parser.add_argument("--output", type=Path, help="folder to keep what they write (default: a temporary one)")
    options = parser.parse_args(arguments)
    names = wanted(options.only)
    from tests.compare.inputs import make_inputs

    with ExitStack() as stack:
        trees = [stack.enter_context(tree_of(version)) for version in (options.before, options.after)]
        output = options.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        output = output.resolve()
        make_inputs(output / "inputs")
        servers = {tree: Version(tree) for tree in dict.fromkeys(trees)}
        for server in servers.values():
            stack.callback(server.close)
        versions = [servers[tree] for tree in trees]
        new, old = ([output / f"{kind}{side}" for side in ("before", "after")] for kind in ("", "old-"))
        for folder in new:
            folder.mkdir()
            (folder / "inputs").symlink_to(output / "inputs")
        comparison = Comparison(versions, new)
        for name in names:
            if name in OLD and comparison.folders != tuple(old):
                for folder in old:
                    shutil.copytree(new[0], folder, symlinks=True)
                comparison.folders = tuple(old)
            comparison.run(name, {**COMMANDS, **OLD}[name])
    print("", comparison.table(), sep="\n")
    return int(any(problems for _, _, problems in comparison.rows))


if __name__ == "__main__":
    sys.exit(main())
