"""Bad arguments of every command: exit code 2 and one line that names the option, before anything is loaded."""

import argparse
from collections.abc import Iterator
from functools import cache

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from rectified_diffusers import cli
from tests.marks import slow_but
from tests.training.helpers import make_dataset

NUMBERS = ("int", "float")


@cache
def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of every command, of `delta` those of its own commands, by the words that call it."""
    return dict(_below(cli.build_parser(), ""))


def _below(parser: argparse.ArgumentParser, words: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield words.strip(), parser
    for group in groups:
        for name, inner in group.choices.items():
            yield from _below(inner, f"{words} {name}")


def options() -> list[tuple[str, str, str]]:
    """List every option that takes a number or one of some words: command, option, its kind."""
    found = []
    for words, parser in commands().items():
        for action in parser._actions:
            kind = getattr(action.type, "__name__", "")
            if action.option_strings and (kind in NUMBERS or action.choices):
                found.append((words, action.option_strings[-1], kind))
    return found


def first_options() -> list[tuple[str, str, str]]:
    """List each option of the same name and kind once."""
    return list({(option, kind): (words, option, kind) for words, option, kind in reversed(options())}.values())


def filled(words: str) -> list[str]:
    """Return a command with all that it requires, none of which is there."""
    arguments, parser = words.split(), commands()[words]
    one_of = [group._group_actions[0] for group in parser._mutually_exclusive_groups if group.required]
    for action in parser._actions:
        if action.required or action in one_of:
            value = str(next(iter(action.choices))) if action.choices else "1"
            arguments += [*action.option_strings[-1:], value]
    return arguments


@pytest.fixture
def refused(capsys):
    def run(arguments: list[str]) -> str:
        assert cli.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("rectified-diffusers: error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return run


@pytest.mark.parametrize(
    ("words", "option", "kind"), slow_but(first_options(), options()), ids=lambda value: value or "choice"
)
def test_what_is_no_number_or_no_choice_is_told(refused, words, option, kind):
    assert option in refused([*filled(words), option, "many"])


@pytest.mark.parametrize("words", commands())
def test_an_unknown_option_is_told(refused, words):
    assert "--no-such-option" in refused([*filled(words), "--no-such-option"])


@pytest.mark.parametrize("words", [words for words, parser in commands().items() if filled(words) != words.split()])
def test_a_missing_argument_is_told(refused, words):
    assert "required" in refused(words.split())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["generate", "", "-o", "a.png"], "a prompt is empty"),
        (["generate", "a", "-o", "a.png", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["generate", "a", "-o", "a.png", "--num-images", "-1"], "--num-images must be at least 1"),
        (["generate", "a", "-o", "a.png", "--guidance-scale", "nan"], "--guidance-scale must be finite"),
        (["generate", "a", "-o", "a.png", "--height", "-8", "--width", "8"], "--height must be at least 1"),
        (["generate", "a", "-o", "a.png", "--seed", "-1"], "--seed must be between"),
        (["generate", "a", "-o", "a.png", "--refine", "--refine-strength", "-1"], "--refine-strength must be"),
        (["generate", "a", "-o", "a.png", "--refine", "--refine-strength", "nan"], "--refine-strength must be"),
        (["generate", "a", "-o", "a.xyz"], "cannot write an image"),
        (["generate", "a", "-o", "a.png", "--model", "no/such/model"], "no folder"),
        (["interpolate", "a", "-o", "a.gif"], "two prompts or two seeds"),
        (["interpolate", "a", "b", "-o", "a.avi"], "suffix '.avi'"),
        (["interpolate", "a", "b", "-o", "a.gif", "--frames", "-2"], "--frames must be at least 1"),
        (["no-such-command"], "invalid choice: 'no-such-command'"),
        ([], "required"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value[:12],
)
def test_values_out_of_range_are_told(refused, arguments, text):
    assert text in refused(arguments)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline that is no text-to-image model."""
    folder = tmp_path_factory.mktemp("other")
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("command", ["reflow", "distill", "progressive"])
def test_a_model_that_no_trainer_knows(other, command, tmp_path, capsys):
    triplets = make_dataset(tmp_path / "triplets").folder
    words = ["--model", other, "--triplets", str(triplets), "--output-dir", str(tmp_path / "run")]
    assert cli.main([command, *words]) == 2
    assert "error: DDPMPipeline cannot be adapted: the call of DDPMPipeline takes no prompt" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_cannot_be_adapted_leaves_no_folder(other, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    words = ["--teacher", other, "--prompts", str(tmp_path / "prompts.txt"), "--output-dir", str(tmp_path / "a" / "b")]
    assert cli.main(["triplets", *words, "--num-triplets", "2", "--device", "cpu"]) == 2
    assert "error: DDPMPipeline cannot be adapted" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_model_that_cannot_be_exported(other, tmp_path, capsys):
    words = ["onnx", "--model", other, "-o", str(tmp_path / "onnx"), "--device", "cpu"]
    assert cli.main(["export", *words]) == 2
    assert "error: export_onnx needs a diffusers pipeline" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("below", [".", "deeper/run"])
def test_an_output_below_a_file_is_refused(other, tmp_path, capsys, below):
    (tmp_path / "file").write_text("")
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    words = ["--teacher", other, "--prompts", str(tmp_path / "prompts.txt"), "--num-triplets", "2"]
    assert cli.main(["triplets", *words, "--output-dir", str(tmp_path / "file" / below)]) == 2
    assert f"the output {str(tmp_path / 'file')!r} is a file" in capsys.readouterr().err


def test_a_model_that_cannot_be_made_fast(other, tmp_path, capsys):
    words = ["a cat", "-o", str(tmp_path / "cat.png"), "--model", other, "--fast", "--device", "cpu"]
    assert cli.main(["generate", *words]) == 2
    assert "error: optimize needs a diffusers pipeline with unet, vae, got DDPMPipeline" in capsys.readouterr().err
