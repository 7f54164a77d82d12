"""Settings shared by all tests: one thread, no network, one hypothesis profile."""

import gc
import os

# Set before torch and huggingface_hub are imported: both read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.error import URLError

import pytest
import torch
from hypothesis import settings

settings.register_profile("rectified_diffusers", deadline=None, derandomize=True)
settings.load_profile("rectified_diffusers")
torch.set_num_threads(1)
gc.disable()  # until all tests are imported: imported objects are never freed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--comfyui", metavar="CHECKOUT", help="run tests/test_comfyui.py with this checkout of ComfyUI")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make every very slow test a slow one too, before tests are selected by their markers."""
    for item in items:
        if item.get_closest_marker("very_slow"):
            item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Exclude the half million objects of the imports from every later garbage collection.

    A collection of all others, lazily imported ones too, takes half a second: with the usual thresholds, every tenth
    test would wait for one.
    """
    gc.freeze()
    gc.set_threshold(20_000, 10, 50)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_idle_waiting() -> Iterator[None]:
    """Leave out what costs time and changes nothing here: no test cuts the power, and a machine may have no GPU.

    An fsync waits for the disk; a descriptor that is not open still raises. `torch.manual_seed` also leaves a seed for
    each kind of GPU that has not been used yet, together with a formatted stack, at ten times the cost of the seed.
    """

    def ignore(*args: Any, **kwargs: Any) -> None:
        pass

    with ExitStack() as stack:
        stack.enter_context(mock.patch("os.fsync", os.fstat))
        for module in () if torch.cuda.is_available() else ("torch.cuda.random", "torch.xpu.random"):
            stack.enter_context(mock.patch(f"{module}._lazy_call", ignore))
        yield


@pytest.fixture
def tiny_pipeline() -> Callable[..., Any]:
    """Return `make_tiny_pipeline(kind="flow" | "diffusion")`; each call builds a new pipeline with equal weights."""
    from tests.tiny import make_tiny_pipeline

    return make_tiny_pipeline


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    """A process with our package, online at a Hub on this machine: see `tests.hub.client`."""
    from tests.hub.client import start_client

    with start_client(with_us=True) as client:
        yield client


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set up torch.hub with no cached weights and no way to fetch them."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)


@pytest.fixture(scope="module")
def plain_charts() -> Iterator[None]:
    """Leave the drawings out of the charts of a training's report: they take as long as a short training.

    `tests/training/test_report.py` has them.
    """
    from rectified_diffusers.training import report

    def chart(title: str, note: str, figure: Any) -> str:
        return f"<figure>{title}: {note}</figure>"

    with mock.patch.object(report, "_chart", chart):
        yield


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights under torchvision's names."""
    pytest.importorskip("lpips", reason="the lpips loss needs lpips and torchvision", exc_type=ImportError)
    from tests.tiny_inputs import write_backbone

    path = tmp_path_factory.mktemp("lpips") / "alexnet.safetensors"
    write_backbone(path)
    return path


@pytest.fixture(autouse=True)
def _random_state() -> None:
    """Start every test from the same global random state, so that the order of tests has no effect."""
    torch.manual_seed(0)
