"""Real pictures, judges and weights at tiny sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor

from rectified_diffusers.evaluation import judges
from rectified_diffusers.evaluation.alignment import AlignmentModel

CAPTIONS = {"a red apple": "train", "the sea": "train", "a cat": "train", "two dogs": "caption"}
SIZE = 32  # pixels of the tiny pipeline's pictures
PER_CAPTION = 6
DIMENSIONS = 8


@pytest.fixture(autouse=True)
def _no_progress_bar():
    diffusers_logging.disable_progress_bar()
    yield
    diffusers_logging.enable_progress_bar()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """An imagefolder: six noisy pictures of each caption, half of them in a style of their own, one split held out."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    lines = []
    for number, (caption, split) in enumerate(CAPTIONS.items()):
        color = draw.integers(0, 200, 3)
        for i in range(PER_CAPTION):
            pixels = (color + draw.integers(0, 56, (SIZE, SIZE + 8, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}-{i}.png")
            style = "pencil" if i % 2 else "oil"
            lines.append({"file_name": f"{number}-{i}.png", "text": caption, "split": split, "style": style})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
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
    monkeypatch.setattr(judges, "mobilenet_judge", lambda *args: judges.Judge("pooled", lambda: features, False))
    return features


@pytest.fixture(scope="session")
def sentence_encoder(tmp_path_factory) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("sentences")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({w for caption in CAPTIONS for w in caption.split()}),
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
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
