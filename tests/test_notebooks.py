"""The notebooks: each runs, in few steps here, and is stored with its outputs, small and without errors."""

import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebooks need nbclient, ipykernel and matplotlib")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 500_000
QUICK = {
    "two_dimensional_toy": {"STEPS": "2"},
    "emoji_path": {"TRIPLETS": "16", "STEPS": "2"},
    "lora_and_controlnet": {"LORA_STEPS": "2", "CONTROLNET_STEPS": "2"},
}


def name_of(file: Path) -> str:
    return file.stem


def test_every_notebook_is_tested():
    assert {file.stem for file in NOTEBOOKS} == set(QUICK)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name_of)
def test_outputs_are_stored_and_small(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from the top: execute.py"
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert file.stat().st_size < MAX_BYTES


@pytest.mark.very_slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=name_of)
def test_notebook_runs(file, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    sys.modules.pop("execute", None)
    from execute import execute  # pyright: ignore[reportMissingImports]

    before = file.read_bytes()
    notebook = execute(file, QUICK[file.stem])
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))
    assert file.read_bytes() == before


def test_a_parameter_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    sys.modules.pop("execute", None)
    from execute import execute  # pyright: ignore[reportMissingImports]

    with pytest.raises(ValueError, match="no parameter 'STEP'"):
        execute(FOLDER / "two_dimensional_toy.ipynb", {"STEP": "2"})
