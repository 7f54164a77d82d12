"""The package itself: public names, loaded on first use, and the bundled checkpoint's folder."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

import rectified_diffusers


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'accelerate'}"
    code = f"import rectified_diffusers, sys; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", rectified_diffusers.__all__)
def test_public_names_exist(name):
    assert getattr(rectified_diffusers, name) is not None
    assert name in dir(rectified_diffusers)


def test_public_names_load_from_the_modules_that_the_type_checker_sees():
    package = Path(rectified_diffusers.__file__)
    (block,) = (node for node in ast.parse(package.read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == rectified_diffusers._MODULES
    assert sorted(rectified_diffusers.__all__) == rectified_diffusers.__all__
    assert set(seen) <= set(rectified_diffusers.__all__)


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
