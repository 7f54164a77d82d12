import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from rectified_diffusers.evaluation.alignment import AlignmentModel, SentenceFeatures, retrieval


def units(*shape, seed=0):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = AlignmentModel(5, 7, 3)
    model.save(tmp_path / "alignment.safetensors")
    loaded = AlignmentModel.load(tmp_path / "alignment.safetensors")
    features = torch.randn(2, 5)
    assert torch.equal(model.embed_images(features), loaded.embed_images(features))
    assert torch.equal(model.log_scale, loaded.log_scale)


def test_a_file_that_is_no_model_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="No alignment model"):
        AlignmentModel.load(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not an alignment model: it lacks"):
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


def test_more_candidates_than_texts_are_refused():
    with pytest.raises(ValueError, match="from 2 to the 4 texts"):
        retrieval(units(2, 3), units(4, 3), torch.tensor([0, 1]), candidates=9)


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
