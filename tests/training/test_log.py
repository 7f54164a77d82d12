"""A damaged line of a run's log stops neither a resume nor a report."""

import logging
import shutil
from pathlib import Path

import pytest

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.training.report import write_report
from rectified_diffusers.training.run_folder import read_log
from tests.marks import slow_but
from tests.training.helpers import digests, make_trainer

DAMAGED = {
    "no JSON": b"{broken\n",
    "zeros, as after a crash": b"\0" * 64 + b"\n",
    "half a line": b'{"step": 2, "loss\n',
    "not UTF-8": b'{"step": 2, "loss": "\xff"}\n',
    "a list": b"[1, 2]\n",
    "a text": b'"step"\n',
    "a number": b"7\n",
    "no step": b'{"loss": 1.0}\n',
    "a step in words": b'{"step": "two", "loss": 1.0}\n',
    "blank": b"\n",
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.fixture(scope="module")
def whole(dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_trainer("distill", dataset, folder, max_steps=4, log_every_steps=1).train()
    return folder


@pytest.fixture(scope="module")
def begun(dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of that run."""
    folder = tmp_path_factory.mktemp("begun")
    make_trainer("distill", dataset, folder, max_steps=2, log_every_steps=1).train()
    return folder


@pytest.mark.parametrize("variant", DAMAGED)
def test_a_damaged_line_is_left_out(
    variant: str, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, *others = (whole / "log.jsonl").read_bytes().splitlines(keepends=True)
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join([first, DAMAGED[variant], *others]))
    with caplog.at_level(logging.WARNING):
        assert "".join(line for line, _ in read_log(log)).encode() == first + b"".join(others)
    assert f"{log}, line 2 is damaged and left out" in caplog.text
    assert "4" in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "variant", slow_but(["no JSON", "not UTF-8"], ["no JSON", "zeros, as after a crash", "not UTF-8", "a list"])
)
def test_a_run_goes_on_after_a_damaged_line(
    variant: str, begun: Path, whole: Path, dataset: TripletDataset, output_dir: Path
) -> None:
    shutil.copytree(begun, output_dir)
    log = output_dir / "log.jsonl"
    log.write_bytes(DAMAGED[variant] + log.read_bytes())
    make_trainer("distill", dataset, output_dir, max_steps=4, log_every_steps=1).train()
    assert digests(output_dir)["log.jsonl"] == digests(whole)["log.jsonl"]
    assert digests(output_dir)["training.json"] == digests(whole)["training.json"]


def test_a_damaged_last_line_stops_no_finished_model(whole: Path, dataset: TripletDataset) -> None:
    before = digests(whole)
    log, record = whole / "log.jsonl", whole / "training.json"
    with log.open("ab") as file:
        file.write(b"\0\0\n")
    record.unlink()
    make_trainer("distill", dataset, whole, max_steps=4, log_every_steps=1).train()
    assert digests(whole) == before
