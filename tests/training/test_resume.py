"""A run that was stopped, killed or damaged ends in the files of a run that was not, bit for bit."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.training import checkpoint_writing
from rectified_diffusers.training.trainer import Trainer
from tests.forks import call_in_fork, exit_codes
from tests.marks import slow_but
from tests.training.checkpoints import read_checkpoint
from tests.training.helpers import (
    KILLED_RUN,
    TRAINERS,
    digests,
    fail_at,
    make_ends,
    make_trainer,
    train_to_a_kill,
    write_dataset,
)


class Stop(BaseException):
    """Stands for anything that ends a process between two lines."""


def stop() -> None:
    raise Stop


# In the middle of writing the second checkpoint (the fifth file), the finished pipeline (the ninth rename), and the
# checkpoint after the third step, the first one of the second round, with its teacher. A checkpoint of distribution
# matching has five files.
KILLS = {
    "reflow": ("write_file", 5),
    "distill": ("replace", 9),
    "progressive": ("write_file", 7),
    "dmd": ("write_file", 9),
}


@pytest.mark.parametrize("method", slow_but(["reflow", "distill"], KILLS))
def test_a_killed_run_is_repeated_bit_for_bit(method: str, dataset: TripletDataset, tmp_path: Path) -> None:
    """It was ended by SIGKILL in a process of its own."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    call = dataset.folder, method, killed, *KILLS[method]
    assert call_in_fork(exit_codes, train_to_a_kill, [call]) == [-signal.SIGKILL]
    left = digests(killed)
    assert any(".tmp-" in name for name in left)
    assert "model_index.json" not in left
    for folder in (killed, whole):
        make_trainer(method, dataset, folder, **KILLED_RUN).train()
    assert digests(killed) == digests(whole)


@pytest.fixture(scope="module")
def whole(dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    make_trainer("reflow", dataset, folder).train()
    return folder


OTHERS = ("checkpoints/step-00000004", "checkpoints/step-00000005")


@pytest.mark.parametrize("steps", slow_but([2], [1, 2, 5]))
def test_a_run_in_two_parts_equals_one(steps: int, whole: Path, dataset: TripletDataset, output_dir: Path) -> None:
    make_trainer("reflow", dataset, output_dir, max_steps=steps, keep_checkpoints=1).train()
    make_trainer("reflow", dataset, output_dir).train()
    found, expected = digests(output_dir), digests(whole)
    if steps == 5:  # its last step has a checkpoint too, which has pushed out that of step 4
        found, expected = ({k: v for k, v in files.items() if k[:25] not in OTHERS} for files in (found, expected))
    assert found == expected


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    slow_but(
        [(Trainer, "train_step", 4), (checkpoint_writing, "flush", 3), (Path, "replace", 6)],
        [
            (Trainer, "train_step", 4),
            (checkpoint_writing, "write_file", 3),
            (checkpoint_writing, "flush", 3),
            (Path, "replace", 3),
        ]
        + [(Path, "replace", call) for call in (4, 6, 9)],
    ),
)
def test_a_run_stopped_anywhere_equals_one(
    owner: Any, name: str, call: int, whole: Path, dataset: TripletDataset, output_dir: Path
) -> None:
    interrupted = make_trainer("reflow", dataset, output_dir)
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, owner, name, call, stop)
        with pytest.raises(Stop):
            interrupted.train()
    make_trainer("reflow", dataset, output_dir).train()
    assert digests(output_dir) == digests(whole)


def test_a_run_killed_before_its_pipeline_was_written(dataset: TripletDataset, tmp_path: Path) -> None:
    """No step is left, so that this process encodes no prompt: the tokenizer's files do not tell."""
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    make_trainer("distill", dataset, whole, max_steps=2, log_every_steps=1).train()
    shutil.copytree(whole / "checkpoints", rest / "checkpoints")
    shutil.copy(whole / "log.jsonl", rest)
    make_trainer("distill", dataset, rest, max_steps=2, log_every_steps=1).train()
    assert digests(rest) == digests(whole)


def test_a_finished_run_is_not_repeated(whole: Path, dataset: TripletDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    again = make_trainer("reflow", dataset, whole)
    monkeypatch.setattr(again, "train_step", stop)
    unet = again.train()
    changed = [path for path in whole.rglob("*") if path.stat().st_mtime_ns != before[path]]
    assert [path for path in changed if path.is_file() and path.name != "log.jsonl"] == []
    ema = read_checkpoint(whole / "checkpoints" / "step-00000006").tensors["ema.safetensors"]
    assert all(torch.equal(weight, ema[name]) for name, weight in unet.named_parameters())


def test_a_damaged_checkpoint_is_passed_over(
    whole: Path, dataset: TripletDataset, output_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer("reflow", dataset, output_dir, max_steps=4).train()
    weights = output_dir / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    make_trainer("reflow", dataset, output_dir).train()
    assert f"{weights.parent} is damaged" in caplog.text
    assert digests(output_dir) == digests(whole)


@pytest.mark.parametrize("options", [{"learning_rate": 2e-3}, {"seed": 3}, {"time_density": "u_shaped"}])
def test_other_options_are_another_run(options: dict[str, Any], whole: Path, dataset: TripletDataset) -> None:
    name, value = next(iter(options.items()))
    before = digests(whole)
    with pytest.raises(ValueError, match=f"{name}=.*, got {name}={value!r}. Give the same value"):
        make_trainer("reflow", dataset, whole, **options).train()
    assert digests(whole) == before


def test_another_trainer_or_dataset_is_another_run(whole: Path, dataset: TripletDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainer='ReflowTrainer', got trainer='DistillTrainer'"):
        make_trainer("distill", dataset, whole).train()
    other = write_dataset(tmp_path, *make_ends(rows=3), ["a", "b", "c"])
    with pytest.raises(ValueError, match="dataset_rows=4, got dataset_rows=3"):
        make_trainer("reflow", other, whole).train()


def test_fewer_steps_than_done_are_refused(whole: Path, dataset: TripletDataset) -> None:
    with pytest.raises(ValueError, match=r"holds a run of 6 steps, got max_steps=5. Raise max_steps"):
        make_trainer("reflow", dataset, whole, max_steps=5).train()


def test_a_pipeline_of_others_is_not_replaced(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("reflow", dataset, output_dir)
    trainer.pipeline.save_pretrained(output_dir)
    before = digests(output_dir)
    with pytest.raises(ValueError, match=r"holds a pipeline and no checkpoint .* Give another output_dir"):
        trainer.train()
    assert digests(output_dir) == before


def test_the_log_survives_a_line_cut_in_the_middle(whole: Path, dataset: TripletDataset, output_dir: Path) -> None:
    make_trainer("reflow", dataset, output_dir, max_steps=4).train()
    log = output_dir / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "loss": 0.5}\n{"step": 6, "lo')
    make_trainer("reflow", dataset, output_dir).train()
    assert log.read_text() == (whole / "log.jsonl").read_text()


def test_dropout_resumes(dataset: TripletDataset, tmp_path: Path) -> None:
    """A U-Net that draws random numbers of its own draws the same after a resume."""

    def run(folder: Path, max_steps: int) -> torch.nn.Module:
        trainer = make_trainer("reflow", dataset, folder, max_steps=max_steps)
        for module in trainer.student.network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        return trainer.train()

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 2)
    torch.rand(5)
    parts = run(tmp_path / "parts", 3)
    plain = make_trainer("reflow", dataset, tmp_path / "plain", max_steps=3).train()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), plain.parameters(), strict=True))


def test_methods_are_those_of_the_command_line() -> None:
    assert set(KILLS) == set(TRAINERS)
