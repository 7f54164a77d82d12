"""What is saved is read alike by transformers 4 and 5; `.ci/releases.py` reads it with both."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from rectified_diffusers import (
    RectifiedFlowPipeline,
    bundled_checkpoint,
    export_diffusers,
    export_onnx,
    save_portable,
)
from rectified_diffusers.cli import main
from rectified_diffusers.loading.saving import make_readable, save_pipeline
from tests.hub.client import sample
from tests.tiny import (
    make_feature_extractor,
    make_safety_checker,
    make_text_config,
    make_tiny_pipeline,
    make_tiny_xl_pipeline,
)

EXAMPLES = Path(__file__).parent.parent / "examples" / "emoji"


def keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as weights:
        return list(weights.keys())


def as_transformers_4_reads_it(folder: Path) -> None:
    """Check the form of a pipeline's folder that version 4 reads: module names and the files of tokenizers."""
    assert all(key.startswith("text_model.") for key in keys(folder / "text_encoder" / "model.safetensors"))
    for tokenizer in folder.glob("tokenizer*"):
        fast = json.loads((folder / "model_index.json").read_text())[tokenizer.name][1].endswith("Fast")
        assert fast or {"vocab.json", "merges.txt"} <= {file.name for file in tokenizer.iterdir()}


@pytest.mark.parametrize("folder", [bundled_checkpoint(), EXAMPLES / "teacher"], ids=lambda path: path.name)
def test_what_is_kept_in_the_repository(folder):
    as_transformers_4_reads_it(folder)


def test_save_pretrained_of_ours(tmp_path):
    pipeline = make_tiny_pipeline("flow")
    pipeline.save_pretrained(tmp_path)
    as_transformers_4_reads_it(tmp_path)
    assert torch.equal(sample(RectifiedFlowPipeline.from_pretrained(tmp_path)), sample(pipeline))


def test_save_pretrained_in_shards(tmp_path):
    pipeline = make_tiny_pipeline("flow")
    pipeline.save_pretrained(tmp_path, max_shard_size="5KB")
    index = json.loads((tmp_path / "text_encoder" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for name, shard in index.items():
        assert name.startswith("text_model.")
        assert name in keys(tmp_path / "text_encoder" / shard)
    loaded = RectifiedFlowPipeline.from_pretrained(tmp_path).text_encoder.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in pipeline.text_encoder.state_dict().items())


def test_a_variant(tmp_path):
    make_tiny_pipeline("flow").save_pretrained(tmp_path, variant="fp16")
    assert all(key.startswith("text_model.") for key in keys(tmp_path / "text_encoder" / "model.fp16.safetensors"))
    RectifiedFlowPipeline.from_pretrained(tmp_path, variant="fp16")


def test_a_stock_pipeline_by_our_saving(tmp_path):
    save_pipeline(make_tiny_pipeline("diffusion"), tmp_path)
    as_transformers_4_reads_it(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline


def test_both_text_encoders_of_xl(tmp_path):
    pipeline = make_tiny_xl_pipeline()
    pipeline.save_pretrained(tmp_path)
    as_transformers_4_reads_it(tmp_path)
    second = keys(tmp_path / "text_encoder_2" / "model.safetensors")  # which has a projection, and one level in both
    assert "text_projection.weight" in second
    assert all(key.startswith("text_model.") for key in second if key != "text_projection.weight")
    assert not any(key.startswith("text_model.text_model.") for key in second)
    assert torch.equal(sample(type(pipeline).from_pretrained(tmp_path)), sample(pipeline))


def test_a_tokenizer_that_is_no_byte_pair_encoding_is_named_as_the_fast_class(tmp_path):
    save_pipeline(make_tiny_pipeline("flux"), tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["tokenizer_2"] == ["transformers", "T5TokenizerFast"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.tokenizer_2("a fox").input_ids == make_tiny_pipeline("flux").tokenizer_2("a fox").input_ids


def test_the_safety_checker(tmp_path):
    pipeline: Any = make_tiny_pipeline("flow")
    checker = make_safety_checker(flags=False)
    pipeline.register_modules(safety_checker=checker, feature_extractor=make_feature_extractor())
    pipeline.save_pretrained(tmp_path)
    names = keys(tmp_path / "safety_checker" / "model.safetensors")
    assert any(name.startswith("vision_model.vision_model.") for name in names)
    assert not any(name.startswith("vision_model.vision_model.vision_model.") for name in names)
    loaded = RectifiedFlowPipeline.from_pretrained(tmp_path).safety_checker.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in checker.state_dict().items())


def test_learned_words_are_kept(tmp_path):
    pipeline: Any = make_tiny_pipeline("flow")
    pipeline.tokenizer = copy.deepcopy(pipeline.tokenizer)  # all tiny pipelines share theirs
    pipeline.tokenizer.add_tokens(["<cat-toy>", "<other>"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    pipeline.save_pretrained(tmp_path)
    added = json.loads((tmp_path / "tokenizer" / "added_tokens.json").read_text())
    assert added["<cat-toy>"] == pipeline.tokenizer.convert_tokens_to_ids("<cat-toy>")
    assert CLIPTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab() == pipeline.tokenizer.get_vocab()


def test_portable_and_exports(tmp_path):
    pipeline = make_tiny_pipeline("flow")
    save_portable(pipeline, tmp_path / "portable")
    export_diffusers(pipeline, tmp_path / "stock")
    export_onnx(pipeline, tmp_path / "onnx")
    as_transformers_4_reads_it(tmp_path / "portable")
    as_transformers_4_reads_it(tmp_path / "stock")
    assert (tmp_path / "onnx" / "tokenizer" / "merges.txt").is_file()


def test_a_trainer(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n")
    folder = str(tmp_path / "teacher")
    pipeline = make_tiny_pipeline("flow")
    pipeline.save_pretrained(folder)
    triplets = ["--prompts", str(prompts), "--output-dir", str(tmp_path / "triplets"), "--num-triplets", "2"]
    assert main(["triplets", "--teacher", folder, *triplets, "--num-inference-steps", "1"]) == 0
    output = ["--triplets", str(tmp_path / "triplets"), "--output-dir", str(tmp_path / "run")]
    assert main(["reflow", "--model", folder, *output, "--max-steps", "1", "--batch-size", "2"]) == 0
    as_transformers_4_reads_it(tmp_path / "run")


def test_a_folder_in_this_form_is_left_as_it_is(tmp_path):
    make_tiny_pipeline("flow").save_pretrained(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    texts = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    make_readable(tmp_path)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == texts


def test_metadata_dtype_and_permissions_stay(tmp_path):
    """Of a text encoder as transformers 5 writes it."""
    encoder = CLIPTextModel(make_text_config()).half()
    weights = {name.removeprefix("text_model."): weight for name, weight in encoder.state_dict().items()}
    folder = tmp_path / "text_encoder"
    encoder.config.architectures = ["CLIPTextModel"]
    encoder.config.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt", "note": "kept"})
    file.chmod(0o640)
    make_readable(tmp_path)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}
    assert file.stat().st_mode & 0o777 == 0o640
    read = load_file(file)
    assert read.keys() == {f"text_model.{name}" for name in weights}
    assert all(torch.equal(read[f"text_model.{name}"], weight) for name, weight in weights.items())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
