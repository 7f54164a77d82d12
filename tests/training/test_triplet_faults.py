"""What training does with triplets that come with text embeddings, and with ones that changed on the disk."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.generate import generate_triplets
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.training.prompts import PromptEncoder
from tests.marks import slow_but
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import PROMPTS, digests, make_trainer


def make_triplets(folder: Path, kind: Any = "flow", **options: Any) -> TripletDataset:
    settings: dict[str, Any] = {"num_triplets": 8, "triplets_per_shard": 2, "batch_size": 4, "num_inference_steps": 2}
    config = TripletConfig(**{**settings, "storage_dtype": "float32", **options})
    return generate_triplets(make_tiny_pipeline(kind), PROMPTS, folder, config, progress=False)


@pytest.mark.parametrize("kind", slow_but(["flow"], ["flow", "xl"]))
def test_training_on_stored_embeddings_repeats_training_with_the_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    encode, encoded = PromptEncoder.encode, []

    def record(self: PromptEncoder, prompts: list[str]) -> Any:
        encoded.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(PromptEncoder, "encode", record)
    students = []
    for stored in (False, True):
        dataset = make_triplets(tmp_path / f"triplets-{stored}", kind, store_text_embeddings=stored)
        encoded.clear()
        trainer = make_trainer("reflow", dataset, tmp_path / f"run-{stored}", kind, max_steps=3, prompt_dropout=0.5)
        students.append(trainer.train().state_dict())
    assert set(encoded) == {"", PROMPTS[0]}, "the empty prompt, and one to compare the text encoders by"
    for name, value in students[0].items():
        torch.testing.assert_close(students[1][name], value, rtol=1e-4, atol=1e-5)


def test_embeddings_of_another_text_encoder_raise(tmp_path: Path) -> None:
    dataset = make_triplets(tmp_path, store_text_embeddings=True)
    PromptEncoder(Denoiser.of(make_tiny_pipeline()), torch.device("cpu")).remember(dataset)
    # A teacher in half precision has other last digits.
    PromptEncoder(Denoiser.of(make_tiny_pipeline().to(torch.bfloat16)), torch.device("cpu")).remember(dataset)
    other = PromptEncoder(Denoiser.of(make_tiny_pipeline(seed=1)), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"of other text encoders.*encoder_hidden_states of prompt 'a red apple'"):
        other.remember(dataset)


def test_a_damaged_shard_stops_the_training_and_leaves_its_checkpoint(tmp_path: Path) -> None:
    dataset = make_triplets(tmp_path / "triplets")
    whole = make_trainer("reflow", dataset, tmp_path / "whole").train().state_dict()
    path = tmp_path / "triplets" / "shard-00001.safetensors"
    content = path.read_bytes()
    trainer = make_trainer("reflow", dataset, tmp_path / "run")
    save = trainer.save

    def damage_after(step: int) -> None:
        save(step)
        if step == 2:
            damaged = bytearray(content)
            for row in (0, 1):
                damaged[-1 - row * 4 * 8 * 8 * 4] ^= 1
            with path.open("r+b") as file:  # in place, as a disk does it
                file.write(damaged)
                os.fsync(file.fileno())

    trainer.save = damage_after
    with pytest.raises(ValueError, match=r"Row \d of .*shard-00001.safetensors fails its checksum.*make it again"):
        trainer.train()
    checkpoints = digests(tmp_path / "run" / "checkpoints")
    path.unlink()
    dataset = make_triplets(tmp_path / "triplets")
    assert path.read_bytes() == content
    resumed = make_trainer("reflow", dataset, tmp_path / "run")
    assert digests(tmp_path / "run" / "checkpoints") == checkpoints
    student = resumed.train().state_dict()
    assert all(torch.equal(student[name], value) for name, value in whole.items())
