"""Mistakes that ruin a training are found before its first step, and a full disk leaves what is good."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rectified_diffusers.data.dataset import TripletDataset, Triplets
from rectified_diffusers.data.manifest import Manifest
from rectified_diffusers.training import checkpoint_writing
from rectified_diffusers.training.checkpoint_reading import checkpoint_path, checkpoint_steps
from rectified_diffusers.training.checkpoint_writing import require_room
from rectified_diffusers.training.guards import require_direction, require_same_latents
from rectified_diffusers.training.run_folder import RunFolder
from tests.marks import slow_but
from tests.tiny import make_vae
from tests.training.helpers import TRAINERS, digests, fail_at, make_ends, make_trainer


def turn_round(trainer: Any, factor: float) -> None:
    """Let a tiny student answer a multiple of the noise at the noise end, as a trained model nearly does."""
    student = trainer.student.network
    with torch.no_grad():
        student.conv_out.weight.zero_()
        student.conv_out.bias.zero_()
    student.register_forward_hook(lambda module, args, output: (output[0] + factor * args[0],))


@pytest.mark.parametrize("method", slow_but(["reflow", "progressive"], TRAINERS))
def test_a_velocity_of_the_wrong_sign_is_found_at_the_start(
    method: str, dataset: TripletDataset, output_dir: Path
) -> None:
    trainer = make_trainer(method, dataset, output_dir)
    turn_round(trainer, 1.0)
    with pytest.raises(ValueError, match=r"points away from the data: .* above 0, got -0\.\d\d.*velocity_direction"):
        trainer.train()
    assert not (output_dir / "checkpoints").exists()
    trainer = make_trainer(method, dataset, output_dir)
    turn_round(trainer, -1.0)
    trainer.begin(0)


def test_a_diffusion_model_may_begin_with_the_noise(dataset: TripletDataset, output_dir: Path) -> None:
    """InstaFlow began so: epsilon is what it has to unlearn."""
    trainer = make_trainer("reflow", dataset, output_dir, "diffusion")
    turn_round(trainer, 1.0)
    trainer.begin(0)


def test_only_the_wrong_sign_is_refused(dataset: TripletDataset) -> None:
    noise, data = make_ends()
    batch = Triplets(["a"] * 4, noise, data)
    with pytest.raises(ValueError, match=r"above 0, got -1\.00"):
        require_direction(lambda x_t, t, prompts: noise - data, batch)
    require_direction(lambda x_t, t, prompts: data - noise, batch)
    require_direction(lambda x_t, t, prompts: torch.zeros_like(data), batch)


def test_triplets_of_another_scaling_are_refused(dataset: TripletDataset, output_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset.folder, tmp_path / "triplets")
    path = tmp_path / "triplets" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vae_scaling_factor": 0.13025}))
    other = TripletDataset.__new__(TripletDataset)
    other.__dict__.update(dataset.__dict__, manifest=Manifest.of(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=r"made with a VAE of scaling_factor 0\.13025, the pipeline's has 0\.18215"):
        make_trainer("reflow", other, output_dir)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("reflow", {}),
        ("distill", {}),
        ("progressive", {"pairs": "coupled"}),
        ("dmd", {"regression_weight": 0.1}),
    ],
)
def test_pictures_with_new_noise_are_no_pairs(
    method: str, options: dict[str, Any], dataset: TripletDataset, output_dir: Path
) -> None:
    for manifest in ({"num_inference_steps": 0}, {"parts": [{"num_inference_steps": 25}, {"num_inference_steps": 0}]}):
        by_chance = TripletDataset(dataset.folder)
        by_chance.manifest = Manifest.of({**by_chance.manifest.settings, **manifest})
        with pytest.raises(ValueError, match=r"fits the data of each noise, and there are triplets"):
            make_trainer(method, by_chance, output_dir, **options)
        if options:
            make_trainer(method, by_chance, output_dir)


def test_a_shift_counts_and_its_absence_is_zero() -> None:
    vae = make_vae()
    require_same_latents(vae, Manifest.of({}))
    require_same_latents(
        vae, Manifest.of({"vae_scaling_factor": vae.config["scaling_factor"], "vae_shift_factor": 0.0})
    )
    with pytest.raises(ValueError, match=r"shift_factor 0\.06, the pipeline's has None"):
        require_same_latents(vae, Manifest.of({"vae_shift_factor": 0.06}))


def test_a_second_run_in_the_same_folder_is_refused(output_dir: Path) -> None:
    output = RunFolder(output_dir)
    with output.locked(), pytest.raises(OSError, match=r"Another process is training into .* another output_dir"):
        output.locked().__enter__()
    with output.locked():  # it is free again
        pass


# ------------------------------------------------------------------------------------------------ a full disk


class Usage(NamedTuple):
    total: int
    used: int
    free: int


FULL = {
    "system": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
}


@pytest.fixture(scope="module")
def whole(dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    make_trainer("reflow", dataset, folder, max_steps=4).train()
    return folder


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_leaves_the_last_good_checkpoint(
    error: Exception, whole: Path, dataset: TripletDataset, output_dir: Path
) -> None:
    trainer = make_trainer("reflow", dataset, output_dir, max_steps=4)

    def fail() -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, checkpoint_writing, "write_file", 5, fail)  # in the middle of the second checkpoint
        with pytest.raises(OSError, match=r"No space left in .* for the checkpoint of step 4: .*2 is complete"):
            trainer.train()
    assert checkpoint_steps(output_dir / "checkpoints") == [2]
    assert [path.name for path in (output_dir / "checkpoints").iterdir()] == ["step-00000002"]
    make_trainer("reflow", dataset, output_dir, max_steps=4).train()
    assert digests(output_dir) == digests(whole)


def test_other_errors_of_writing_are_passed_on(
    dataset: TripletDataset, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    fail_at(monkeypatch, checkpoint_writing, "write_file", 1, fail)
    with pytest.raises(PermissionError, match="Permission denied"):
        make_trainer("reflow", dataset, output_dir).train()


def test_too_small_a_disk_is_found_before_the_first_step(
    dataset: TripletDataset, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer("reflow", dataset, output_dir)
    size = 4 * sum(weight.nbytes for weight in trainer.student.parameters)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 3 * size - 1))
    with pytest.raises(OSError, match=r"No space left in .* for the 2 checkpoints to keep and the one being written"):
        trainer.train()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 3 * size))
    trainer.begin(0)
    trainer.train_step(1)
    trainer.save(1)
    trainer.writer.wait()
    written = sum(path.stat().st_size for path in checkpoint_path(output_dir / "checkpoints", 1).glob("*.safetensors"))
    assert written == pytest.approx(size, rel=0.2)  # and headers


def test_checkpoints_that_are_there_need_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 100))
    with pytest.raises(OSError, match="No space left"):
        require_room(tmp_path / "none", 50, keep=2)
    for step in (1, 2):
        checkpoint_path(tmp_path, step).mkdir()
    require_room(tmp_path, 100, keep=2)
