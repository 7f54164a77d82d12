"""The command `demo` and what the commands share with it: refusals before any work, --json, completion."""

import json
import shutil
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from rectified_diffusers import cli
from rectified_diffusers.cli import demo as demo_command
from rectified_diffusers.demo.requests import comparison_with
from rectified_diffusers.demo.worker import LoadingStudio, StudioProcess
from tests.forks import forked_studios
from tests.tiny import make_tiny_controlnet, make_tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_pipeline("flow").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port must be from 1 to 65535"),
        (["--teacher-steps", "0"], "--teacher-steps must be from 1 to 50"),
        (["--teacher-guidance-scale", "-1"], "--teacher-guidance-scale must be from 0 to 20"),
        (["--teacher-guidance-scale", "nan"], "--teacher-guidance-scale must be from 0 to 20"),
        (["--style", "nowhere.safetensors"], "no style file 'nowhere.safetensors'"),
        (["--style", "nowhere.safetensors=x"], "the scale of a style must be a number"),
        (["--model", "no/where/at all"], "no folder"),
        (["--teacher", "no/where/at all"], "no folder"),
        (["--controlnet", "no/where/at all"], "no folder"),
        (["--controlnet", "tests"], "the folder 'tests' holds no config.json, so it is no saved ControlNet"),
        (["--auth", "ann"], "--auth takes USER:PASSWORD, or @FILE"),
        (["--auth", ":secret"], "--auth takes USER:PASSWORD"),
        (["--auth", "ann:"], "--auth takes USER:PASSWORD"),
        (["--auth", "@setup.cfg"], "--auth takes USER:PASSWORD"),
        (["--auth", "@nowhere"], "--auth cannot read 'nowhere'"),
        (["--style", "setup.cfg"], "a style is a .safetensors file, got 'setup.cfg'"),
    ],
)
def test_mistakes_are_told_before_any_work(arguments, message, capsys):
    assert cli.main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_gradio_the_remedy_is_told(monkeypatch, capsys):
    monkeypatch.setattr(demo_command.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert 'pip install "rectified_diffusers[demo]"' in capsys.readouterr().err


def test_the_models_of_the_arguments_are_served(model, tmp_path, monkeypatch):
    served = []

    @contextmanager
    def serve(studio, styles, arguments, auth):
        yield
        served.append((studio, studio.about(), arguments, auth))

    monkeypatch.setattr(demo_command, "_served", serve)
    monkeypatch.setattr(StudioProcess, "wait", lambda self: None)
    make_tiny_controlnet(make_tiny_pipeline("flow").unet).save_pretrained(tmp_path / "controlnet")
    options = ["--teacher", model, "--teacher-steps", "3", "--controlnet", str(tmp_path / "controlnet")]
    (tmp_path / "auth").write_text("ann:se:cret\nmore\n")
    options += ["--auth", f"@{tmp_path / 'auth'}", "--allow-host", "a.example", "--allow-host", "b.example"]
    with forked_studios():
        assert cli.main(["demo", "--model", model, "--device", "cpu", *options]) == 0
    ((studio, about, arguments, auth),) = served
    assert studio.comparison.steps == 3
    assert studio.can_sketch
    assert studio.name == Path(model).name
    assert arguments.host == "127.0.0.1"
    assert arguments.allow_hosts == ("a.example", "b.example")
    assert auth == ("ann", "se:cret")
    assert about.startswith(f"{Path(model).name} · 0 M weights")


def after(monkeypatch, first, second) -> None:
    """Let what `second` names, an owner and its function, begin after a call of what `first` names has ended."""
    done, signal, wait = threading.Event(), getattr(*first), getattr(*second)

    def signals(*args, **kwargs):
        try:
            return signal(*args, **kwargs)
        finally:
            done.set()

    def waits(*args, **kwargs):
        assert done.wait(300)
        return wait(*args, **kwargs)

    monkeypatch.setattr(*first, signals)
    monkeypatch.setattr(*second, waits)


@pytest.mark.parametrize("served_first", [True, False])
def test_a_model_that_cannot_be_loaded_ends_the_page(model, tmp_path, monkeypatch, capsys, served_first):
    """Before the page is served, too; its address is then not printed."""
    pytest.importorskip("gradio", reason='the page needs gradio: pip install "rectified_diffusers[demo]"')
    from rectified_diffusers.demo import page

    loading = (StudioProcess, "_load")
    if served_first:
        after(monkeypatch, (demo_command, "print_result"), loading)
    else:
        after(monkeypatch, loading, (page, "build_page"))
    torn = tmp_path / "torn"
    shutil.copytree(model, torn)
    weights = torn / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with forked_studios():
        assert cli.main(["demo", "--model", str(torn), "--device", "cpu", "--port", "0", "--json"]) == 2
    told = capsys.readouterr()
    assert "error:" in told.err
    assert bool(told.out) == served_first
    if served_first:
        with pytest.raises(OSError):
            urllib.request.urlopen(json.loads(told.out)["address"], timeout=300)


@pytest.mark.parametrize(
    ("host", "auth", "warning"),
    [
        ("127.0.0.1", None, ""),
        ("0.0.0.0", None, "warning: everyone who can reach this address"),
        ("0.0.0.0", ("ann", "secret"), "warning: the password travels unencrypted"),
    ],
)
def test_a_page_that_others_can_reach_warns(host, auth, warning, capsys):
    pytest.importorskip("gradio", reason='the page needs gradio: pip install "rectified_diffusers[demo]"')
    studio = LoadingStudio("no model", comparison_with(False, 8, 1.0), Future(), can_sketch=False)
    with demo_command._served(studio, [], demo_command.DemoOptions(host=host, port=0), auth):
        told = capsys.readouterr()
    assert told.err.startswith(warning)
    assert bool(told.err) == bool(warning)


@pytest.mark.slow
def test_the_page_is_served_without_waiting_for_torch():
    pytest.importorskip("gradio", reason='the page needs gradio: pip install "rectified_diffusers[demo]"')
    code = "import sys, rectified_diffusers.demo.page; assert not {'torch', 'diffusers'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_json_says_what_the_line_says(model, tmp_path, capsys):
    picture = tmp_path / "fox.png"
    command = ["generate", "a fox", "-o", str(picture), "--model", model, "--device", "cpu"]
    assert cli.main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"output": str(picture), "pictures": 1, "seconds": told["seconds"]}
    animation = ["interpolate", "a fox", "a dog", "--frames", "2", "--model", model, "--device", "cpu", "--json"]
    assert cli.main([*animation, "-o", str(tmp_path / "a.gif"), "-o", str(tmp_path / "a.png")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["output"] for line in lines] == [str(tmp_path / "a.gif"), str(tmp_path / "a.png")]
    assert {line["pictures"] for line in lines} == {3}


def test_delta_has_json_too(model, tmp_path, capsys):
    file = tmp_path / "delta.safetensors"
    command = ["delta", "make", "--fine-tune", model, "--base", model, "-o", str(file), "--json"]
    assert cli.main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["output"] == str(file)
    assert told["weights"] > 0


def test_help_answers_without_torch_and_gradio():
    code = (
        "import sys\n"
        "from rectified_diffusers.cli import build_parser\n"
        "try:\n"
        "    build_parser().parse_args(['demo', '--help'])\n"
        "except SystemExit:\n"
        "    assert not {'torch', 'diffusers', 'numpy', 'PIL', 'gradio', 'shtab'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--controlnet" in result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command(shell, capsys):
    pytest.importorskip("shtab", reason="completion needs shtab")
    with pytest.raises(SystemExit) as end:
        cli.main(["--print-completion", shell])
    assert end.value.code == 0
    script = capsys.readouterr().out
    assert all(command in script for command in ("generate", "interpolate", "demo", "triplets", "reflow", "distill"))
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert "--guidance-scale" in script


def test_completion_without_its_package_says_which(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["--print-completion", "bash"]) == 2
    assert "completion needs shtab: pip install shtab" in capsys.readouterr().err
