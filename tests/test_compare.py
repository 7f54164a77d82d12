"""What the comparison of two versions calls equal, and that it runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.compare import files
from tests.compare.__main__ import Comparison, main, wanted
from tests.compare.commands import COMMANDS, OLD
from tests.compare.files import difference, is_compared
from tests.test_bad_commands import commands

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
    return tmp_path / "before", tmp_path / "after"


def write_json(folders: tuple[Path, Path], *values: object) -> tuple[Path, Path]:
    for folder, value in zip(folders, values, strict=True):
        (folder / "a.json").write_text(json.dumps(value))
    return folders[0] / "a.json", folders[1] / "a.json"


def test_json_is_equal_but_for_dates_and_timings(pair):
    assert difference(*write_json(pair, {"a": [1, {"b": 2}], "date": 1}, {"date": 2, "a": [1, {"b": 2}]})) is None
    assert difference(*write_json(pair, {"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]})) == "/a/1/b is 2, then 3"
    assert difference(*write_json(pair, {"a": 1}, {"a": 1.0})) == "/a is 1, then 1.0"
    assert difference(*write_json(pair, {"a": 1}, {"a": 1, "b": 2})) == "/b is on one side only"
    assert (
        difference(*write_json(pair, {"unet.target_modules": ["a", "b"]}, {"unet.target_modules": ["b", "a"]})) is None
    )
    assert difference(*write_json(pair, [1, 2], [1])) == "/ is [1, 2], then [1]"


def test_a_new_option_may_be_recorded_with_the_value_that_changes_nothing(pair, monkeypatch):
    before = {"run": {"seed": 0}, "blake2b": "a"}
    paths = write_json(pair, before, {"run": {"seed": 0, "interpolation": "straight"}, "blake2b": "b"})
    monkeypatch.setattr(files, "NEW_OPTIONS", {})
    assert difference(*paths) == "/run/interpolation is on one side only"
    monkeypatch.setattr(files, "NEW_OPTIONS", {"interpolation": "straight"})
    assert difference(*paths) is None
    paths = write_json(pair, before, {"run": {"seed": 0, "interpolation": "cosine"}, "blake2b": "b"})
    assert difference(*paths) == "/run/interpolation is on one side only"
    assert difference(*write_json(pair, before, {**before, "blake2b": "b"})) == "/blake2b is a, then b"


@pytest.mark.parametrize(
    ("tensor", "metadata", "expected"),
    [
        (torch.tensor([0.0, torch.nan]), {"a": '{"seconds": 2}'}, None),
        (torch.tensor([-0.0, torch.nan]), {"a": '{"seconds": 1}'}, "x"),
        (torch.tensor([0.0, torch.nan]).double(), {"a": '{"seconds": 1}'}, "x"),
        (torch.tensor([0.0, torch.nan]), {"a": "b"}, "metadata/a is {'seconds': 1}, then b"),
    ],
)
def test_tensors_are_compared_bit_by_bit(pair, tensor, metadata, expected):
    paths = [folder / "a.safetensors" for folder in pair]
    save_file({"x": torch.tensor([0.0, torch.nan])}, paths[0], {"a": '{"seconds": 1}'})
    save_file({"x": tensor}, paths[1], metadata)
    assert difference(*paths) == expected


def test_pictures_are_compared_by_their_pixels(pair):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    paths = [folder / "a.png" for folder in pair]
    for path, level in zip(paths, (1, 9), strict=True):
        Image.fromarray(pixels).save(path, compress_level=level)
    assert paths[0].read_bytes() != paths[1].read_bytes()
    assert difference(*paths) is None
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(paths[1])
    assert difference(*paths) == "frame 0 differs"


def test_other_files_are_compared_as_they_are(pair):
    paths = [folder / "vocab.txt" for folder in pair]
    paths[0].write_text("a\n")
    assert difference(*paths) == "not written by the version after"
    paths[1].write_text("b\n")
    assert difference(*paths) == "other bytes"
    assert [is_compared(name) for name in ("README.md", "a/plots/b.png", "a/b.png")] == [False, False, True]


def test_no_option_of_the_completion_may_be_lost(pair):
    paths = [folder / "completion.out" for folder in pair]
    for path, words in zip(paths, ("--seed --steps (1)", "'--steps[2]' --seed --num-new"), strict=True):
        path.write_text(words)
    assert difference(*paths) is None
    assert difference(*reversed(paths)) == "lost ['--num-new']"


def test_new_records_and_files_are_no_difference_but_lost_ones_are(pair):
    old, new = {"run": {"seed": 0}}, {"run": {"seed": 0, "starting_model": "a"}}
    assert difference(*write_json(pair, old, new)) is None
    assert difference(*write_json(pair, new, old)) == "/run/starting_model is on one side only"
    paths = [folder / "files.json" for folder in pair]
    paths[1].write_text("{}")
    assert difference(*paths) is None
    assert difference(*reversed(paths)) == "not written by the version after"
    (pair[1] / "other.json").write_text("{}")
    assert difference(*(folder / "other.json" for folder in pair)) == "not written by the version before"


def test_a_command_may_be_new_and_not_lost(tmp_path):
    class Version:
        def __init__(self, has_it: bool) -> None:
            self.has_it = has_it

        def run(self, folder: Path, name: str, line: str) -> int:
            text = "" if self.has_it else f"error: argument command: invalid choice: '{name}' (choose from 'triplets')"
            (folder / f"{name}.err").write_text(text)
            return 0 if self.has_it else 2

    folders = (tmp_path / "before", tmp_path / "after")
    for folder in folders:
        folder.mkdir()
    versions: list[Any] = [Version(False), Version(True)]
    for each, problems in ((versions, []), (versions[::-1], ["failed in after"])):
        comparison = Comparison(each, folders)
        comparison.run("inspect", ["inspect model"])
        assert [problem.split(":")[0] for problem in comparison.rows[0][2]] == problems


def test_every_command_is_run():
    run = {line.split()[0] for lines in COMMANDS.values() for line in lines}
    assert {words.split()[0] for words in commands()} - run == {"demo"}  # which is asked by tests.compare.demo
    assert not COMMANDS.keys() & OLD.keys()


def test_what_a_command_reads_is_run_before_it():
    assert wanted(["delta"]) == ["triplets", "reflow", "delta"]
    with pytest.raises(SystemExit, match="no command 'render'"):
        wanted(["render"])


@pytest.mark.very_slow
def test_a_version_is_equal_to_itself(capsys):
    assert main(["--before", str(ROOT), "--only", "completion", "verify"]) == 0
    assert "| completion | 1 | 0 |\n| triplets | 4 | 0 |" in capsys.readouterr().out
