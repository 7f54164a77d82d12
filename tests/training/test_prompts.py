"""Embeddings of prompts are those of the pipeline, do not depend on what was encoded before, and free its encoders."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.training import prompts as prompts_module
from rectified_diffusers.training.prompts import PromptEncoder
from tests.marks import slow_but
from tests.models_any.families import build
from tests.models_any.test_training import make_triplets
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import PROMPTS, SHORT, TRAINERS, digests, make_trainer


def test_remembered_prompts_cost_nothing(dataset: TripletDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PromptEncoder(Denoiser.of(make_tiny_pipeline()), torch.device("cpu"))
    fresh = encoder([PROMPTS[1], "", PROMPTS[1]])
    encoder.remember(dataset)
    assert set(encoder.table) == {"", *PROMPTS}

    def encode(*args: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(encoder, "encode", encode)
    found: Any = encoder([PROMPTS[1], "", PROMPTS[1]])
    assert found["encoder_hidden_states"].dtype == torch.float32
    assert not found["encoder_hidden_states"].requires_grad
    torch.testing.assert_close(found, fresh)


def test_memory_is_bounded(dataset: TripletDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = PromptEncoder(Denoiser.of(make_tiny_pipeline()), torch.device("cpu"))
    one = encoder([""])["encoder_hidden_states"].numel() * 4
    monkeypatch.setattr(prompts_module, "TABLE_BYTES", 4 * one)
    encoder.remember(dataset)
    assert encoder.table
    monkeypatch.setattr(prompts_module, "TABLE_BYTES", 4 * one - 1)
    encoder.remember(dataset)
    assert not encoder.table
    assert encoder(PROMPTS)["encoder_hidden_states"].shape == (4, 77, 16)


def test_unknown_prompts_are_encoded(dataset: TripletDataset) -> None:
    encoder: Any = PromptEncoder(Denoiser.of(make_tiny_pipeline()), torch.device("cpu"))
    encoder.remember(dataset)
    found, expected = (encoder(prompts)["encoder_hidden_states"] for prompts in (["new", PROMPTS[0]], PROMPTS[:1]))
    torch.testing.assert_close(found[1:], expected)


def parkable(part: Any) -> None:
    """Let a model go to the meta device, where nothing can be computed, and come back with its values."""
    kept: dict[str, torch.Tensor] = {}
    move = part.to

    def tensors() -> dict[str, torch.Tensor]:
        named = part.named_parameters(remove_duplicate=False), part.named_buffers(remove_duplicate=False)
        return dict(named[0]) | dict(named[1])

    def to(device: torch.device) -> Any:
        if device.type == "meta" and part.device.type != "meta":
            kept.update({name: tensor.detach().clone() for name, tensor in tensors().items()})
        if device.type == "meta" or part.device.type != "meta":
            return move(device)
        part.to_empty(device=device)
        part.tie_weights()
        with torch.no_grad():
            for name, tensor in tensors().items():
                tensor.copy_(kept[name])
        return part

    part.to = to


@pytest.mark.parametrize(
    ("name", "stored", "method"),
    slow_but(
        [("sd3", True, "distill"), ("unet", False, "progressive")],
        [("sd3", True, "distill"), ("sd3", False, "distill"), ("flux", True, "dmd"), ("unet", False, "progressive")],
    ),
)
def test_text_encoders_are_gone_during_the_steps(
    name: str, stored: bool, method: str, dataset: TripletDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all text encoders on the meta device in every step, a run writes the same files."""
    places: list[str] = []

    def train(folder: Path, idle: str) -> None:
        pipeline, options = (make_tiny_pipeline(), {}) if name == "unet" else build(name)
        triplets = dataset
        if name != "unet":
            triplets = make_triplets(pipeline, tmp_path / "triplets", options, store_text_embeddings=stored)
        encoders = [part for key, part in pipeline.components.items() if key.startswith("text_encoder")]
        for part in encoders:
            parkable(part)
        trainer_class, config_class = TRAINERS[method]
        settings = {**SHORT, "batch_size": 2, "max_steps": 2, "validate_every_steps": 1, "straightness_paths": 1}
        settings |= {"validation_prompts": ("a cat",), "lora_rank": 2}
        if method == "progressive":
            settings |= {"teacher_steps": 2, "steps_per_round": settings.pop("max_steps")}
        more = {"teacher": pipeline} if method == "dmd" else {}
        trainer = trainer_class(pipeline, triplets, config_class(output_dir=folder, **settings), **more)
        train_step = trainer.train_step

        def watched(step: int) -> Any:
            places.extend(part.device.type for part in encoders)
            return train_step(step)

        monkeypatch.setattr(trainer, "train_step", watched)
        monkeypatch.setattr(prompts_module, "IDLE", torch.device(idle))
        trainer.train()
        assert {part.device.type for part in encoders} == {"cpu"}

    train(tmp_path / "here", "cpu")
    assert set(places) == {"cpu"}
    places.clear()
    train(tmp_path / "gone", "meta")
    assert set(places) == {"meta"}
    assert digests(tmp_path / "here") == digests(tmp_path / "gone")


def test_text_encoders_stay_if_steps_need_them(
    dataset: TripletDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts_module, "TABLE_BYTES", 0)
    monkeypatch.setattr(prompts_module, "IDLE", torch.device("meta"))
    trainer = make_trainer("reflow", dataset, tmp_path, max_steps=1)
    trainer.train()
    assert not trainer.prompt_encoder.complete
    assert trainer.pipeline.text_encoder.device.type == "cpu"
