"""The package itself: public names, loaded on first use, and the bundled checkpoint's folder."""

import ast
import configparser
import importlib
import importlib.metadata
import re
import runpy
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from packaging.version import Version

import rectified_diffusers

ROOT = Path(__file__).parent.parent


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'accelerate'}"
    code = f"import rectified_diffusers, sys; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", rectified_diffusers.__all__)
def test_public_names_exist(name):
    assert getattr(rectified_diffusers, name) is not None
    assert name in dir(rectified_diffusers)


def test_the_stub_for_type_checkers_names_what_is_public():
    stub = ast.parse(Path(rectified_diffusers.__file__).with_suffix(".pyi").read_text())
    (listed,) = (
        ast.literal_eval(node.value)
        for node in stub.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert listed == rectified_diffusers.__all__


def test_the_loaders_base_classes_are_diffusers_own():
    assert rectified_diffusers.SchedulerMixin is diffusers.SchedulerMixin
    assert rectified_diffusers.ModelMixin is diffusers.ModelMixin


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'RectifiedFlow'; public names: .*RectifiedFlowPipeline"):
        importlib.import_module("rectified_diffusers").RectifiedFlow  # noqa: B018


def test_bundled_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(rectified_diffusers, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="part of the wheel: reinstall"):
        rectified_diffusers.bundled_checkpoint()
    folder = tmp_path / "assets" / "emoji-one-step"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    assert rectified_diffusers.bundled_checkpoint() == folder


def test_the_stored_picture_is_the_bundled_models():
    """`.ci/run` compares the releases with it at its end: stale, it is noticed here first."""
    releases = runpy.run_path(str(ROOT / ".ci" / "releases.py"), run_name="releases")
    assert releases["compare"]([]) <= releases["TOLERANCE"]


def stated_versions() -> dict[str, dict[str, str]]:
    """Read the table of supported versions off the docs: the packages of each row."""
    page = (ROOT / "docs" / "features.md").read_text(encoding="utf-8").partition("## Supported versions")[2]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*", page, re.M)
    ]
    return {row[0]: dict(zip(head[2:], row[2:], strict=True)) for row in rows}


def test_the_lowest_versions_are_those_that_are_installed_by_ci():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    bounds = dict(re.findall(r"^([\w-]+)>=([\w.]+)", config["options"]["install_requires"], flags=re.MULTILINE))
    lowest = stated_versions()["lowest"]
    assert {name: Version(bounds[name]) for name in lowest} == {name: Version(lowest[name]) for name in lowest}


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="newer Pythons get newer releases")
def test_what_is_stated_for_python_3_10_is_what_it_gets():
    """A newer release for 3.10, or a lower one, wants its line in the table; the lowest set is no question here."""
    installed = {name: Version(importlib.metadata.version(name)) for name in ("diffusers", "transformers")}
    rows = [stated_versions()[name] for name in ("newest on Python 3.10", "lowest")]
    assert installed in [{name: Version(row[name]) for name in installed} for row in rows]
