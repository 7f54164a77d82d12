"""Embeddings of prompts are those of the pipeline and do not depend on what was encoded before."""

from typing import Any

import pytest
import torch

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.training import prompts as prompts_module
from rectified_diffusers.training.prompts import PromptEncoder
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import PROMPTS


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
