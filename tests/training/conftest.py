"""One folder of triplets for all tests of the trainers, no progress bars, and charts in the tests of reports alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers.utils import logging as diffusers_logging

from rectified_diffusers.data.dataset import TripletDataset
from tests.training.helpers import make_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TripletDataset:
    return make_dataset(tmp_path_factory.mktemp("triplets"))


@pytest.fixture(scope="module", autouse=True)
def _no_charts(request: pytest.FixtureRequest) -> None:
    if request.module.__name__ != "tests.training.test_report":
        request.getfixturevalue("plain_charts")


@pytest.fixture(autouse=True)
def _no_progress_bar() -> Iterator[None]:
    diffusers_logging.disable_progress_bar()
    yield
    diffusers_logging.enable_progress_bar()


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"
