"""Validation images and straightness, computed by all processes: those of one process, with and without FSDP."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.distributed import divided, training_accelerator
from rectified_diffusers.evaluation.straightness import pipeline_straightness
from tests.forks import call_in_fork
from tests.training.helpers import PROMPTS, make_trainer
from tests.training.processes import in_forks, needs_fsdp2

OPTIONS: dict[str, Any] = {"validation_prompts": tuple(PROMPTS[:3])}


def divide(folder: Path, lengths: list[int]) -> None:
    """Write what this process made and what it got, for lists of calls of these lengths."""
    rank, made = training_accelerator("no").process_index, []

    def call(number: int) -> str:
        made.append(number)
        return f"call {number}"

    got = [divided([partial(call, number) for number in range(length)]) for length in lengths]
    (folder / f"{rank}.json").write_text(json.dumps({"made": made, "got": got}))


def validate(triplets: Path, folder: Path) -> None:
    """Generate the validation images of an untrained network, and measure its straightness."""
    trainer = make_trainer("reflow", TripletDataset(triplets), folder, **OPTIONS)
    trainer.validate(1)
    with trainer.student.average() as network:
        pipeline = trainer.make_pipeline(network)
        found = pipeline_straightness(pipeline, PROMPTS[:3], steps=10, batch_size=1, run=divided)
    (folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps([found.total, *found.per_bin]))


def test_one_process_makes_all_calls() -> None:
    made: list[int] = []
    assert divided([partial(made.append, number) for number in range(3)]) == [None] * 3
    assert made == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
@pytest.mark.parametrize("count", [2, 3])
def test_processes_make_equally_many_calls_and_get_all_results(count: int, tmp_path: Path) -> None:
    lengths = [0, 1, 3, 4]
    call_in_fork(in_forks, count, False, divide, tmp_path, lengths)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    assert all(each["got"] == [[f"call {i}" for i in range(length)] for length in lengths] for each in found)
    assert len({len(each["made"]) for each in found}) == 1
    assert len(found[0]["made"]) == sum(-(-length // count) for length in lengths)


@pytest.fixture(scope="module")
def alone(dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    call_in_fork(in_forks, 1, False, validate, dataset.folder, folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=needs_fsdp2)])
def test_images_and_straightness_are_those_of_one_process(
    sharded: bool, dataset: TripletDataset, alone: Path, tmp_path: Path
) -> None:
    call_in_fork(in_forks, 2, sharded, validate, dataset.folder, tmp_path)
    name = "validation/step-00000001.png"
    assert (tmp_path / name).read_bytes() == (alone / name).read_bytes()
    expected = json.loads((alone / "0.json").read_text())
    assert torch.isfinite(torch.tensor(expected)).all()
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected] * 2
