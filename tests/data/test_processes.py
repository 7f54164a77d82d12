"""Triplets made by several processes: the same files as by one, whoever else writes to the folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from rectified_diffusers import distributed as processes
from rectified_diffusers import files
from rectified_diffusers.data import generate as generate_module
from tests.data.test_triplets import contents, generate
from tests.forks import call_in_fork, exit_codes, free_port
from tests.marks import slow_but
from tests.tiny import make_tiny_pipeline

TRIPLETS = 22


def generate_as(base: Path, name: str, kind: str, rank: int, count: int, port: int) -> None:
    """Generate triplets in one process of several, which prints to NAME.log.

    A launched process has its rank from the environment, as `accelerate launch` sets it; unrelated processes do not
    know of each other.
    """
    sys.stderr = open(base / f"{name}.log", "a")  # noqa: SIM115 (until the process ends)
    if kind == "launched":
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    teacher, make = make_tiny_pipeline("diffusion"), generate_module._make_shard

    def note(*args: Any) -> None:
        with (base / f"{name}.made").open("a") as file:
            file.write(f"{args[2]}\n")
        make(*args)

    generate_module._make_shard = note
    assert len(generate(base / name, teacher, progress=True, num_triplets=TRIPLETS)) == TRIPLETS


def generate_in_processes(base: Path, name: str, kind: str, count: int) -> list[int | None]:
    """Return the exit codes of `count` processes that write the triplets of one folder."""
    port = free_port()
    return exit_codes(generate_as, [(base, name, kind, rank, count, port) for rank in range(count)])


RUNS = {
    "one": ("alone", 1),
    "two": ("launched", 2),
    "four": ("launched", 4),
    "unrelated": ("unrelated", 3),
    "resumed": ("launched", 2),
}
NAMES = slow_but(["two", "resumed"], ["two", "four", "unrelated", "resumed"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function for the outputs of different numbers of processes; NAME.log beside it is what they printed."""
    base = tmp_path_factory.mktemp("processes")

    def make(name: str) -> Path:
        if (base / name).exists():
            return base / name
        if name == "resumed":
            whole = make("one")
            (base / name).mkdir()
            for file in ("manifest.json", "shard-00001.safetensors", "shard-00003.safetensors"):
                (base / name / file).write_bytes((whole / file).read_bytes())
        codes = call_in_fork(generate_in_processes, base, name, *RUNS[name])
        assert not any(codes), (name, codes, (base / f"{name}.log").read_text())
        return base / name

    return make


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
@pytest.mark.parametrize("name", NAMES)
def test_several_processes_make_the_files_of_one(made, name):
    assert len(contents(made("one"))) == 7
    assert contents(made(name)) == contents(made("one"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
@pytest.mark.parametrize("name", ["one", *NAMES])
def test_no_shard_is_made_twice(made, name):
    shards = [0, 2, 4, 5] if name == "resumed" else range(6)
    assert sorted(map(int, made(name).with_suffix(".made").read_text().split())) == list(shards)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
def test_the_main_process_shows_the_progress_of_all(made):
    for name in ("one", "two", "resumed"):
        shown = made(name).with_suffix(".log").read_text()
        assert "Triplets: 100%" in shown
        assert "22/22" in shown
        assert shown.count("[00:00<?, ?image/s]") == 1, "one bar"


def test_no_other_run_removes_what_is_being_written(tmp_path, monkeypatch):
    """A run that starts removes the temporary files of killed ones, so every file is written under the lock."""
    written = []

    def settle(folder: Path, manifest: Any) -> Any:
        with files.lock(folder) as nobody_writes:
            written.append(nobody_writes)
        return settle_manifest(folder, manifest)

    def make(folder: Path, *args: Any) -> None:
        with files.lock(folder) as nobody_writes:
            written.append(nobody_writes)
        make_shard(folder, *args)

    settle_manifest, make_shard = generate_module.settle_manifest, generate_module._make_shard
    monkeypatch.setattr(generate_module, "settle_manifest", settle)
    monkeypatch.setattr(generate_module, "_make_shard", make)
    generate(tmp_path / "triplets", make_tiny_pipeline("diffusion"), num_triplets=8)
    assert written == [False] * 3, "a manifest and two shards"


@pytest.mark.parametrize(
    ("world_size", "available", "expected"),
    [(None, False, False), ("1", False, False), ("2", False, True), ("2", True, False)],
)
def test_several_processes_without_an_accelerator_are_told_from_the_others(
    monkeypatch, world_size, available, expected
):
    monkeypatch.setattr(getattr(torch, "accelerator", torch.cuda), "is_available", lambda: available)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert processes.several_on_cpu() is expected


@pytest.mark.parametrize(("several", "flag", "cpu"), [(True, None, True), (False, "true", True), (False, None, False)])
def test_processes_without_an_accelerator_are_connected_and_wait_for_the_slowest(monkeypatch, several, flag, cpu):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if flag is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    monkeypatch.setattr(processes, "several_on_cpu", lambda: several)
    told = {}
    monkeypatch.setattr(processes, "PartialState", lambda **options: told.update(options) or "state")
    assert processes.join_processes() == "state"
    assert told["cpu"] is cpu
    assert told["timeout"] >= timedelta(days=7), "a shard of a large teacher takes hours, and a last one has no bound"


@pytest.mark.slow
def test_accelerate_launch_equals_the_command(tmp_path):
    make_tiny_pipeline("diffusion").save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.jsonl").write_text('{"text": "a red apple"}\n{"text": ""}\n{"text": "the café"}\n')
    arguments = ["triplets", "--teacher", str(tmp_path / "teacher"), "--prompts", str(tmp_path / "prompts.jsonl")]
    arguments += ["--prompt-column", "text", "--num-triplets", "22", "--triplets-per-shard", "4", "--batch-size", "3"]
    arguments += ["--num-inference-steps", "2", "--seed", "7", "--device", "cpu", "--output-dir"]
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "rectified_diffusers.cli"]
    for module in (launch, ["rectified_diffusers.cli"]):
        folder = tmp_path / str(len(module))
        command = [sys.executable, "-m", *module, *arguments, str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{folder}: 22 triplets\n"
    assert contents(tmp_path / "1") == contents(tmp_path / "6")
    assert len(contents(tmp_path / "1")) == 7
