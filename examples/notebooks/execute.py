"""Run the notebooks again and keep their outputs, as small as they can be.

    python examples/notebooks/execute.py [--set NAME=VALUE ...] [NOTEBOOK ...]

Progress bars and warnings are not kept, and of a picture only the PNG. `--set` changes the parameters in a notebook's
first code cell for a quick look; then nothing is written. Needs `pip install nbclient ipykernel matplotlib`.
"""

import argparse
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
ALL = ("two_dimensional_toy", "emoji_path", "lora_and_controlnet")


def execute(file: Path, parameters: dict[str, str], timeout: float = 3600) -> nbformat.NotebookNode:
    """Run a notebook in its folder and return it with its outputs; an error in a cell is raised."""
    notebook = nbformat.read(file, as_version=4)
    settings = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in parameters.items():
        settings.source, found = re.subn(rf"^{name} = \d+", f"{name} = {value}", settings.source, flags=re.MULTILINE)
        if not found:
            raise ValueError(f"{file.name} has no parameter {name!r}; it has:\n{settings.source}")
    os.environ.setdefault("TQDM_DISABLE", "1")
    resources = {"metadata": {"path": str(file.parent)}}
    NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources=resources, record_timing=False
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)
    notebook.metadata.pop("widgets", None)
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help=f"of {', '.join(ALL)} (default: all)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="parameters; nothing is written then"
    )
    arguments = parser.parse_args()
    parameters = dict(text.split("=", 1) for text in arguments.set)
    for name in arguments.notebooks or ALL:
        file = HERE / f"{name}.ipynb"
        notebook = execute(file, parameters)
        if not parameters:
            nbformat.write(notebook, file)
        print(f"{file.name}: ran")


if __name__ == "__main__":
    main()
