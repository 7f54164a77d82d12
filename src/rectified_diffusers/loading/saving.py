"""Save a pipeline in a form that every supported release of transformers, 4 and 5, reads identically.

transformers 5 writes two things that version 4 cannot read. CLIP models lack one level of their module names; version
4 replaces these weights with random ones and warns. Tokenizers are only a `tokenizer.json`. Both versions read the
older form, so a saved folder uses that.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rectified_diffusers.files import follow_umask

# Module names of transformers 4: a CLIP class, the prefix of its affected weights, and the older prefix.
_CLIP_PREFIXES = {
    "CLIPTextModel": ("", "text_model."),
    "CLIPVisionModel": ("", "vision_model."),
    "StableDiffusionSafetyChecker": ("vision_model.", "vision_model.vision_model."),
}


def save_pipeline(pipeline: Any, folder: str | Path, **options: Any) -> None:
    """Save any diffusers pipeline with its `save_pretrained`, in a form that transformers 4 and 5 read identically."""
    pipeline.save_pretrained(folder, **options)
    finish_saving(pipeline, Path(folder))


def finish_saving(pipeline: Any, folder: Path) -> None:
    """Make what `save_pretrained` has written readable: by transformers 4, and by all whom the umask permits."""
    make_readable(folder)
    for name in pipeline.components:
        follow_umask(folder / name)


def make_readable(folder: Path) -> None:
    """Rewrite what transformers 5 saved in a pipeline's folder so that transformers 4 can read it too.

    Weights keep their values, tokenizers their ids. A folder already in this form is left unchanged.
    """
    for config in sorted(folder.glob("*/config.json")):
        for architecture in json.loads(config.read_text(encoding="utf-8")).get("architectures") or []:
            if architecture in _CLIP_PREFIXES:
                _rename_weights(config.parent, *_CLIP_PREFIXES[architecture])
    for tokenizer in sorted(folder.glob("*/tokenizer.json")):
        _write_vocabulary(tokenizer)
    index = folder / DiffusionPipeline.config_name
    if index.is_file():
        _name_fast_tokenizers(index)


def _rename_weights(folder: Path, prefix: str, older: str) -> None:
    """Replace `prefix` with `older` in the names of weights, in all safetensors files and indexes of shards."""

    def rename(name: str) -> str:
        return older + name.removeprefix(prefix) if name.startswith(prefix) and not name.startswith(older) else name

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names, metadata = list(opened.keys()), opened.metadata()
        if any(rename(name) != name for name in names):
            tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
            # Not in place: the tensors may be read from the file while it is written.
            renamed = file.with_name(f"renamed-{file.name}")
            save_file(tensors, renamed, metadata=metadata)
            shutil.copymode(file, renamed)
            renamed.replace(file)
    for file in sorted(folder.glob("*.safetensors.index*.json")):
        index = json.loads(file.read_text(encoding="utf-8"))
        index["weight_map"] = {rename(name): shard for name, shard in index["weight_map"].items()}
        _write_json(file, index)


def _write_vocabulary(tokenizer: Path) -> None:
    """Write vocab.json, merges.txt and added_tokens.json next to the tokenizer.json of a byte-pair encoding."""
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE" or (tokenizer.parent / "vocab.json").is_file():
        return
    vocabulary: Mapping[str, int] = model["vocab"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    _write_json(tokenizer.with_name("vocab.json"), vocabulary, indent=None)
    lines = ["#version: 0.2", *pairs]
    tokenizer.with_name("merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokens = content.get("added_tokens", [])
    if added := {token["content"]: token["id"] for token in tokens if token["content"] not in vocabulary}:
        _write_json(tokenizer.with_name("added_tokens.json"), added)


def _name_fast_tokenizers(index: Path) -> None:
    """Name the fast class in model_index.json for tokenizers that have a tokenizer.json but no vocabulary file.

    transformers 5 has one class under both names. In version 4, the class without Fast needs other files.
    """
    content = json.loads(index.read_text(encoding="utf-8"))
    changed = False
    for name, entry in content.items():
        folder = index.parent / name
        if not isinstance(entry, list) or entry[0] != "transformers" or not (folder / "tokenizer.json").is_file():
            continue
        has_vocabulary = any((folder / file).is_file() for file in ("vocab.json", "spiece.model", "tokenizer.model"))
        if not has_vocabulary and hasattr(transformers, fast := f"{entry[1]}Fast"):
            entry[1], changed = fast, True
    if changed:
        _write_json(index, content)


def _write_json(file: Path, content: Any, indent: int | None = 2) -> None:
    file.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
