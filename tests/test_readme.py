"""The README's code runs, and its commands are commands."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from rectified_diffusers.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "examples/emoji/README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- needs a model hub -->\n)?```(python|bash)\n(.*?)```", re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a page in one language, without those that a comment keeps for machines with a model hub."""
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [code for needs_hub, name, code in found if name == language and not needs_hub]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run_one_after_the_other(page):
    namespace: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), namespace)
    if "image" in namespace:
        assert isinstance(namespace["image"], Image.Image)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_commands_parse(page):
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").split("\n")
    for line in lines:
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words and words[0] == "rectified-diffusers" and "COMMAND" not in words:
                build_parser().parse_args(words[1:])
