"""examples/emoji/alignment.py: its loss, its training, and that `evaluate` can use what it writes."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional as F

from rectified_diffusers.evaluation.alignment import AlignmentModel, retrieval
from tests.emoji import example, write_data


@pytest.fixture(scope="module")
def script() -> Iterator[dict[str, Any]]:
    """Names of the script, which is not run."""
    with pytest.MonkeyPatch.context() as patch, example("alignment.py", patch) as run:
        yield run(name="alignment")


def units(*shape, seed=0):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


@given(seed=st.integers(0, 2**31))
def test_distinct_captions_give_the_loss_of_clip(script, seed):
    images, texts = units(4, 4, seed=seed), units(4, 4, seed=seed + 1)
    scale = torch.tensor(1.3, dtype=torch.float64)
    logits = images @ texts.T * scale.exp()
    labels = torch.arange(4)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss = script["contrastive_loss"](images, texts, labels, scale)
    assert loss.shape == (4,)
    torch.testing.assert_close(loss.mean(), expected)


def test_pictures_of_one_caption_are_no_negatives(script):
    """With a second picture of caption 0 in the batch, pair 0 loses exactly what it loses without it."""
    images, texts = units(3, 8), units(2, 8, seed=1)
    scale = torch.tensor(1.0, dtype=torch.float64)
    both = script["contrastive_loss"](images, texts[[0, 1, 0]], torch.tensor([0, 1, 0]), scale)
    alone = script["contrastive_loss"](images[:2], texts, torch.tensor([0, 1]), scale)
    torch.testing.assert_close(both[0], alone[0])
    assert both.isfinite().all()
    one_caption = script["contrastive_loss"](images, texts[[0, 0, 0]], torch.zeros(3, dtype=torch.long), scale)
    torch.testing.assert_close(one_caption, torch.zeros(3, dtype=torch.float64))


def test_the_scale_is_bounded(script):
    images, texts, captions = units(4, 4), units(4, 4, seed=1), torch.arange(4)
    at_bound = script["contrastive_loss"](images, texts, captions, torch.tensor(math.log(100)))
    torch.testing.assert_close(script["contrastive_loss"](images, texts, captions, torch.tensor(50.0)), at_bound)


def world(pictures=400, captions=40, seed=0):
    """Pictures and captions that are noisy linear views of one thing."""
    generator = torch.Generator().manual_seed(seed)
    things = torch.randn(captions, 6, generator=generator)
    views = torch.randn(2, 6, 24, generator=generator)
    rows = torch.randint(captions, (pictures,), generator=generator)
    images = things[rows] @ views[0] + 0.3 * torch.randn(pictures, 24, generator=generator)
    return images, things @ views[1], rows


def test_training_aligns_pictures_it_has_not_seen(script):
    images, texts, captions = world()
    options = {"joint_dimensions": 8, "max_steps": 150, "batch_size": 64, "learning_rate": 1e-2, "progress": False}
    model = script["train_alignment"](images[:200], texts, captions[:200], **options)
    scores = retrieval(model.embed_images(images[200:]), model.embed_texts(texts), captions[200:], candidates=10)
    assert scores.r_precision > 0.9
    assert scores.recall_at_1 > 0.7
    assert not model.training


def test_training_repeats_and_leaves_the_global_generator_alone(script):
    images, texts, captions = world()
    options = {"joint_dimensions": 4, "max_steps": 3, "batch_size": 16, "progress": False}
    state = torch.get_rng_state()
    first = script["train_alignment"](images, texts, captions, **options)
    assert torch.equal(torch.get_rng_state(), state)
    second = script["train_alignment"](images, texts, captions, **options)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    untrained = AlignmentModel(24, 24, 4)
    assert all(not torch.equal(a, b) for a, b in zip(first.parameters(), untrained.parameters(), strict=True))


def test_the_command_writes_what_evaluate_loads(monkeypatch, tmp_path, capsys):
    torchvision = pytest.importorskip("torchvision")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    write_data(tmp_path / "data")
    rows = [json.loads(line) for line in (tmp_path / "data" / "rows.jsonl").read_text().splitlines()]
    rows = [{**row, "label": f"square {i}", "style": ("flat", "noto")[i % 2]} for i, row in enumerate(rows * 30)]
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = torch.randint(0, 256, (len(rows), 3, 32, 32), dtype=torch.uint8)
    save_file({"images": images}, tmp_path / "data" / "images.safetensors")
    minilm = tmp_path / "weights" / "minilm"
    minilm.mkdir(parents=True)
    save_file(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "weights" / "mobilenet_v2.safetensors")
    (minilm / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "square"]))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=6, **sizes)).save_pretrained(minilm)
    BertTokenizerFast.from_pretrained(minilm).save_pretrained(minilm)
    folders = {name: str(tmp_path / name) for name in ("data", "weights", "output")}
    with example("alignment.py", monkeypatch) as run:
        run(
            *(part for name, path in folders.items() for part in (f"--{name}", path)),
            "--image-size",
            "32",
            "--max-steps",
            "2",
        )
    assert "unseen style noto: R@1" in capsys.readouterr().out
    model = AlignmentModel.load(tmp_path / "output" / "alignment.safetensors")
    assert model.image.in_features == 1280
    card = json.loads((tmp_path / "output" / "alignment.json").read_text())
    assert (card["image_size"], card["unseen_style"], card["pictures"], card["texts"]) == (32, "noto", 60, 120)
