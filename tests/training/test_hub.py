"""The way to the Hub: a finished model with its card, from a process that is online, to a Hub on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from huggingface_hub import ModelCard

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.training.config import ReflowConfig
from rectified_diffusers.training.model_card import Card, base_model_of
from tests.hub.client import Client
from tests.hub.server import Hub, the_hub
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import make_trainer


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = the_hub()
    yield hub
    hub.recover()


def train_and_push(triplets: Path, output_dir: Path, token: str | None, **options: Any) -> str | None:
    """Train in the process that is online; return the text of the error, if there is one."""
    environment = {"HF_TOKEN": token} if token else {}
    try:
        with mock.patch.dict(os.environ, environment):
            trainer = make_trainer(
                "distill", TripletDataset(triplets), output_dir, max_steps=2, push_to_hub=True, **options
            )
            trainer.pipeline.register_to_config(_name_or_path="somebody/base")
            trainer.train()
    except OSError as error:
        return str(error)
    return None


def files_of(hub: Hub, repo_id: str) -> dict[str, bytes]:
    repository = hub.repositories[repo_id]
    return dict(repository.commits[repository.names["main"]])


def test_a_pipeline_is_uploaded_and_loads(hub: Hub, client: Client, dataset: TripletDataset, output_dir: Path) -> None:
    repo_id = "somebody/one-step"
    options = {"hub_model_id": repo_id, "straightness_paths": 2, "validate_every_steps": 2}
    assert client.call(
        train_and_push, dataset.folder, output_dir, "hf_x", **options, validation_prompts=("a cat",)
    ) is None  # fmt: skip
    files = files_of(hub, repo_id)
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "README.md", "training.json"} <= set(files)
    assert not [name for name in files if name.startswith(("checkpoints", "validation", "trackers"))]
    assert all(files[name] == (output_dir / name).read_bytes() for name in files)
    loaded = client.load("DiffusionPipeline", repo_id)
    assert (loaded.pipeline, loaded.scheduler) == ("RectifiedFlowPipeline", "RectifiedFlowEulerScheduler")
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict() == {
        "base_model": "somebody/base",
        "base_model_relation": "finetune",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["rectified-flow", "rectified_diffusers", "distillation"],
    }
    for text in (
        "| learning_rate | 0.001 |",
        "| steps | 2 |",
        "Straightness S(Z)",
        "over 2 paths",
        "num_inference_st",
    ):
        assert text in card.text
    assert str(output_dir) not in card.content


def test_of_a_lora_its_weights_alone(hub: Hub, client: Client, dataset: TripletDataset, output_dir: Path) -> None:
    repo_id = "somebody/lora"
    assert client.call(train_and_push, dataset.folder, output_dir, "hf_x", hub_model_id=repo_id, lora_rank=2) is None
    files = files_of(hub, repo_id)
    assert set(files) == {"README.md", "pytorch_lora_weights.safetensors", "training.json"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "lora" in (card.data.tags or [])
    assert 'pipeline.load_lora_weights("REPOSITORY_OR_FOLDER")' in card.text


def test_no_login_is_found_before_the_first_step(
    hub: Hub, client: Client, dataset: TripletDataset, output_dir: Path
) -> None:
    error = client.call(train_and_push, dataset.folder, output_dir, None, hub_model_id="somebody/never")
    assert error is not None
    assert "'somebody/never' on the Hub can be neither made nor used" in error
    assert "hf auth login" in error
    assert not (output_dir / "checkpoints").exists()
    assert "somebody/never" not in hub.repositories


def test_an_upload_that_failed_is_made_by_the_same_command(
    hub: Hub, client: Client, dataset: TripletDataset, output_dir: Path
) -> None:
    repo_id = "somebody/later"
    make_trainer("distill", dataset, output_dir, max_steps=2).train()
    hub.fail()
    error = client.call(train_and_push, dataset.folder, output_dir, "hf_x", hub_model_id=repo_id)
    assert error is not None
    assert f"The finished model is in {output_dir}, but its upload to '{repo_id}' failed" in error
    assert "Run the same again to upload it" in error
    hub.recover()
    assert client.call(train_and_push, dataset.folder, output_dir, "hf_x", hub_model_id=repo_id) is None
    assert "model_index.json" in files_of(hub, repo_id)


def test_every_run_leaves_a_card(dataset: TripletDataset, output_dir: Path) -> None:
    make_trainer("reflow", dataset, output_dir).train()
    card = ModelCard.load(output_dir / "README.md")
    assert "base_model" not in card.data.to_dict()
    assert "# Rectified flow for text-to-image" in card.text
    assert "Training loss (l2)" in card.text
    assert "Straightness" not in card.text
    code = card.text.split("```python\n")[1].split("```")[0].replace("REPOSITORY_OR_FOLDER", str(output_dir))
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["image"].size == (32, 32)


def test_a_base_model_is_named_by_its_id_alone(tmp_path: Path) -> None:
    pipeline: Any = make_tiny_pipeline()
    names = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "/home/me/.cache/huggingface/hub/models--a-b--c.d/snapshots/0123": "a-b/c.d",
        "/home/me/models/mine": None,
        "": None,
    }
    for name, expected in names.items():
        pipeline.register_to_config(_name_or_path=name)
        assert base_model_of(pipeline) == expected


def test_a_card_of_another_trainer_says_its_name() -> None:
    card = str(Card({"trainer": "MineTrainer", "steps": 1}, RectifiedFlowPipeline, "a/b", 1, {}))
    assert "# Rectified flow trained from a/b" in card
    assert "MineTrainer" in card


def test_push_to_hub_needs_a_repository() -> None:
    with pytest.raises(ValueError, match="push_to_hub is set but hub_model_id is not"):
        ReflowConfig(output_dir=Path("run"), push_to_hub=True)
