"""One folder of triplets for all tests of the trainers, and no progress bars."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers.utils import logging as diffusers_logging

from rectified_diffusers.data.dataset import TripletDataset
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
