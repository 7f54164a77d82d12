import json
import sys

import pytest
import torch

from rectified_diffusers.evaluation.features import CLIPScore, clip_cosines


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A CLIP of open_clip's own classes at a tiny size, known under a name."""
    open_clip = pytest.importorskip("open_clip")
    tower = {"layers": 1, "width": 64}
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "head_width": 32, **tower},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "heads": 2, **tower},
    }
    path = tmp_path_factory.mktemp("clip") / "tiny-clip.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return CLIPScore("tiny-clip", None)


def test_embeddings_are_unit_vectors_of_the_model(tiny_clip):
    images = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    found, texts = tiny_clip.embed_images(images), tiny_clip.embed_texts(["a cat", "a dog", "the sea"], batch_size=2)
    assert found.shape == texts.shape == (3, 16)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))
    tokens = tiny_clip.tokenizer(["a dog"])
    expected = torch.nn.functional.normalize(tiny_clip.network.encode_text(tokens), dim=-1)
    torch.testing.assert_close(texts[1:2], expected)


def test_the_score_is_the_cosine_of_each_pair():
    images = torch.tensor([[1.0, 0], [0, 1]])
    texts = torch.tensor([[0.6, 0.8], [0, 1]])
    assert clip_cosines(images, texts).tolist() == pytest.approx([0.6, 1])


def test_what_is_wrong_is_told(monkeypatch):
    pytest.importorskip("open_clip")
    with pytest.raises(ValueError, match="cannot load model 'no-such-model'"):
        CLIPScore("no-such-model", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        CLIPScore("ViT-B-32", None)
