"""A run goes on only from the model it began with, and a finished model counts only if every file is as written."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.teacher import fingerprints
from rectified_diffusers.training.checkpoint_reading import STATE, checkpoint_path, sealed, unsealed
from rectified_diffusers.training.identity import STARTING_MODEL
from rectified_diffusers.training.run_folder import FILES, INDEX, RECORD
from tests.marks import slow_but
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import TRAINERS, digests, make_trainer

LORA: dict[str, Any] = {"lora_rank": 2, "lora_target_modules": ("to_q",)}


def change_one_value(name: str) -> Callable[[Any], None]:
    """Return what changes one value in the middle of the largest tensor of a component."""

    def change(pipeline: Any) -> None:
        largest = max(getattr(pipeline, name).state_dict().values(), key=lambda tensor: tensor.numel())
        with torch.no_grad():
            largest.view(-1)[largest.numel() // 2 + 1] += 1e-3

    return change


def replace_part(name: str) -> Callable[[Any], None]:
    return lambda pipeline: pipeline.register_modules(**{name: getattr(make_tiny_pipeline("flow", seed=3), name)})


def add_token(pipeline: Any) -> None:
    pipeline.tokenizer = copy.deepcopy(pipeline.tokenizer)  # all tiny pipelines share theirs
    pipeline.tokenizer.add_tokens(["blorp"])


def to_half(pipeline: Any) -> None:
    pipeline.text_encoder.half()


def turn_the_velocity(pipeline: Any) -> None:
    pipeline.scheduler.register_to_config(velocity_direction="noise")


OTHER_MODELS: dict[str, tuple[Callable[[Any], None], str]] = {
    "another U-Net": (replace_part("unet"), "unet"),
    "another VAE": (replace_part("vae"), "vae"),
    "another text encoder": (replace_part("text_encoder"), "text_encoder"),
    "another tokenizer": (add_token, "tokenizer"),
    "another sign": (turn_the_velocity, "scheduler"),
    "one value of the U-Net": (change_one_value("unet"), "unet"),
    "one value of the VAE": (change_one_value("vae"), "vae"),
    "one value of the text encoder": (change_one_value("text_encoder"), "text_encoder"),
    "another precision": (to_half, "text_encoder"),
}


def trainer_of(model: Any, method: str, dataset: TripletDataset, folder: Path, **options: Any) -> Any:
    """Return a trainer of another pipeline than the tiny one."""
    trainer = make_trainer(method, dataset, folder, **options)
    trainer_class, config = type(trainer), trainer.config
    teacher = {"teacher": trainer.teacher_denoiser.pipeline} if method == "dmd" else {}
    return trainer_class(model, dataset, config, **teacher)  # pyright: ignore[reportCallIssue]


@pytest.fixture(scope="module")
def begun(dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, which more steps may follow."""
    folder = tmp_path_factory.mktemp("begun")
    make_trainer("distill", dataset, folder, max_steps=2).train()
    return folder


@pytest.mark.parametrize(
    "variant",
    slow_but(["another U-Net", "another tokenizer", "another sign", "one value of the VAE"], OTHER_MODELS),
)
def test_a_run_does_not_go_on_from_another_model(variant: str, begun: Path, dataset: TripletDataset) -> None:
    change, part = OTHER_MODELS[variant]
    model, before = make_tiny_pipeline("flow"), digests(begun)
    change(model)
    with pytest.raises(ValueError, match=f"a run that started from a model with another {part}\\. Give that model"):
        trainer_of(model, "distill", dataset, begun, max_steps=4).train()
    assert digests(begun) == before


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINERS)
def test_no_method_goes_on_from_another_model(method: str, dataset: TripletDataset, tmp_path: Path) -> None:
    shortest = {"teacher_steps": 2, "steps_per_round": 1} if method == "progressive" else {"max_steps": 1}
    options = shortest if method == "dmd" else {**LORA, **shortest}
    make_trainer(method, dataset, tmp_path, **options).train()
    model = make_tiny_pipeline("flow")
    replace_part("unet")(model)
    with pytest.raises(ValueError, match="another unet"):
        trainer_of(model, method, dataset, tmp_path, **options).train()


def test_another_rank_of_a_lora_is_refused(dataset: TripletDataset, tmp_path: Path) -> None:
    make_trainer("distill", dataset, tmp_path, max_steps=1, **LORA).train()
    with pytest.raises(ValueError, match="lora_rank=2, got lora_rank=4"):
        make_trainer("distill", dataset, tmp_path, max_steps=2, **{**LORA, "lora_rank": 4}).train()


def test_the_identity_is_of_content_not_of_the_place(tmp_path: Path) -> None:
    pipeline = make_tiny_pipeline("flow")
    expected = fingerprints(pipeline)
    assert set(expected) == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    pipeline.save_pretrained(tmp_path)
    assert fingerprints(type(pipeline).from_pretrained(tmp_path)) == expected


def test_a_fingerprint_warns_of_no_long_prompt() -> None:
    pipeline = make_tiny_pipeline()
    pipeline.tokenizer = copy.deepcopy(pipeline.tokenizer)  # the other tests share it
    pipeline.tokenizer.model_max_length = 5
    with mock.patch("transformers.tokenization_utils_base.logger.warning") as warning:
        fingerprints(pipeline)
    warning.assert_not_called()


def test_a_checkpoint_without_the_model_is_resumed(dataset: TripletDataset, tmp_path: Path, begun: Path) -> None:
    make_trainer("distill", dataset, tmp_path, max_steps=2).train()
    path = checkpoint_path(tmp_path / "checkpoints", 2) / STATE
    state = unsealed(path.read_text())
    del state["run"][STARTING_MODEL]
    path.write_text(sealed(state))
    make_trainer("distill", dataset, tmp_path, max_steps=2).train()
    assert digests(tmp_path)[RECORD] == digests(begun)[RECORD]


# ---------------------------------------------------------------------------------------------- the result

UNET, VAE, TEXT = (f"{part}/{name}" for part, name in (
    ("unet", "diffusion_pytorch_model.safetensors"),
    ("vae", "diffusion_pytorch_model.safetensors"),
    ("text_encoder", "model.safetensors"),
))  # fmt: skip


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{f"{name} truncated": (truncate, name) for name in (UNET, VAE, TEXT)},
    **{f"{name} changed, of equal size": (flip, name) for name in (UNET, VAE, TEXT)},
    **{f"{name} missing": (Path.unlink, name) for name in (UNET, VAE, "scheduler/scheduler_config.json")},
    "config changed": (lambda path: path.write_text(path.read_text() + " "), "unet/config.json"),
    "index changed": (lambda path: path.write_text("{}"), INDEX),
    "tokenizer emptied": (lambda path: path.write_bytes(b""), "tokenizer/vocab.json"),
}
FOUND_BY_HEADERS = [f"{name} truncated" for name in (UNET, VAE, TEXT)] + [f"{UNET} missing", f"{VAE} missing"]


@pytest.mark.parametrize(
    "variant",
    slow_but([f"{UNET} truncated", f"{TEXT} changed, of equal size", f"{VAE} missing", "index changed"], DAMAGES),
)
def test_a_damaged_result_is_written_again(
    variant: str, begun: Path, dataset: TripletDataset, caplog: pytest.LogCaptureFixture
) -> None:
    damage, name = DAMAGES[variant]
    before = digests(begun)
    damage(begun / name)
    assert digests(begun) != before
    with caplog.at_level(logging.WARNING):
        make_trainer("distill", dataset, begun, max_steps=2).train()
    assert f"is not as it was written ({name})" in caplog.text
    assert digests(begun) == before


@pytest.mark.parametrize("variant", slow_but([f"{UNET} truncated", f"{VAE} missing"], FOUND_BY_HEADERS))
def test_without_a_record_of_files_the_headers_are_checked(
    variant: str, begun: Path, dataset: TripletDataset, caplog: pytest.LogCaptureFixture
) -> None:
    before = digests(begun)
    forget(begun)
    damage, name = DAMAGES[variant]
    damage(begun / name)
    with caplog.at_level(logging.WARNING):
        make_trainer("distill", dataset, begun, max_steps=2).train()
    assert f"is not as it was written ({Path(name).parent})" in caplog.text
    assert digests(begun) == before


def test_a_whole_result_is_left_alone(begun: Path, dataset: TripletDataset) -> None:
    times = {path: path.stat().st_mtime_ns for path in begun.rglob("*") if path.is_file()}
    kept = {name: (begun / name).read_text() for name in ("README.md", RECORD, FILES)}
    (begun / "README.md").write_text(kept["README.md"] + "my own words")
    make_trainer("distill", dataset, begun, max_steps=2).train()
    assert (begun / "README.md").read_text().endswith("my own words")
    forget(begun)
    make_trainer("distill", dataset, begun, max_steps=2).train()
    assert STARTING_MODEL not in json.loads((begun / RECORD).read_text())
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.parent != begun)
    for name, text in kept.items():
        (begun / name).write_text(text)


def forget(folder: Path) -> None:
    """Remove what preview releases did not write."""
    (folder / FILES).unlink()
    record = json.loads((folder / RECORD).read_text())
    del record[STARTING_MODEL]
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
