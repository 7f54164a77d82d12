"""One folder of triplets for all tests of the trainers, and no progress bars."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file

from rectified_diffusers.data.triplets import TripletDataset
from tests.training.helpers import make_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TripletDataset:
    return make_dataset(tmp_path_factory.mktemp("triplets"))


@pytest.fixture(autouse=True)
def _no_progress_bar() -> Iterator[None]:
    diffusers_logging.disable_progress_bar()
    yield
    diffusers_logging.enable_progress_bar()


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights under torchvision's names."""
    pytest.importorskip("lpips", reason="the lpips loss needs lpips and torchvision", exc_type=ImportError)
    from torchvision.models import alexnet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = alexnet(weights=None).features.state_dict(prefix="features.")
    path = tmp_path_factory.mktemp("lpips") / "alexnet.safetensors"
    save_file(weights, path)
    return path
