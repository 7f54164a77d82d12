"""Weights sharded by FSDP2 in forks on the CPU: what a process holds, and that the run is that of one process."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.models.velocity_unet import DiffusionVelocityUNet
from rectified_diffusers.training.sharding import borrow_weights, swap_weights
from tests.forks import call_in_fork
from tests.tiny import make_diffusion_scheduler, make_unet
from tests.training.helpers import make_trainer
from tests.training.processes import in_forks, main, needs_fsdp2
from tests.training.test_processes import check_that_they_agree, tensors

RUNS: dict[str, dict[str, Any]] = {
    "progressive": {"method": "progressive", "teacher_steps": 4},
    "progressive-lora": {"method": "progressive", "lora_rank": 2, "teacher_steps": 4},
    "half": {"half": True, "max_steps": 2},
    "half-lora": {"half": True, "max_steps": 2, "lora_rank": 2},
    "diffusion": {"kind": "v_prediction", "initialisation": "snr_matching", "max_steps": 2},
    "dmd-lora": {"method": "dmd", "lora_rank": 2, "max_steps": 1, "fake_updates": 1, "first_fake_updates": 0},
}


def train_in_forks(count: int, sharded: bool, triplets: Path, output: Path, runs: dict[str, dict[str, Any]]) -> None:
    output.mkdir()
    words = [f"{name}={json.dumps(options)}" for name, options in runs.items()]
    in_forks(count, sharded, main, str(triplets), str(output), *words)


@pytest.fixture(scope="module")
def trained(dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs on one process in `one`, and on two that share the weights in `two`."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, count in (("one", 1), ("two", 2)):
        call_in_fork(train_in_forks, count, count > 1, dataset.folder, folder / name, RUNS)
    return folder


@pytest.mark.slow
@needs_fsdp2
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
@pytest.mark.parametrize("name", RUNS)
def test_the_run_of_two_processes_is_that_of_one(trained: Path, name: str) -> None:
    step = max(int(path.name[5:]) for path in (trained / "one" / name / "checkpoints").iterdir())
    check_that_they_agree(tensors(trained / "two" / name, step), tensors(trained / "one" / name, step))
    records = [json.loads((trained / "two" / f"{name}-{i}.json").read_text()) for i in range(2)]
    assert all(record["sharded"] for record in records)
    assert records[0]["returns"] != "NoneType"
    assert records[1]["returns"] == "NoneType"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
@pytest.mark.parametrize(
    ("count", "sharded"), [(2, False), (4, False), pytest.param(4, True, marks=needs_fsdp2)], ids=str
)
def test_any_number_of_processes_is_one(count: int, sharded: bool, dataset: TripletDataset, tmp_path: Path) -> None:
    runs = {method: {"method": method, "max_steps": 2} for method in ("reflow", "dmd")}
    runs["dmd"] |= {"fake_updates": 1, "first_fake_updates": 0}
    for name, processes in (("one", 1), ("several", count)):
        shared = sharded and processes > 1
        call_in_fork(train_in_forks, processes, shared, dataset.folder, tmp_path / name, runs)
    for name in runs:
        assert json.loads((tmp_path / "several" / f"{name}-{count - 1}.json").read_text())["processes"] == count
        check_that_they_agree(*(tensors(tmp_path / folder / name, 2) for folder in ("several", "one")))


def test_borrowed_weights_are_the_same_memory_with_flags_of_their_own() -> None:
    network: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    network[2].weight = network[0].weight
    borrowed = borrow_weights(network.requires_grad_(False)).requires_grad_(True)
    assert [weight.data_ptr() for weight in borrowed.parameters()] == [w.data_ptr() for w in network.parameters()]
    assert borrowed[2].weight is borrowed[0].weight
    assert not any(weight.requires_grad for weight in network.parameters())
    assert borrowed[1].running_mean.data_ptr() != network[1].running_mean.data_ptr()


def test_a_velocity_of_borrowed_weights_predicts_as_a_copy() -> None:
    unet, scheduler = make_unet(), make_diffusion_scheduler()
    borrowed, copied = DiffusionVelocityUNet.sharing(unet, scheduler), DiffusionVelocityUNet.from_unet(unet, scheduler)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    assert torch.equal(borrowed(x, 500, text).sample, copied(x, 500, text).sample)
    pointers = [[weight.data_ptr() for weight in each.state_dict().values()] for each in (unet, borrowed, copied)]
    assert pointers[0] == pointers[1]
    assert not set(pointers[0]) & set(pointers[2])
    assert not any(tensor.is_meta for each in (borrowed, copied) for tensor in (*each.parameters(), *each.buffers()))


def test_weights_are_exchanged() -> None:
    first, second = ([nn.Parameter(torch.randn(3)) for _ in range(2)] for _ in range(2))
    values = [[weight.detach().clone() for weight in weights] for weights in (first, second)]
    swap_weights(first, second)
    assert all(torch.equal(weight, value) for weight, value in zip(first, values[1], strict=True))
    assert all(torch.equal(weight, value) for weight, value in zip(second, values[0], strict=True))


def test_the_average_is_used_without_a_copy_of_all_weights(dataset: TripletDataset, tmp_path: Path) -> None:
    trainer = make_trainer("reflow", dataset, tmp_path, max_steps=1)
    trainer.student.update(1, trainer.sample_inputs(1), trainer.losses, 1e-3, 0)
    student = trainer.student
    pairs = [
        (weight.detach().clone(), average.clone())
        for weight, average in zip(student.parameters, student.ema.shadow_params, strict=True)
    ]
    with student.average() as network:
        assert not network.training
        assert all(torch.equal(weight, pair[1]) for weight, pair in zip(student.parameters, pairs, strict=True))
    assert network.training
    assert all(
        torch.equal(weight, pair[0]) and torch.equal(average, pair[1])
        for weight, average, pair in zip(student.parameters, student.ema.shadow_params, pairs, strict=True)
    )
