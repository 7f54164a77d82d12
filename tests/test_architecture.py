"""The rules of CONTRIBUTING.md that can be read off the source; import-linter checks the floors (pyproject.toml)."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "rectified_diffusers"
ROOT = Path(__file__).parent.parent / "src" / PACKAGE
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

FILES = sorted(ROOT.rglob("*.py"))


def module_name(file: Path) -> str:
    """Name a file relative to the package: flow/ode.py is flow.ode, flow/__init__.py is flow."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def nodes_of(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imports_of(file: Path) -> Iterator[tuple[str, int]]:
    """Yield the absolute names that a file imports anywhere, with the line; `from a import b` gives a and a.b."""
    for node in nodes_of(file):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            origin = [node.module] if node.module else []
            if node.level:  # relative: one dot is the folder of the file
                origin = [PACKAGE, *file.relative_to(ROOT).parts[: -node.level], *origin]
            for alias in node.names:
                yield ".".join([*origin, alias.name]), node.lineno


def ids(file: Path) -> str:
    return module_name(file) or PACKAGE


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_only_the_command_line_imports_from_the_package_itself(file):
    """The floors are import-linter's; it does not see that a public name is another floor's."""
    rooms = {path.stem for path in ROOT.iterdir()}
    for name, line in imports_of(file):
        package, _, rest = name.partition(".")
        if package != PACKAGE or rest in ("", "__version__") or module_name(file).split(".")[0] in ("", "cli"):
            continue
        assert rest.split(".")[0] in rooms, f"{file}:{line}: import from the module, not from the package"


@pytest.mark.parametrize("file", [f for f in FILES if module_name(f).split(".")[0] == "flow"], ids=ids)
def test_flow_imports_torch_and_the_standard_library(file):
    for name, line in imports_of(file):
        library = name.split(".")[0]
        allowed = library in {PACKAGE, "torch"} or library in sys.stdlib_module_names
        assert allowed, f"{file}:{line}: flow/ imports {library}"


@pytest.mark.parametrize("file", [ROOT / "options.py", *ROOT.glob("*/config.py")], ids=ids)
def test_options_need_the_standard_library_alone(file):
    for name, line in imports_of(file):
        library = name.split(".")[0]
        assert library == PACKAGE or library in sys.stdlib_module_names, f"{file}:{line}: {library}"


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_files_and_functions_are_short(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") < MAX_FILE_LINES, f"{file} has {MAX_FILE_LINES} lines or more: look for the second idea"
    for node in nodes_of(file):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines < MAX_FUNCTION_LINES, f"{file}:{node.lineno}: {node.name} has {lines} lines"


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_no_pickle_no_bare_except_no_assert(file):
    for name, line in imports_of(file):
        assert name.split(".")[0] not in PICKLERS, f"{file}:{line}: nothing is pickled here"
    for node in nodes_of(file):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{file}:{node.lineno}: bare except"
        assert not isinstance(node, ast.Assert), (
            f"{file}:{node.lineno}: assert is for tests; raise an error that helps"
        )
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in {"load", "save"}, f"{file}:{node.lineno}: torch.{node.attr} pickles"


def test_no_module_is_called_utils():
    assert not [file for file in FILES if file.stem in {"utils", "helpers", "misc", "common"}]


def test_no_folder_is_called_like_one_of_diffusers_pipelines():
    """A class in such a folder would be saved under diffusers' name and not be found again."""
    from diffusers import pipelines

    theirs = {path.name for path in Path(pipelines.__path__[0]).iterdir() if path.is_dir()}
    ours = {path.name for path in ROOT.rglob("*") if path.is_dir() and path.name != "__pycache__"}
    assert not ours & theirs
