"""Checkpoints are whole or not there; damaged ones are noticed and passed over."""

import errno
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rectified_diffusers.files import system_errors
from rectified_diffusers.training import checkpoint_writing
from rectified_diffusers.training.checkpoint_reading import STATE, checkpoint_path, checkpoint_steps, sealed
from rectified_diffusers.training.config import ReflowConfig
from rectified_diffusers.training.identity import config_to_json, require_same_run
from tests.training.checkpoints import Checkpoint, newest_checkpoint, read_checkpoint, write_checkpoint


def make_checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"unet.safetensors": {"weight": torch.full((2, 3), step).float()}}, {"run": {"seed": 0}})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


DAMAGES = {"cut": cut, "flipped": flip, "gone": Path.unlink}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, make_checkpoint(5), keep=1)
    found = read_checkpoint(path)
    assert path.name == "step-00000005"
    assert (found.step, found.state) == (5, {"run": {"seed": 0}})
    assert torch.equal(found.tensors["unet.safetensors"]["weight"], torch.full((2, 3), 5.0))


def test_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        write_checkpoint(tmp_path, make_checkpoint(step), keep=2)
    assert checkpoint_steps(tmp_path) == [4, 5]
    write_checkpoint(tmp_path, make_checkpoint(6), keep=1)
    assert checkpoint_steps(tmp_path) == [6]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["unet.safetensors", "state.json"])
def test_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, make_checkpoint(step), keep=2)
    damage(tmp_path / "step-00000002" / name)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step-00000002 is damaged" in caplog.text


def test_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    for step in (2, 4):
        write_checkpoint(tmp_path, make_checkpoint(step), keep=2)
    cut(tmp_path / "step-00000004" / "unet.safetensors")
    write_checkpoint(tmp_path, make_checkpoint(3), keep=1)
    assert checkpoint_steps(tmp_path) == [3]


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    cut(write_checkpoint(tmp_path, make_checkpoint(1), keep=1) / "unet.safetensors")
    with pytest.raises(ValueError, match=r"None of the 1 checkpoints .* is whole. Remove that folder"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("state", [{}, {"files": []}, {"files": None, "step": 1}])
def test_a_state_that_lists_no_files_is_damaged(tmp_path: Path, state: dict[str, Any]) -> None:
    path = write_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    (path / STATE).write_text(sealed(state))
    with pytest.raises(ValueError, match=r"step-00000001 is damaged .*state.json does not list its files.*Remove its"):
        read_checkpoint(path)


@pytest.mark.parametrize("state", ["[]", "7", "{}", '{"files": {}, "step": 1}'])
def test_a_state_without_its_digest_is_damaged(tmp_path: Path, state: str) -> None:
    path = write_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    (path / STATE).write_text(state)
    with pytest.raises(ValueError, match=r"step-00000001 is damaged .*state.json does not end in its digest"):
        read_checkpoint(path)


def test_no_bit_of_a_state_can_turn(tmp_path: Path) -> None:
    """Also not one that leaves another state, which training would go on from: a digit, a letter of a name."""
    path = write_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    text = (path / STATE).read_bytes()
    for position, bit in itertools.product(range(len(text)), range(8)):
        (path / STATE).write_bytes(text[:position] + bytes([text[position] ^ 1 << bit]) + text[position + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            read_checkpoint(path)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "not there") is None


def test_a_failed_write_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, make_checkpoint(1), keep=1)

    def full_disk(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_writing, "write_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, make_checkpoint(2), keep=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    cut(write_checkpoint(tmp_path, make_checkpoint(1), keep=1) / "unet.safetensors")
    write_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    assert read_checkpoint(checkpoint_path(tmp_path, 1)).step == 1


@pytest.mark.parametrize(
    "words", ["I/O error: Read-only file system (os error 30)", "IoError(Os { code: 30, kind: X })"]
)
def test_what_safetensors_says_of_the_system_is_the_system_s_error(words: str) -> None:
    with pytest.raises(OSError, match="Error while serializing: I") as raised, system_errors():
        raise SafetensorError(f"Error while serializing: {words}")
    assert raised.value.errno == errno.EROFS
    with pytest.raises(SafetensorError, match="no tensor"), system_errors():
        raise SafetensorError("no tensor of this name")


def test_a_checkpoint_or_pipeline_that_cannot_be_written_is_the_system_s_error(tmp_path: Path) -> None:
    """A folder that went away stands for a disk that turned read-only, which takes root to make."""
    with pytest.raises(FileNotFoundError), system_errors():
        save_file({"weight": torch.ones(1)}, tmp_path / "gone" / "unet.safetensors")


def test_what_makes_two_runs_the_same(tmp_path: Path) -> None:
    options = config_to_json(ReflowConfig(output_dir=tmp_path))
    assert options == json.loads(json.dumps(options))
    other = config_to_json(ReflowConfig(output_dir=tmp_path / "b", max_steps=7, micro_batch_size=2, log_every_steps=9))
    require_same_run(options, other, tmp_path)
    other = config_to_json(ReflowConfig(output_dir=tmp_path, seed=1))
    with pytest.raises(ValueError, match=r"holds a run with seed=0, got seed=1. Give the same value"):
        require_same_run(options, other, tmp_path)


def test_max_steps_counts_where_the_learning_rate_depends_on_it(tmp_path: Path) -> None:
    runs = [config_to_json(ReflowConfig(output_dir=tmp_path, lr_schedule="cosine", max_steps=n)) for n in (7, 8)]
    with pytest.raises(ValueError, match="max_steps=7, got max_steps=8"):
        require_same_run(*runs, tmp_path)
