"""`benchmarks/gpu.py` with parts of a few lines: budget, resuming, failures, time limits; and its real parts."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WRITE = """
import json, pathlib, sys, time
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
def write(**found):
    output.with_suffix(".json").write_text(json.dumps(found))
    output.with_suffix(".md").write_text("# Found\\n\\n" + str(found))
"""


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """Import a script as it is imported when it runs, from its folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for each in ("machine", "models", "triplet_memory"):
        monkeypatch.delitem(sys.modules, each, raising=False)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def gpu(monkeypatch):
    return load(monkeypatch, "gpu")


@pytest.fixture
def make_part(gpu, tmp_path):
    def make(name: str, code: str, **options: Any) -> Any:
        script = tmp_path / f"{name}.py"
        script.write_text(WRITE + code)
        return gpu.Part(name, (str(script),), **{"least": 0.1, **options})

    return make


def run(gpu: Any, parts: list[Any], folder: Path, budget: float = 60) -> dict[str, Any]:
    gpu.run(parts, gpu.Results(folder), budget)
    return json.loads((folder / "results.json").read_text())["parts"]


def test_a_part_that_fails_or_hangs_leaves_what_it_measured_and_the_rest_goes_on(gpu, make_part, tmp_path):
    parts = [
        make_part("failing", "write(a=1); raise ValueError('out of luck')"),
        make_part("hanging", "write(b=2); time.sleep(600)", share=0.05),
        make_part("good", "write(c=3)"),
    ]
    folder = tmp_path / "out"
    found = run(gpu, parts, folder)
    assert [found[part.name]["status"] for part in parts] == ["failed", "over time", "done"]
    assert [found[part.name]["results"] for part in parts] == [{"a": 1}, {"b": 2}, {"c": 3}]
    assert "ValueError: out of luck" in found["failing"]["error"]
    assert "### Found" in (folder / "report.md").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["log.txt", "report.md", "results.json"]


def test_a_finished_part_is_not_run_again(gpu, make_part, tmp_path):
    count = tmp_path / "count"
    counting = f"pathlib.Path({str(count)!r}).open('a').write('x'); "
    good, broken = make_part("good", counting + "write(a=1)"), make_part("broken", "write(a=1); sys.exit(3)")
    run(gpu, [good, broken], tmp_path / "out")
    mended = make_part("broken", counting + "write(a=2)")
    found = run(gpu, [good, mended], tmp_path / "out")
    assert count.read_text() == "xx"
    assert found["broken"]["status"] == "done"
    assert "error" not in found["broken"]
    assert found["broken"]["results"] == {"a": 2}


def test_a_part_that_has_too_little_time_is_skipped_and_keeps_what_it_had(gpu, make_part, tmp_path):
    run(gpu, [make_part("part", "write(a=1); sys.exit(3)")], tmp_path)
    found = run(gpu, [make_part("part", "write(a=2)", least=1000)], tmp_path)
    assert found["part"]["status"].startswith("skipped")
    assert found["part"]["results"] == {"a": 1}


def test_a_command_that_was_killed_leaves_what_its_part_had_measured(gpu, make_part, tmp_path):
    part = make_part("part", "write(a=1); time.sleep(10)")
    folder = tmp_path / "out"
    code = f"import gpu; gpu.run([{part!r}], gpu.Results(gpu.Path({str(folder)!r})), 60)"
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from gpu import Part; {code}"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not (folder / "part.md").exists():
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    found = gpu.Results(folder).state["parts"]["part"]
    assert (found["status"], found["results"]) == ("stopped", {"a": 1})


def test_the_parts_of_a_gpu_are_in_order_and_have_arguments_that_their_scripts_know(gpu, monkeypatch):
    parts = gpu.parts_of(gpu.parse_arguments([]))
    names = [part.name for part in parts]
    assert names[:2] == ["tests", "latency of sd15, batch 1"]
    assert names.index("training") < names.index("latency of sd15, batch 8") < names.index("latency of sdxl, batch 1")
    assert parts[0].share == 0.2
    for part in parts:
        script = Path(part.words[0]).stem
        if script in ("latency", "training", "triplets"):
            args = load(monkeypatch, script).parse_arguments(list(part.words[1:]))
            assert args.device == "cuda"
