"""One dataclass gives the command line, the defaults and the checks."""

import argparse
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from rectified_diffusers.options import add_options, check_options, option, options_from


@dataclass(frozen=True, kw_only=True)
class Base:
    steps: int = option(25, "Number of steps.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")


@dataclass(frozen=True, kw_only=True)
class Everything(Base):
    output_dir: Path = option(MISSING, "Where to.")
    learning_rate: float = option(1e-6, "Rate, 100% of it.")
    loss: Literal["l2", "huber"] = option("l2", "Which distance.")
    level: Literal[1, 2] | None = option(None, "Which level.")
    solver: str = option("euler", "Which solver.", choices=("euler", "heun"))
    half: bool = option(False, "Whether to.")
    height: int | None = option(64, "In pixels.")
    prompts: tuple[str, ...] = option(("a cat", "a dog"), "What to draw.")
    sizes: tuple[int, ...] = option((), "Sizes.")
    derived: int = field(default=0, init=False)


def parse(*arguments: str, config_class: type = Everything) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, config_class)
    return options_from(parser.parse_args(arguments), config_class)


def test_what_is_not_given_has_the_default():
    assert parse("--output-dir", "out") == Everything(output_dir=Path("out"))


def test_every_type_is_parsed():
    parsed = parse(
        *("--output-dir", "out", "--learning-rate", "2e-4", "--loss", "huber", "--level", "2", "--solver", "heun"),
        *("--half", "--height", "32", "--prompts", "a fox", "an owl", "--sizes", "1", "2", "--steps", "3"),
    )
    assert parsed == Everything(
        output_dir=Path("out"),
        learning_rate=2e-4,
        loss="huber",
        level=2,
        solver="heun",
        half=True,
        height=32,
        prompts=("a fox", "an owl"),
        sizes=(1, 2),
        steps=3,
    )


def test_none_and_no_and_an_empty_list_can_be_given():
    parsed = parse("--output-dir", "out", "--height", "none", "--level", "none", "--no-half", "--prompts")
    assert (parsed.height, parsed.level, parsed.half, parsed.prompts) == (None, None, False, ())


@pytest.mark.parametrize(
    "arguments",
    [("--steps", "many"), ("--loss", "l3"), ("--level", "3"), ("--solver", "rk4"), ("--height", "tall"), ("--x", "1")],
    ids=" ".join,
)
def test_what_the_type_does_not_allow_is_refused(arguments):
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parse("--output-dir", "out", *arguments)


def test_a_required_option_must_be_given():
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parse()


def test_the_checks_of_the_config_hold_on_the_command_line():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        parse("--output-dir", "out", "--steps", "0")


def test_help_shows_text_choices_and_default():
    parser = argparse.ArgumentParser()
    add_options(parser, Everything)
    text = " ".join(parser.format_help().split())
    for expected in [
        "--output-dir PATH Where to. (required)",
        "--learning-rate NUMBER Rate, 100% of it. (default: 1e-06)",
        "--loss {l2,huber} Which distance. (default: l2)",
        "--level {1,2} Which level. (default: none)",
        "--half, --no-half Whether to. (default: no)",
        "What to draw. (default: a cat a dog)",
        "Sizes. (default: empty)",
    ]:
        assert expected in text
    assert text.count("default: no)") == 1
    assert "derived" not in text


def test_a_field_without_help_is_refused():
    @dataclass
    class Bare:
        steps: int = 1

    with pytest.raises(KeyError, match="flags"):
        add_options(argparse.ArgumentParser(), Bare)


def test_a_type_without_a_form_on_the_command_line_is_refused():
    @dataclass
    class Nested:
        table: dict = option(None, "A table.")

    with pytest.raises(TypeError, match="no form on the command line"):
        add_options(argparse.ArgumentParser(), Nested)


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("steps", "25", TypeError, "a whole number, got '25' of type str"),
        ("steps", 2.0, TypeError, "a whole number, got 2.0 of type float"),
        ("steps", True, TypeError, "a whole number, got True of type bool"),
        ("learning_rate", "1e-6", TypeError, "a number, got '1e-6'"),
        ("learning_rate", None, TypeError, "a number, got None"),
        ("half", 1, TypeError, "True or False, got 1"),
        ("height", "tall", TypeError, "a whole number or None, got 'tall'"),
        ("prompts", "a cat", TypeError, "a tuple, each item a text, got 'a cat'"),
        ("sizes", (1, "2"), TypeError, "a tuple, each item a whole number"),
        ("output_dir", 3, TypeError, "a path, got 3"),
        ("solver", Path("euler"), TypeError, "a text, got"),
        ("loss", "l3", ValueError, "one of 'l2', 'huber', got 'l3'"),
        ("level", 3, ValueError, "one of 1, 2, got 3"),
    ],
)
def test_types_and_choices_are_held(name, value, error, match):
    with pytest.raises(error, match=f"{name} must be {match}"):
        check_options(Everything(**{"output_dir": Path("out"), name: value}))


def test_what_means_the_same_is_taken():
    check_options(Everything(output_dir="out", learning_rate=1, prompts=["a cat"], sizes=(), height=None, level=None))  # pyright: ignore[reportArgumentType]
