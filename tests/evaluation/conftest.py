"""Real pictures, judges and weights at tiny sizes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from rectified_diffusers.evaluation import scorers as judges
from rectified_diffusers.evaluation.alignment import AlignmentModel
from tests.tiny_inputs import write_pictures, write_sentence_encoder

DIMENSIONS = 8


@pytest.fixture(autouse=True)
def _no_progress_bar():
    diffusers_logging.disable_progress_bar()
    yield
    diffusers_logging.enable_progress_bar()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """An imagefolder of `tests.tiny_inputs`."""
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder)
    return folder


class Pooled:
    """Fixed random features of a picture at 4x4 pixels; counts the pictures it has seen."""

    def __init__(self) -> None:
        self.weights = torch.randn(48, DIMENSIONS, generator=torch.Generator().manual_seed(0))
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4)
        return small.flatten(1) @ self.weights


@pytest.fixture
def pooled(monkeypatch) -> Pooled:
    """Cheap features in the place of MobileNetV2's, whose covariance takes seconds to take the root of."""
    features = Pooled()
    monkeypatch.setattr(judges, "mobilenet_scorer", lambda *args: judges.Scorer("pooled", lambda: features, False))
    return features


@pytest.fixture(scope="session")
def sentence_encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sentences")
    write_sentence_encoder(folder)
    return folder


@pytest.fixture(scope="session")
def alignment(tmp_path_factory) -> Path:
    """A judge, as examples/emoji/alignment.py leaves it, that has not seen one of the styles."""
    folder = tmp_path_factory.mktemp("alignment")
    AlignmentModel(DIMENSIONS, 8, 4).save(folder / "alignment.safetensors")
    (folder / "alignment.json").write_text(json.dumps({"image_size": 32, "unseen_style": "pencil"}))
    return folder


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """Random weights in the layout of torch-fidelity, small enough that nothing overflows."""
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from unittest.mock import patch

    from safetensors.torch import save_file

    with patch.object(torch.nn.Module, "load_state_dict"), patch.object(library, "load_state_dict_from_url"):
        network = library.FeatureExtractorInceptionV3("inception-v3", ["2048"])
    generator = torch.Generator().manual_seed(0)
    weights = network.state_dict()
    for name, tensor in weights.items():
        if name.endswith("conv.weight"):
            fan_in = tensor[0].numel()
            weights[name] = torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path
