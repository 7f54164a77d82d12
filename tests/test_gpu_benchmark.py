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


BUDGET, HANGING = 1200.0, 300.0  # seconds for all parts, and for one
SLEEP = "[time.sleep(0.1) for _ in range(6000) if not output.with_name('end').exists()]"


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


def run(gpu: Any, parts: list[Any], folder: Path, budget: float = BUDGET) -> dict[str, Any]:
    gpu.run(parts, gpu.Results(folder), budget)
    return json.loads((folder / "results.json").read_text())["parts"]


def test_a_part_that_fails_or_hangs_leaves_what_it_measured_and_the_rest_goes_on(
    gpu, make_part, tmp_path, monkeypatch
):
    """The time of the part that hangs is over once it has written its results, however busy the machine is."""
    wait = subprocess.Popen.wait

    def wait_for_results(process: subprocess.Popen, seconds: float | None = None) -> int:
        while seconds == HANGING and not (folder / "written").exists():
            time.sleep(0.02)
        return wait(process, 0.02 if seconds == HANGING else seconds)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_results)
    folder = tmp_path / "out"
    parts = [
        make_part("failing", "write(a=1); raise ValueError('out of luck')"),
        make_part("hanging", f"write(b=2); output.with_name('written').touch(); {SLEEP}", share=HANGING / BUDGET),
        make_part("good", "write(c=3)"),
    ]
    found = run(gpu, parts, folder)
    (folder / "written").unlink()
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
    found = run(gpu, [make_part("part", "write(a=2)", least=10_000)], tmp_path)
    assert found["part"]["status"].startswith("skipped")
    assert found["part"]["results"] == {"a": 1}


def test_a_command_that_was_killed_leaves_what_its_part_had_measured(gpu, make_part, tmp_path):
    part = make_part("part", f"write(a=1); {SLEEP}")
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
        (folder / "end").touch()
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


# ---------------------------------------------------------------------------------------------- the parts themselves


STAGES = ("text", "text again", "U-Net", "decoder", "bytes")


def arguments(script: Any, *words: str) -> Any:
    return script.parse_arguments(["--small", *words])


@pytest.mark.slow
def test_latency_draws_and_times_its_stages(monkeypatch):
    latency = load(monkeypatch, "latency")
    for model, names in (("sd15", ("eager", "tiny", "sd")), ("stacked", ("fast",)), ("sdxl", ("eager",))):
        args = arguments(latency, "--model", model, "--threads", "1")
        measured = {"float32": (1e9, 1e9), "half": (1e9, 1e9)}
        rows = {}
        for name in names:
            way = latency.Way(args, name)
            rows[name] = {"first": None, "whole": [way.whole(2)], "stages": [], "memory": 0.0}
            if name != "sd":
                rows[name]["stages"] = [way.stages(2)]
                rows[name]["floor"] = latency.floor(args, name, 2, measured)
        rows["broken"] = {"whole": [], "error": "OutOfMemoryError: too much"}
        text = "\n".join(latency.as_markdown({"sizes": {2: rows}, "rates": measured}, args))
        assert all(f"| {name} |" in text for name in names)
        assert "broken failed: OutOfMemoryError: too much" in text


def test_the_report_compares_the_shortest_times_with_openvinos(monkeypatch):
    latency = load(monkeypatch, "latency")
    rows = {
        name: {"first": None, "whole": [3.0], "memory": 1.0, "stages": [dict.fromkeys(STAGES, time) for time in times]}
        for name, times in {"fast": (3.0, 2.0), "openvino": (1.0, 9.0), "tiny": (1.0,)}.items()
    }
    text = "\n".join(latency.as_markdown({"sizes": {1: rows}, "rates": {}}, arguments(latency)))
    assert "- fast, U-Net: 2.000 s, OpenVINO 1.000 s, speed 0.50 of OpenVINO's" in text
    assert "- fast, decoder: " in text
    assert "tiny, U-Net" not in text, "OpenVINO's was not measured"


class Answers:
    """In place of a process: what its end of the pipe would give."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def send(self, question: Any) -> None:
        pass

    def recv(self) -> Any:
        if not self.answers:
            raise EOFError
        return self.answers.pop(0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_way_that_fails_leaves_the_others_alone(monkeypatch, device):
    latency = load(monkeypatch, "latency")
    args = arguments(latency, "--device", device, "--rounds", "1", "--warm-up", "1")
    ways = object.__new__(latency.Ways)
    good = Answers(9.0, {"text": 1.0}, 2.0, {"text": 1.0}, 0.5)
    ways.ends = {"eager": good, "fast": Answers({"error": "OutOfMemoryError: x"}), "tiny": Answers(8.0)}
    ways.errors = {}
    rows = {name: {"first": None, "whole": [], "stages": []} for name in ways.ends}
    saved = []
    latency.take_turns(args, ways, 1, rows, lambda: saved.append(json.dumps(rows)))
    assert rows["eager"] == {"first": 9.0, "whole": [2.0], "stages": [{"text": 1.0}], "memory": 0.5}
    assert rows["fast"]["error"] == "OutOfMemoryError: x"
    assert rows["tiny"]["error"] == "its process ended without a word"
    assert len(saved) == 2


@pytest.mark.slow
def test_training_beside_a_bare_loop_with_and_without_checkpointing(monkeypatch):
    training = load(monkeypatch, "training")
    monkeypatch.setattr(training, "peak_memory", lambda *_: 2**20)
    words = ["--model", "sd15", "--mixed-precision", "bf16", "--gradient-checkpointing", "off", "on", "--no-save"]
    args, results = arguments(training, *words, "--batch-size", "2", "--steps", "1"), {}
    training.measure(args, results, lambda: training.as_markdown(args, results))
    assert results["operations"] > 0
    assert results["peak"] > 0
    for found in results["checkpointing"].values():
        assert all(found[name]["seconds"][0] > 0 for name in training.LOOPS)
    assert "Gradient checkpointing on:" in "\n".join(training.as_markdown(args, results))


def test_triplets_beside_a_bare_loop(monkeypatch, tmp_path):
    triplets = load(monkeypatch, "triplets")
    monkeypatch.setattr(triplets, "peak_of", lambda _: 1.0)
    words = ["--teacher", "sd15", "--small", "--triplets", "2", "--batch", "2", "--steps", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["triplets.py", *words, "--output", str(tmp_path / "part")])
    triplets.main()
    found = json.loads((tmp_path / "part.json").read_text())
    assert all(found[way]["triplets_per_s"] > 0 for way in triplets.WAYS)


@pytest.mark.slow
def test_outcomes_of_tests_are_kept_one_by_one(monkeypatch, tmp_path):
    gpu_tests = load(monkeypatch, "gpu_tests")
    code = "import pytest\ndef test_good(): pass\ndef test_bad(): assert 'this' == 'that'\n"
    (tmp_path / "test_it.py").write_text(f"{code}def test_skipped(): pytest.skip('no GPU')\n")
    counts = []
    recorder = gpu_tests.Recorder(lambda: counts.append(len(recorder.tests)))
    words = ["-q", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path / "test_it.py")]
    assert pytest.main(words, plugins=[recorder]) == 1
    assert counts == [1, 2, 3]
    assert [row["outcome"] for row in recorder.tests] == ["passed", "failed", "skipped"]
    text = "\n".join(gpu_tests.as_markdown("gpu", recorder.tests))
    assert "1 passed, 1 failed, 1 skipped" in text
    assert "'this' == 'that'" in text
    assert str(BENCHMARKS.parent / "tests" / "test_gpu.py") in gpu_tests.files_with("gpu")


@pytest.mark.very_slow
def test_the_whole_command_in_a_rehearsal(tmp_path):
    words = [
        "--device",
        "cpu",
        "--small",
        "--output",
        str(tmp_path),
        "--only",
        "latency of sd15, batch 1",
        "cold start",
    ]
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *words]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    state = json.loads((tmp_path / "results.json").read_text())
    assert {name: part["status"] for name, part in state["parts"].items()} == {
        "latency of sd15, batch 1": "done",
        "latency of sd15, batch 1, optimized": "done",
        "cold start": "done",
    }
    assert {"GPU, driver, memory", "commit", "date", "command", "versions"} <= state["runs"][0].keys()
    assert len(list(tmp_path.iterdir())) <= 8
