import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional as F

from rectified_diffusers.evaluation.alignment import (
    AlignmentConfig,
    AlignmentModel,
    SentenceFeatures,
    contrastive_loss,
    retrieval,
    train_alignment,
)


def units(*shape, seed=0):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


@given(seed=st.integers(0, 2**31))
def test_distinct_captions_give_the_loss_of_clip(seed):
    images, texts = units(4, 4, seed=seed), units(4, 4, seed=seed + 1)
    scale = torch.tensor(1.3, dtype=torch.float64)
    logits = images @ texts.T * scale.exp()
    labels = torch.arange(4)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss = contrastive_loss(images, texts, labels, scale)
    assert loss.shape == (4,)
    torch.testing.assert_close(loss.mean(), expected)


def test_pictures_of_one_caption_are_no_negatives():
    """With a second picture of caption 0 in the batch, pair 0 loses exactly what it loses without it."""
    images, texts = units(3, 8), units(2, 8, seed=1)
    scale = torch.tensor(1.0, dtype=torch.float64)
    both = contrastive_loss(images, texts[[0, 1, 0]], torch.tensor([0, 1, 0]), scale)
    alone = contrastive_loss(images[:2], texts, torch.tensor([0, 1]), scale)
    torch.testing.assert_close(both[0], alone[0])
    assert both.isfinite().all()
    one_caption = contrastive_loss(images, texts[[0, 0, 0]], torch.zeros(3, dtype=torch.long), scale)
    torch.testing.assert_close(one_caption, torch.zeros(3, dtype=torch.float64))


def test_the_scale_is_bounded():
    images, texts, captions = units(4, 4), units(4, 4, seed=1), torch.arange(4)
    at_bound = contrastive_loss(images, texts, captions, torch.tensor(math.log(100)))
    torch.testing.assert_close(contrastive_loss(images, texts, captions, torch.tensor(50.0)), at_bound)


def world(pictures=400, captions=40, seed=0):
    """Pictures and captions that are noisy linear views of one thing."""
    generator = torch.Generator().manual_seed(seed)
    things = torch.randn(captions, 6, generator=generator)
    views = torch.randn(2, 6, 24, generator=generator)
    rows = torch.randint(captions, (pictures,), generator=generator)
    images = things[rows] @ views[0] + 0.3 * torch.randn(pictures, 24, generator=generator)
    return images, things @ views[1], rows


def test_training_aligns_pictures_it_has_not_seen():
    images, texts, captions = world()
    config = AlignmentConfig(joint_dimensions=8, max_steps=150, batch_size=64, learning_rate=1e-2)
    model = train_alignment(images[:200], texts, captions[:200], config, progress=False)
    scores = retrieval(model.embed_images(images[200:]), model.embed_texts(texts), captions[200:], candidates=10)
    assert scores.r_precision > 0.9
    assert scores.recall_at_1 > 0.7
    assert not model.training


def test_training_repeats_and_leaves_the_global_generator_alone():
    images, texts, captions = world()
    config = AlignmentConfig(joint_dimensions=4, max_steps=3, batch_size=16)
    state = torch.get_rng_state()
    first = train_alignment(images, texts, captions, config, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    second = train_alignment(images, texts, captions, config, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    untrained = AlignmentModel(24, 24, 4)
    assert all(not torch.equal(a, b) for a, b in zip(first.parameters(), untrained.parameters(), strict=True))


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = AlignmentModel(5, 7, 3)
    model.save(tmp_path / "alignment.safetensors")
    loaded = AlignmentModel.load(tmp_path / "alignment.safetensors")
    features = torch.randn(2, 5)
    assert torch.equal(model.embed_images(features), loaded.embed_images(features))
    assert torch.equal(model.log_scale, loaded.log_scale)


def test_a_file_that_is_no_model_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no alignment model"):
        AlignmentModel.load(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no alignment model"):
        AlignmentModel.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("candidates", [2, 5, 12])
def test_r_precision_is_what_draws_estimate(candidates):
    images, texts = units(30, 3), units(12, 3, seed=1)
    captions = torch.arange(30) % 12
    exact = retrieval(images, texts, captions, candidates)
    generator = torch.Generator().manual_seed(0)
    wins = []
    for image, caption in zip(images, captions.tolist(), strict=True):
        others = torch.tensor([i for i in range(12) if i != caption])
        for _ in range(200):
            drawn = others[torch.randperm(11, generator=generator)[: candidates - 1]]
            wins.append(bool((texts[drawn] @ image < texts[caption] @ image).all()))
    assert exact.r_precision == pytest.approx(sum(wins) / len(wins), abs=0.02)
    if candidates == 12:
        assert exact.r_precision == pytest.approx(exact.recall_at_1, rel=1e-9)


def test_retrieval_knows_its_extremes():
    texts = torch.eye(8)
    captions = torch.arange(8)
    perfect = retrieval(texts, texts, captions, candidates=5)
    assert perfect.recall_at_1 == perfect.r_precision == 1
    assert retrieval(-texts, texts, captions, candidates=2).r_precision == 0
    # All texts alike: a tie counts as beaten, so that a constant model scores nothing.
    assert retrieval(texts, torch.ones(8, 8), captions, candidates=2).r_precision == 0


@pytest.mark.parametrize(
    ("captions", "candidates", "message"),
    [
        (torch.tensor([0, 1]), 9, "from 2 to the 4 texts"),
        (torch.tensor([0, 4]), 2, "number the rows"),
        (torch.tensor([0]), 2, "2 integers"),
        (torch.tensor([0.0, 1.0]), 2, "2 integers"),
    ],
)
def test_wrong_captions_are_told(captions, candidates, message):
    with pytest.raises(ValueError, match=message):
        retrieval(units(2, 3), units(4, 3), captions, candidates)


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"batch_size": 0}, {"joint_dimensions": 0}])
def test_wrong_options_are_told(options):
    with pytest.raises(ValueError, match="at least 1"):
        AlignmentConfig(**options)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_rates_that_are_no_rates_are_told(name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite and not negative, got {value}"):
        AlignmentConfig(**{name: value})


def test_sentence_features_do_not_see_the_padding(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "fish"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path)
    encode = SentenceFeatures(tmp_path, batch_size=2)
    together = encode(["a red apple", "fish", "a fish"])
    assert together.shape == (3, 8)
    torch.testing.assert_close(together[1:2], encode(["fish"]), rtol=1e-5, atol=1e-6)
