"""The Hub, a client of it, and what it serves: the published InstaFlow layout and what we save ourselves."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler

from tests.hub.client import sample
from tests.hub.server import Hub, Repository, read_files, the_hub
from tests.tiny import make_components, make_feature_extractor, make_safety_checker, make_tiny_pipeline

INSTAFLOW = "XCLiu/instaflow_0_9B_from_sd_1_5"
TWO_FLOW = "XCLiu/2_rectified_flow_from_sd_1_5"
OURS = "somebody/emoji-one-step"


def save_published(folder: Path, seed: int) -> Path:
    """Save a tiny checkpoint in the layout of the published ones; their model index, key by key."""
    parts: dict[str, Any] = {
        **make_components(seed),
        "scheduler": PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        "safety_checker": make_safety_checker(flags=False),
        "feature_extractor": make_feature_extractor(),
    }
    parts.pop("requires_safety_checker")
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {
        "_class_name": "RectifiedFlowPipeline",
        "_diffusers_version": "0.21.0.dev0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    return folder


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """The Hub with the three repositories; 2-Rectified Flow has two versions, v1 and the newer main."""
    hub = the_hub()
    make = tmp_path_factory.mktemp("made")
    with torch.random.fork_rng(devices=[]):
        files = [read_files(save_published(make / str(seed), seed)) for seed in (0, 1)]
    make_tiny_pipeline("flow").save_pretrained(make / "ours")
    hub.repositories |= {INSTAFLOW: Repository(), TWO_FLOW: Repository(), OURS: Repository()}
    hub.repositories[INSTAFLOW].commit(files[0])
    hub.repositories[TWO_FLOW].commit(files[0], "v1")
    hub.repositories[TWO_FLOW].commit(files[1])
    hub.repositories[OURS].commit(read_files(make / "ours"))
    return hub


@pytest.fixture(scope="session")
def expected() -> list[Any]:
    """The latents of the weights that InstaFlow's repository, version v1 of 2-Rectified Flow's, and ours hold."""
    return sample(make_tiny_pipeline("flow")).tolist()


@pytest.fixture(autouse=True)
def _recovery(hub: Hub) -> Iterator[None]:
    yield
    hub.recover()


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")
