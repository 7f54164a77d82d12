"""The messages of a process that stands still, and the time limit of the process group."""

import logging
import re
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.training import watchdog as module
from rectified_diffusers.training.watchdog import Watchdog
from tests.training.helpers import make_trainer

WAIT = 300  # seconds, for what happens in another thread


class Clock:
    """The clock and the end of a watchdog: its waits take no time, and enter the stages that are due.

    Args:
        stages: seconds from the start to the stage that is entered then; None is the end.
    """

    def __init__(self, watchdog: Watchdog, stages: dict[float, str | None]) -> None:
        self.watchdog, self.stages, self.now = watchdog, stages, 0.0
        self.finished = threading.Event()

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        for at in [at for at in self.stages if at <= self.now]:
            if (stage := self.stages.pop(at)) is None:
                self.finished.set()
                return True
            self.watchdog.enter(stage)
        return False

    def set(self) -> None:
        assert self.finished.is_set(), "the watchdog's own thread has read the clock up to its end"


def watch(monkeypatch: pytest.MonkeyPatch, watchdog: Watchdog, stages: dict[float, str | None]) -> None:
    """Run the thread of a watchdog to the end of the stages."""
    clock: Any = Clock(watchdog, stages)
    monkeypatch.setattr(module, "time", clock)
    watchdog.end = clock
    watchdog.enter("start")
    with watchdog:
        assert clock.finished.wait(WAIT)


def test_a_stage_that_does_not_end_is_named_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        watch(monkeypatch, Watchdog(2, 4), {10: "the checkpoint of step 3", 2400: "step 4", 2600: None})
    assert all("Process 3 of 4" in message and "the checkpoint of step 3" in message for message in caplog.messages)
    seconds = [re.findall(r"in one stage for (\d+) s", message) for message in caplog.messages]
    assert seconds == [["305"], ["605"], ["1205"]]


def test_stages_that_end_are_not_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    stages: dict[float, str | None] = {250 * step: f"step {step}" for step in range(1, 30)}
    watch(monkeypatch, Watchdog(0, 2), {**stages, 7500: None})
    assert caplog.messages == []


@pytest.mark.parametrize(("count", "threads"), [(1, 0), (2, 1)])
def test_one_process_alone_is_not_watched_and_the_thread_of_others_ends(count: int, threads: int) -> None:
    before = set(threading.enumerate())
    with Watchdog(0, count):
        started = set(threading.enumerate()) - before
    assert len(started) == threads
    for thread in started:
        thread.join(WAIT)
        assert not thread.is_alive()


def test_every_stage_of_a_training_is_entered(
    dataset: TripletDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    monkeypatch.setattr(Watchdog, "enter", lambda self, stage: stages.append(stage))
    options = {"validate_every_steps": 2, "validation_prompts": ("a cat",), "save_every_steps": 2, "max_steps": 2}
    trainer = make_trainer("reflow", dataset, tmp_path, **options)
    trainer.train()
    steps = ["step 1", "step 2", "validation at step 2", "the checkpoint of step 2"]
    ends = ["writing the last checkpoint", "writing the finished pipeline"]
    assert stages == ["start", "loading the newest checkpoint", *steps, *ends]
    assert trainer.accelerator.init_handler is not None
    assert trainer.accelerator.init_handler.timeout == timedelta(hours=2)
