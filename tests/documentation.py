"""Run the code blocks of a page as a reader would: in order, in one folder, the Hub's models being tiny ones.

Examples in docstrings of public names run in the same way, after the code of docs/reference/api.md.

Python blocks are executed and commands are called, with two changes. Numbers that say how much work is done are made
small (`SMALL`), and "cuda" is "cpu". What stands behind `<!-- not run: reason -->` is only parsed. Commands of other
programs are not run; of a script of ours it is looked up that it exists and knows the options. Scripts whose output
later blocks need are run (`SCRIPTS`).
"""

import contextlib
import dataclasses
import inspect
import io
import os
import re
import runpy
import shlex
import sys
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import rectified_diffusers
from rectified_diffusers import cli

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^[ ]*```(python|bash)\n(.*?)^[ ]*```$", re.DOTALL | re.MULTILINE)
NOT_OURS = {".", "accelerate", "cd", "git", "make", "mkdocs", "npm", "patch", "pip"}
MODULES = {"build", "pip", "tests.diffusers_suite.run", "twine", "venv"}  # behind python -m

TRAINING = {"batch_size": 2, "log_every_steps": 1, "mixed_precision": "no", "micro_batch_size": 1}
SMALL: dict[str, dict[str, Any]] = {
    "triplets": {"num_triplets": 4, "num_inference_steps": 2, "batch_size": 4},
    # from where an untrained flow leads to white noise, too
    "real-triplets": {"num_triplets": 4, "num_inference_steps": 2, "batch_size": 4, "inversion_time": 0.065},
    "reflow": {**TRAINING, "max_steps": 2},
    "distill": {**TRAINING, "max_steps": 2},
    "progressive": {**TRAINING, "steps_per_round": 1},
    "dmd": {**TRAINING, "max_steps": 2, "fake_updates": 1, "first_fake_updates": 0},
    "interpolate": {"frames": 2},
}
SCRIPTS = {  # script -> options with less work to do
    "examples/fine_tuning/text_to_image.py": ("--max-train-steps", "2", "--train-batch-size", "2"),
}
PARSED = {"demo"}  # serves until it is stopped
SMALL_TRAINER = {**TRAINING, "max_steps": 2, "steps_per_round": 1, "fake_updates": 1}
SMALL_EVALUATION = {"num_pictures": 2, "seeds": (0,), "diversity_prompts": 0, "straightness_prompts": 0}

EXAMPLE = re.compile(r"^Example:\n    ```python\n(.*?)^    ```$", re.DOTALL | re.MULTILINE)
SET_UP = "docs/reference/api.md"  # its code makes what the examples of the docstrings use


@dataclass(frozen=True)
class Block:
    """A piece of a page: where it begins, in which language it is, its text, and whether it is run."""

    line: int
    language: str
    text: str
    is_run: bool

    @property
    def commands(self) -> list[list[str]]:
        """The words of every command of a bash block, without comments; `&&` separates as the end of a line does."""
        lines = self.text.replace("\\\n", " ").split("\n")
        found = [shlex.split(command, comments=True) for line in lines for command in line.split("&&")]
        return [words for words in found if words]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, match.start()) + 1, match[2], textwrap.dedent(match[3]), match[1] is None)
        for match in BLOCK.finditer(text)
    ]


def run_page(page: str, folder: str) -> int:
    """Run the blocks of a page of the repository in a folder, and return their number."""
    namespace: dict[str, Any] = {}
    blocks = blocks_of(ROOT / page)
    with inside(folder), small_trainings():
        for block in blocks:
            with quiet() as printed:
                try:
                    run_block(block, namespace)
                except BaseException as error:  # noqa: BLE001 (it goes to another process, as text)
                    raise AssertionError(
                        f"{page}:{block.line}: {type(error).__name__}: {error}\n{printed.getvalue()}"
                    ) from None
    return len(blocks)


def examples() -> dict[str, str]:
    """Return the code of the example in the docstring of every public name that has one."""
    docstrings = {name: inspect.cleandoc(getattr(rectified_diffusers, name).__doc__ or "") for name in public_names()}
    found = {name: EXAMPLE.search(docstring + "\n") for name, docstring in docstrings.items()}
    return {name: textwrap.dedent(match[1]) for name, match in found.items() if match is not None}


def public_names() -> list[str]:
    """Return the public names that this package defines, in an order in which `evaluate` precedes `Evaluation`."""
    others = {"ModelMixin", "SchedulerMixin", "__version__"}
    return sorted(set(rectified_diffusers.__all__) - others, key=str.lower)


def run_examples(folder: str, left_out: set[str]) -> dict[str, str]:
    """Run the examples of the docstrings in a folder, after their common set-up, and return the errors by name."""
    set_up: dict[str, Any] = {}
    errors: dict[str, str] = {}
    with quiet(), inside(folder), small_trainings(), small_evaluations():
        for block in blocks_of(ROOT / SET_UP):
            run_block(block, set_up)
        for name, code in examples().items():
            if name in left_out:
                continue
            try:
                exec(compile(code, f"example of {name}", "exec"), {**set_up})
            except Exception:  # noqa: BLE001 (all errors are reported together)
                errors[name] = traceback.format_exc()
    return errors


def run_block(block: Block, namespace: dict[str, Any]) -> None:
    if block.language == "python":
        code = compile(block.text.replace('"cuda"', '"cpu"'), f"block of line {block.line}", "exec")
        if block.is_run:
            exec(code, namespace)
        return
    for words in block.commands:
        if words[:4] == ["accelerate", "launch", "-m", "rectified_diffusers.cli"]:
            words = ["rectified-diffusers", *words[4:]]
        if words[0] == "rectified-diffusers":
            if words[1] != "COMMAND":
                run_ours(words[1:], block.is_run)
        else:
            check_others(words)
            script = next((word for word in words if word in SCRIPTS), None)
            if block.is_run and script is not None:
                run_script(script, words[words.index(script) + 1 :])


def run_script(script: str, arguments: list[str]) -> None:
    """Run a script of the repository in this process, as `accelerate launch` would on one CPU, with less to do."""
    import datasets

    with (
        mock.patch.object(sys, "argv", [script, *arguments, *SCRIPTS[script]]),
        mock.patch.object(datasets.config, "HF_DATASETS_CACHE", Path.cwd() / "datasets-cache"),
    ):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def run_ours(arguments: list[str], is_run: bool) -> None:
    """Call a command with less work to do than it says, or see that it can be called."""
    cli.build_parser().parse_args(arguments)
    if not is_run or arguments[0] in PARSED:
        return
    changes = SMALL.get(arguments[0], {})
    smaller = [text for name, value in changes.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    if (code := cli.main([*arguments, *smaller])) != 0:
        raise AssertionError(f"exit code {code} of {shlex.join(arguments)}")


def check_others(words: list[str]) -> None:
    """Know the program, and the script and its options if it is one of ours."""
    scripts = [word for word in words if word.endswith((".py", ".patch")) and "/" in word]
    known = words[0] in NOT_OURS or (words[:2] == ["python", "-m"] and words[2] in MODULES)
    if (words[0] == "python" and scripts[:1] == words[1:2]) or (words[:2] == ["accelerate", "launch"] and scripts):
        source = (ROOT / scripts[0]).read_text(encoding="utf-8")
        options = words[words.index(scripts[0]) :]
        missing = [word for word in options if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source]
        if missing:
            raise AssertionError(f"{scripts[0]} has no option {missing[0]}")
        return
    if not known:
        raise AssertionError(f"{shlex.join(words)}: tests/documentation.py does not know that program")
    for script in scripts:
        if not (ROOT / script).exists():
            raise AssertionError(f"there is no {script}")


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Collect what is printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        yield printed


@contextlib.contextmanager
def small_trainings() -> Iterator[None]:
    """Let every trainer that is made do two steps, and draw no charts for its report."""
    from rectified_diffusers.training import report
    from rectified_diffusers.training.trainer import Trainer

    original = Trainer.__init__

    def make(self: Any, pipeline: Any, dataset: Any, config: Any) -> None:
        settable = {field.name for field in dataclasses.fields(config) if field.init}
        changes = {name: value for name, value in SMALL_TRAINER.items() if name in settable}
        original(self, pipeline, dataset, dataclasses.replace(config, **changes))

    charts = mock.patch.object(report, "_chart", return_value="")
    with charts, mock.patch.object(Trainer, "__init__", make):
        yield


@contextlib.contextmanager
def small_evaluations() -> Iterator[None]:
    """Let every evaluation compare two images, by random features in place of downloaded ones."""
    from rectified_diffusers.evaluation import scorers
    from rectified_diffusers.evaluation.config import EvaluationConfig
    from tests.evaluation.conftest import Pooled

    def shrink(self: Any) -> None:
        for name, value in SMALL_EVALUATION.items():
            object.__setattr__(self, name, value)

    pooled = mock.patch.object(scorers, "mobilenet_scorer", return_value=scorers.Scorer("pooled", Pooled, False))
    with mock.patch.object(EvaluationConfig, "__post_init__", shrink), pooled:
        yield


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """Work in a folder: contextlib.chdir, which Python 3.10 does not have."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
