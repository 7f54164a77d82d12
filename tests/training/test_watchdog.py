"""The messages of a process that stands still, and the time limit of the process group."""

import logging
import time
from datetime import timedelta
from pathlib import Path

import pytest

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.training import watchdog as module
from rectified_diffusers.training.watchdog import Watchdog
from tests.training.helpers import make_trainer


def test_a_stage_that_does_not_end_is_named_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    with caplog.at_level(logging.WARNING), Watchdog(2, 4) as watchdog:
        watchdog.enter("the checkpoint of step 3")
        deadline = time.monotonic() + 10
        while len(caplog.messages) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        began = time.monotonic()
        watchdog.enter("step 4")
    assert all("Process 3 of 4" in message and "the checkpoint of step 3" in message for message in caplog.messages)
    assert len(caplog.messages) == 3
    assert began < deadline
    time.sleep(0.3)
    assert len(caplog.messages) == 3, "nothing after the end"


def test_stages_that_end_are_not_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    with Watchdog(0, 2) as watchdog:
        for step in range(30):
            watchdog.enter(f"step {step}")
            time.sleep(0.05)
    assert caplog.messages == []


def test_one_process_alone_is_not_watched(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    with Watchdog(0, 1):
        time.sleep(0.2)
    assert caplog.messages == []


def test_every_stage_of_a_training_is_entered(
    dataset: TripletDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    monkeypatch.setattr(Watchdog, "enter", lambda self, stage: stages.append(stage))
    options = {"validate_every_steps": 2, "validation_prompts": ("a cat",), "save_every_steps": 2, "max_steps": 2}
    trainer = make_trainer("reflow", dataset, tmp_path, **options)
    trainer.train()
    assert stages == ["start", "step 1", "step 2", "validation at step 2", "the checkpoint of step 2"]
    assert trainer.accelerator.init_handler is not None
    assert trainer.accelerator.init_handler.timeout == timedelta(hours=2)
