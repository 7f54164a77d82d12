"""The command line: what it draws, what it refuses and how, and that --help does not load torch."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rectified_diffusers import cli
from rectified_diffusers.cli import generate as generate_command
from rectified_diffusers.cli import triplets as triplets_command
from tests.tiny import make_tiny_pipeline

SIZE = 32  # pixels of the tiny pipeline's pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_pipeline("flow").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    make_tiny_pipeline("diffusion").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def refused(capsys):
    """Run a command that must end in exit code 2 and one line on stderr, and return that line."""

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert captured.out == ""
        assert lines[-1].startswith("rectified-diffusers: error: ")
        assert "Traceback" not in captured.err
        assert len(lines) == 1, captured.err
        return lines[0].removeprefix("rectified-diffusers: error: ")

    return run


def generate(model: str, output: Path, *arguments: str) -> np.ndarray:
    assert cli.main(["generate", *arguments, "-o", str(output), "--model", model, "--device", "cpu"]) == 0
    return np.asarray(Image.open(output).convert("RGB"))


# ---------------------------------------------------------------------------------------------- without torch


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("generate", "triplets", "reflow")),
        *(
            pytest.param([name, "--help"], marks=pytest.mark.slow)
            for name in ("interpolate", "real-triplets", "delta", "export", "distill", "progressive", "dmd")
        ),
    ],
    ids=" ".join,
)
def test_help_answers_without_torch(arguments):
    code = (
        "import sys\n"
        "from rectified_diffusers.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    source = str(Path(cli.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source}
    )
    assert result.returncode == 0, result.stderr
    assert "rectified-diffusers" in result.stdout
    assert result.stderr == ""


def test_help_shows_the_text_of_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["reflow", "--help"])
    text = capsys.readouterr().out
    assert "--time-density {uniform,logit_normal,u_shaped}" in text
    assert "(default: uniform)" in text


# ---------------------------------------------------------------------------------------------- generate


def test_generate_writes_one_picture_and_says_so(model, tmp_path, capsys):
    picture = generate(model, tmp_path / "apple.png", "a red apple")
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.std() > 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'apple.png'}: 1 image in ")


@pytest.mark.parametrize(
    ("arguments", "rows", "columns"),
    [
        (["a fox", "--num-images", "4"], 2, 2),
        (["a fox", "--num-images", "3"], 2, 2),
        (["a fox", "--num-images", "3", "--columns", "3"], 1, 3),
        (["a fox", "an owl", "a cat", "a dog", "a cow"], 2, 3),
        (["a fox", "an owl", "--num-images", "3"], 2, 3),
        (["a fox", "an owl", "--columns", "5"], 1, 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_several_pictures_make_a_contact_sheet(model, tmp_path, arguments, rows, columns):
    sheet = generate(model, tmp_path / "sheet.png", *arguments)
    assert sheet.shape == (rows * SIZE, columns * SIZE, 3)


def test_advice_to_install_torchvision_is_not_shown(model, tmp_path):
    """A plain installation has none, and transformers says so for each class of pictures that diffusers imports."""
    generate(model, tmp_path / "apple.png", "a red apple")
    logger = logging.getLogger("transformers.utils.import_utils")
    shown = [
        bool(logger.filter(logging.LogRecord("", logging.WARNING, "", 0, text, None, None)))
        for text in ("`CLIPImageProcessor` requires torchvision (not installed); falling back", "another warning")
    ]
    assert shown == [False, True]


def test_the_last_row_is_filled_up_with_white(model, tmp_path):
    sheet = generate(model, tmp_path / "sheet.png", "a fox", "--num-images", "3")
    assert (sheet[SIZE:, SIZE:] == 255).all()
    assert not (sheet[SIZE:, :SIZE] == 255).all()


def test_a_picture_depends_on_its_prompt_and_seed_alone(model, tmp_path):
    sheet = generate(model, tmp_path / "sheet.png", "a fox", "an owl", "--num-images", "2", "--seed", "7")
    for row, prompt in enumerate(["a fox", "an owl"]):
        for column in range(2):
            alone = generate(model, tmp_path / "alone.png", prompt, "--seed", str(7 + column))
            there = sheet[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
            np.testing.assert_array_equal(there, alone)
    assert (sheet[:SIZE, :SIZE] != sheet[:SIZE, SIZE:]).any(), "two seeds, one picture"
    assert (sheet[:SIZE] != sheet[SIZE:]).any(), "two prompts, one picture"


def test_generate_equals_the_pipeline_called_by_hand(model, tmp_path):
    import torch

    picture = generate(
        model,
        *(tmp_path / "a.png", "a fox", "--steps", "3", "--guidance-scale", "2", "--negative-prompt", "red"),
        *("--seed", "5", "--height", "48", "--width", "64"),
    )
    pipeline: Any = make_tiny_pipeline("flow")
    expected = pipeline(
        "a fox",
        negative_prompt="red",
        num_inference_steps=3,
        guidance_scale=2.0,
        height=48,
        width=64,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    np.testing.assert_array_equal(picture, np.asarray(expected))


def test_generate_draws_with_a_diffusion_model_too(teacher, tmp_path):
    assert generate(teacher, tmp_path / "a.png", "a fox", "--steps", "3").shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_in_a_dtype(model, tmp_path, dtype):
    assert generate(model, tmp_path / "a.jpg", "a fox", "--dtype", dtype).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "a prompt is empty"),
        (["a fox", "  "], "a prompt is empty"),
        (["a fox", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["a fox", "--num-images", "0"], "--num-images must be at least 1, got 0"),
        (["a fox", "--columns", "0"], "--columns must be at least 1, got 0"),
        (["a fox", "--steps", "one"], "argument --steps: invalid int value: 'one'"),
        (["a fox", "--seed", "-1"], "--seed must be between 0 and"),
        (["a fox", "--seed", str(2**63)], "--seed must be between 0 and"),
        (["a fox", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["a fox", "--guidance-scale", "nan"], "--guidance-scale must be finite"),
        (["a fox", "--guidance-scale", "-1"], "--guidance-scale must be finite and not negative"),
        (["a fox", "--negative-prompt", "red"], "--negative-prompt has no effect without guidance"),
        (["a fox", "--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["a fox", "--device", "abacus"], "no device 'abacus' here"),
        (["a fox", "--height", "64"], "--height and --width go together"),
        (["a fox", "--height", "33", "--width", "64"], "have to be divisible by 8 but are 33 and 64"),
        (["a fox", "--model", "no-such-folder"], "no folder 'no-such-folder', and it is no Hub id"),
        (["a fox", "--model", "./no/folder"], "no folder './no/folder'"),
        (["a fox", "--model", ""], "holds no model_index.json"),
        ([], "the following arguments are required: PROMPT"),
        (["a fox", "--sede", "1"], "unrecognized arguments: --sede 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_generate_refuses(model, tmp_path, refused, arguments, message):
    chosen = [] if "--model" in arguments else ["--model", model]
    assert message in refused("generate", *arguments, "-o", str(tmp_path / "a.png"), *chosen)
    assert list(tmp_path.iterdir()) == []


def test_a_model_folder_that_is_no_pipeline_is_refused(tmp_path, refused):
    line = refused("generate", "a fox", "-o", str(tmp_path / "a.png"), "--model", str(tmp_path))
    assert "holds no model_index.json" in line


def test_a_hub_id_that_cannot_be_had_is_one_line(tmp_path, refused):
    """The tests run with HF_HUB_OFFLINE=1, so nothing is asked."""
    assert "nobody/nothing" in refused("generate", "a fox", "-o", str(tmp_path / "a.png"), "--model", "nobody/nothing")


@pytest.fixture
def no_work(monkeypatch):
    """Fail if a command gets as far as loading a model."""

    def load(*_):
        pytest.fail("the output has to be checked before the work")

    for module in (generate_command, triplets_command):
        monkeypatch.setattr(module, "load_pipeline", load)


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.h5", "a.txt"])
def test_a_suffix_that_is_no_picture_is_refused_before_the_work(tmp_path, refused, no_work, model, name):
    line = refused("generate", "a fox", "-o", str(tmp_path / name), "--model", model)
    assert f"cannot write an image with the suffix {Path(name).suffix!r}" in line
    assert "use .png" in line


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, refused, no_work, model):
    def line(output: str | Path) -> str:
        return refused("generate", "a fox", "-o", str(output), "--model", model)

    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    assert "is a folder" in line(tmp_path / "folder.png")
    assert "does not exist; make it first" in line(tmp_path / "missing" / "a.png")
    assert "does not exist; make it first" in line(tmp_path / "file" / "a.png")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that even root cannot write to")
def test_a_folder_without_permission_is_refused_before_the_work(refused, no_work, model):
    assert "cannot write to the folder '/proc'" in refused("generate", "a fox", "-o", "/proc/a.png", "--model", model)


def test_checking_the_output_leaves_an_existing_file_alone(tmp_path, refused, model):
    output = tmp_path / "a.png"
    output.write_bytes(b"precious")
    refused("generate", "a fox", "-o", str(output), "--model", "no-such-folder")
    assert output.read_bytes() == b"precious"


# ---------------------------------------------------------------------------------------------- training


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\n\nan owl\n", encoding="utf-8")
    return str(path)


def test_triplets_reflow_distill_and_generate_in_a_row(teacher, prompts, tmp_path, capsys):
    triplets, reflowed, distilled = (str(tmp_path / name) for name in ("triplets", "reflowed", "distilled"))
    make = ["triplets", "--teacher", teacher, "--prompts", prompts, "--output", triplets, "--num-triplets", "4"]
    assert cli.main([*make, "--num-inference-steps", "2", "--batch-size", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{triplets}: 4 triplets\n"
    train = ["--triplets", triplets, "--max-steps", "2", "--batch-size", "2", "--mixed-precision", "no"]
    assert cli.main(["reflow", "--model", teacher, "--output", reflowed, *train]) == 0
    told = capsys.readouterr()
    assert told.out == f"{reflowed}: trained to step 2\n"
    assert "Writing model shards" not in told.err
    assert cli.main(["distill", "--model", reflowed, "--output", distilled, *train]) == 0
    assert json.loads(Path(distilled, "model_index.json").read_text())["_class_name"]
    assert generate(distilled, tmp_path / "a.png", "a fox").shape == (SIZE, SIZE, 3)


def test_triplets_refuses(teacher, prompts, tmp_path, refused):
    def line(**changed: str) -> str:
        given = {"teacher": teacher, "prompts": prompts, "output-dir": str(tmp_path / "out"), "num-triplets": "4"}
        return refused(
            "triplets", *(word for name, value in {**given, **changed}.items() for word in (f"--{name}", value))
        )

    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Käse".encode("latin-1"))
    assert "There is no prompt file" in line(prompts=str(tmp_path / "missing.txt"))
    assert "holds no prompt;" in line(prompts=str(empty))
    assert "not UTF-8" in line(prompts=str(latin))
    assert "no folder 'missing'" in line(teacher="missing")
    assert "is a file" in line(**{"output-dir": prompts})
    assert "num_triplets must be" in line(**{"num-triplets": "0"})
    assert "argument --solver: invalid choice: 'magic'" in line(solver="magic")


@pytest.mark.parametrize("command", ["reflow", "distill"])
def test_training_refuses(command, teacher, tmp_path, refused):
    given = ["--model", teacher, "--output-dir", str(tmp_path / "out")]
    missing = str(tmp_path / "missing")
    assert f"no folder '{missing}'; make it with rectified-diffusers triplets" in refused(
        command, *given, "--triplets", missing
    )
    assert "max_steps must be at least 1, got 0" in refused(command, *given, "--triplets", missing, "--max-steps", "0")
    assert "the following arguments are required: --triplets" in refused(command, *given)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- how it ends


def test_an_unknown_command_is_refused(refused):
    assert "invalid choice: 'genrate'" in refused("genrate")
    assert "required: command" in refused()


def end_with(monkeypatch, error: BaseException, *arguments: str) -> int:
    def load(*_):
        raise error

    for module in (generate_command, triplets_command):
        monkeypatch.setattr(module, "load_pipeline", load)
    return cli.main(arguments)


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys, tmp_path, prompts):
    output = str(tmp_path / "out")
    command = ["triplets", "--teacher", "x/y", "--prompts", prompts, "--output-dir", output, "--num-triplets", "4"]
    assert end_with(monkeypatch, KeyboardInterrupt(), *command) == 130
    assert capsys.readouterr().err == "\nstopped; run the same command to continue\n"
    assert (
        end_with(monkeypatch, KeyboardInterrupt(), "generate", "a fox", "-o", f"{output}.png", "--model", "x/y") == 130
    )
    assert capsys.readouterr().err == "\nstopped\n"


def test_errors_of_the_user_are_one_line_and_bugs_have_a_traceback(monkeypatch, capsys, tmp_path):
    arguments = ["generate", "a fox", "-o", str(tmp_path / "a.png"), "--model", "x/y"]
    assert end_with(monkeypatch, ValueError("two\n  lines"), *arguments) == 2
    assert capsys.readouterr().err == "rectified-diffusers: error: two lines\n"
    with pytest.raises(ValueError, match="two"):
        end_with(monkeypatch, ValueError("two"), *arguments, "--debug")
    with pytest.raises(KeyError):
        end_with(monkeypatch, KeyError("bug"), *arguments)
