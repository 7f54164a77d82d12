"""Trackers get the lines of the log and the validation pictures, each step once."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import WandBTracker

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.training.checkpoint_writing import CheckpointWriter
from rectified_diffusers.training.tracking import PROJECT
from tests.training.helpers import digests, make_trainer

WATCHED: dict[str, Any] = {
    "log_every_steps": 1,
    "save_every_steps": 2,
    "validate_every_steps": 3,
    "validation_prompts": ("a cat",),
}


class Killed(BaseException):
    """Stands for the end of a process."""


def train_in_two_parts(dataset: TripletDataset, output_dir: Path, **options: Any) -> None:
    """Train 6 steps, killed in the fourth after step 3 was logged but not saved, and gone on with from step 2."""
    with pytest.MonkeyPatch.context() as patch:
        save = CheckpointWriter.save

        def stop(self: CheckpointWriter, step: int, *arguments: Any) -> None:
            if step == 4:
                raise Killed
            save(self, step, *arguments)

        patch.setattr(CheckpointWriter, "save", stop)
        with pytest.raises(Killed):
            make_trainer("distill", dataset, output_dir, **WATCHED, **options).train()
    make_trainer("distill", dataset, output_dir, **WATCHED, **options).train()


def test_tensorboard_shows_every_step_once(dataset: TripletDataset, output_dir: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_in_two_parts(dataset, output_dir, report_to="tensorboard")
    shown = EventAccumulator(str(output_dir / "trackers" / PROJECT)).Reload()
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "grad_norm", "learning_rate"):
        found = [(event.step, event.value) for event in shown.Scalars(name)]
        assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in found] == pytest.approx([line[name] for line in lines])
    sheets = shown.Images("validation")
    assert [(sheet.step, sheet.height, sheet.width) for sheet in sheets] == [(3, 32, 32), (6, 32, 32)]
    options = list((output_dir / "trackers").rglob("hparams.yml"))
    assert len(options) == 1
    assert "learning_rate: 0.001" in options[0].read_text()


def test_wandb_goes_on_with_one_run(
    dataset: TripletDataset, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its servers: what accelerate's tracker is started with and told; wandb itself drops old steps."""
    pytest.importorskip("wandb")
    started: list[dict[str, Any]] = []
    told: list[tuple[str, int | None]] = []
    monkeypatch.setattr(WandBTracker, "start", lambda self: started.append(self.init_kwargs))
    monkeypatch.setattr(WandBTracker, "store_init_configuration", lambda self, values: told.append(("options", None)))
    monkeypatch.setattr(
        WandBTracker, "log", lambda self, values, step=None: told.extend((key, step) for key in values)
    )
    monkeypatch.setattr(WandBTracker, "log_images", lambda self, values, step: told.append((*values, step)))
    monkeypatch.setattr(WandBTracker, "finish", lambda self: told.append(("end", None)))
    train_in_two_parts(dataset, output_dir, report_to="wandb")
    first, second = started
    assert first == second
    assert (first["resume"], len(first["id"])) == ("allow", 16)
    assert [name for name, _ in told if name in ("options", "end")] == ["options", "end"]
    assert [step for name, step in told if name == "loss"] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert [step for name, step in told if name == "validation"] == [3, 3, 6]


def test_a_tracker_changes_nothing_else(dataset: TripletDataset, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    make_trainer("reflow", dataset, tmp_path / "plain").train()
    make_trainer("reflow", dataset, tmp_path / "watched", report_to="tensorboard").train()
    watched = {name: digest for name, digest in digests(tmp_path / "watched").items() if "trackers" not in name}
    assert watched == digests(tmp_path / "plain")


def test_a_missing_package_is_an_error(
    dataset: TripletDataset, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate would go on without a word."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "rectified_diffusers.training.tracking.find_spec",
        lambda name: None if name == "wandb" else find_spec(name),
    )
    with pytest.raises(ImportError, match='report_to="wandb" needs the package wandb: pip install wandb'):
        make_trainer("reflow", dataset, output_dir, report_to="wandb")
