"""The rules of CONTRIBUTING.md that can be read off the source: ranks of imports, sizes, no pickle, no bare except."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "rectified_diffusers"
ROOT = Path(__file__).parent.parent / "src" / PACKAGE
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# A module imports from lower ranks, or from its own folder; modules of one rank do not know each other.
RANKS = {
    "options": 0,
    "arguments": 0,
    "complete": 1,
    "saving": 1,
    "data.config": 1,  # free of torch, for --help
    "training.config": 1,
    "flow": 1,
    "schedulers": 2,
    "loading": 1.5,
    "loaders": 2.5,
    "denoiser": 2.5,  # knows the schedulers; data, evaluation and training ask it
    "models": 2.7,  # stacks what velocity_unet made
    "speed": 2,
    "weights": 2,
    "velocity_unet": 2.5,
    "pipelines": 3,
    "pipelines_xl": 3.5,
    "portable": 3,
    "registration": 3,
    "data": 3,
    "evaluation": 3,
    "animation": 4,
    "animation_files": 1,
    "export": 4,
    "inversion": 4,
    "real_triplets": 4.2,  # inverts
    "training": 4,
    "cli": 5,
    "demo": 4.5,  # the command line starts it
}
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

FILES = sorted(ROOT.rglob("*.py"))


def module_name(file: Path) -> str:
    """Name a file relative to the package: flow/ode.py is flow.ode, flow/__init__.py is flow."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place_of(module: str) -> str:
    """Return the entry of RANKS that a module belongs to: its own name, or its folder's."""
    return module if module in RANKS else module.split(".")[0]


def imports_of(file: Path) -> Iterator[tuple[str, int]]:
    """Give the absolute names that a file imports anywhere, with the line; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            origin = [node.module] if node.module else []
            if node.level:  # relative: one dot is the folder of the file
                origin = [PACKAGE, *file.relative_to(ROOT).parts[: -node.level], *origin]
            for alias in node.names:
                yield ".".join([*origin, alias.name]), node.lineno


def imported_modules(file: Path) -> Iterator[tuple[str, int]]:
    """Give the modules of the package that a file imports, relative to it, with the line."""
    known = {module_name(file) for file in FILES}
    for name, line in imports_of(file):
        if name.split(".")[0] != PACKAGE or name == f"{PACKAGE}.__version__":
            continue
        module = name.removeprefix(PACKAGE).removeprefix(".")
        while module not in known:
            module = module.rpartition(".")[0]
        yield module, line


def ids(file: Path) -> str:
    return module_name(file) or PACKAGE


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_imports_go_down_the_ranks(file):
    importer = module_name(file)
    if importer == "":  # the package itself names everything, but loads it on first use
        return
    place = place_of(importer)
    assert place in RANKS, f"give {place!r} a rank in {__file__}"
    for imported, line in imported_modules(file):
        if imported == "":  # bundled_checkpoint, or a public name
            assert RANKS[place] == RANKS["cli"], f"{file}:{line}: import from the module, not from the package"
            continue
        target = place_of(imported)
        allowed = target == place or RANKS[target] < RANKS[place]
        assert allowed, f"{file}:{line}: {place} (rank {RANKS[place]}) imports {target} (rank {RANKS[target]})"


@pytest.mark.parametrize("file", [f for f in FILES if module_name(f).split(".")[0] == "flow"], ids=ids)
def test_flow_imports_torch_and_the_standard_library(file):
    """scipy, for the assignment problem, is imported by the function that needs it."""
    at_the_top = {node.lineno for node in ast.parse(file.read_text(encoding="utf-8")).body}
    for name, line in imports_of(file):
        library = name.split(".")[0]
        allowed = library in {PACKAGE, "torch"} or library in sys.stdlib_module_names
        assert allowed or (library == "scipy" and line not in at_the_top), f"{file}:{line}: flow/ imports {library}"


@pytest.mark.parametrize("file", [ROOT / "options.py", *ROOT.glob("*/config.py")], ids=ids)
def test_options_need_the_standard_library_alone(file):
    for name, line in imports_of(file):
        library = name.split(".")[0]
        assert library == PACKAGE or library in sys.stdlib_module_names, f"{file}:{line}: {library}"


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_files_and_functions_are_short(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") < MAX_FILE_LINES, f"{file} has {MAX_FILE_LINES} lines or more: look for the second idea"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines < MAX_FUNCTION_LINES, f"{file}:{node.lineno}: {node.name} has {lines} lines"


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_no_pickle_no_bare_except_no_assert(file):
    for name, line in imports_of(file):
        assert name.split(".")[0] not in PICKLERS, f"{file}:{line}: nothing is pickled here"
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
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
