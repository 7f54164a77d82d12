"""The words of the emoji model: how a picture is described, and the tokenizer over those words."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_LENGTH = 24
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def read_rows(data: Path) -> list[dict]:
    return [json.loads(line) for line in (data / "rows.jsonl").open(encoding="utf-8")]


def describe(row: dict, generator: torch.Generator) -> str:
    """One of many captions of a picture: its label, with an article, with tags, or tags alone; perhaps its style.

    All of "red apple", "a red apple, 3d style" and "fruit, food, apple" describe the same picture, so that everyday
    words work, and a style can be asked for but need not be.
    """
    kind, styled = torch.rand(2, generator=generator).tolist()
    order = torch.randperm(len(row["tags"]), generator=generator).tolist()
    few_tags = [row["tags"][i] for i in order[: int(1 + 4 * torch.rand((), generator=generator).item())]]
    if kind < 0.35 or not few_tags:
        caption = row["label"]
    elif kind < 0.6:
        caption = with_article(row["label"])
    elif kind < 0.9:
        caption = ", ".join([row["label"], *few_tags])
    else:
        caption = ", ".join(few_tags)
    return f"{caption}, {row['style']} style" if styled < 0.4 else caption


def with_article(label: str) -> str:
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def build_tokenizer(data: Path, folder: Path, vocabulary: int = 6144) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary on labels, tags and styles, in the file format of CLIP's tokenizer; once."""
    if (folder / "merges.txt").exists():
        return CLIPTokenizer.from_pretrained(folder)
    rows = read_rows(data)
    lines = sorted({row["label"] for row in rows} | {tag for row in rows for tag in row["tags"]})
    lines += [f"a an in the of with and, {row['style']} style" for row in rows[::100]]
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # Every byte, within a word and at its end. Listed first, they have fixed numbers: those decide between merges that
    # occur equally often, and would otherwise differ from run to run.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [BEGIN, END, *alphabet, *(symbol + "</w>" for symbol in alphabet)]
    learner.train_from_iterator(
        lines, BpeTrainer(vocab_size=vocabulary, special_tokens=symbols, end_of_word_suffix="</w>")
    )
    learned = json.loads(learner.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(learned["vocab"]), encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True}
    config |= {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in learned["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=192,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (B, MAX_LENGTH), padded as the pipelines pad."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    return tokens.input_ids
