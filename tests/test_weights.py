"""Weight deltas: equal to the arithmetic by hand, taken back bit for bit, streamed, and strict about what they add."""

import fnmatch
import json
import os
import runpy
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rectified_diffusers import RectifiedFlowPipeline, cli
from rectified_diffusers.weights import weight_files as stored
from rectified_diffusers.weights.components import swap_components
from rectified_diffusers.weights.delta import apply_weight_delta, compute_weight_delta, load_weight_delta
from tests.tiny import make_tiny_pipeline, make_unet

EXAMPLE = Path(__file__).parent.parent / "examples" / "weight_delta.py"
FIRST = "conv_in.bias"  # of a U-Net's weights in alphabetical order


def make_fine_tune(unet: torch.nn.Module, seed: int = 7, size: float = 0.02) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = unet.state_dict().items()
    return {name: weight + size * torch.randn(weight.shape, generator=generator) for name, weight in weights}


def copy_of(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in unet.state_dict().items()}


def assert_equal(unet: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    weights = unet.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name]), name


def sample(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red apple", generator=torch.manual_seed(0), output_type="latent").images


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Any]:
    """Pipelines `base` and `tuned`, in folders, with the weights of their U-Nets; `delta` is a file of the two."""
    folder = tmp_path_factory.mktemp("models")
    pipeline: Any = make_tiny_pipeline("diffusion")
    pipeline.save_pretrained(folder / "base")
    base = copy_of(pipeline.unet)
    tuned = make_fine_tune(pipeline.unet)
    other: Any = make_tiny_pipeline("diffusion", seed=3)  # its VAE and text encoder
    other.unet.load_state_dict(tuned)
    other.save_pretrained(folder / "tuned")
    compute_weight_delta(tuned, base, folder / "delta.safetensors")
    return {"folder": folder, "base": base, "tuned": tuned, "delta": folder / "delta.safetensors"}


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """Return a U-Net that is neither the base nor the fine-tune: the one that a style is carried over to."""
    torch.manual_seed(5)
    return make_unet()


# ---------------------------------------------------------------------------------------------- make


def test_the_delta_is_the_difference_in_float32_with_metadata(models):
    with safe_open(models["delta"], framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["rectified_diffusers"]) == {
        "kind": "weight_delta",
        "format_version": 1,
        "fine_tune": "the state dict",
        "base": "the state dict",
        "dtype": "float32",
    }
    delta = load_file(models["delta"])
    assert delta.keys() == models["base"].keys()
    for name, value in delta.items():
        assert torch.equal(value, models["tuned"][name] - models["base"][name])


def sharded(models, folder: Path) -> Path:
    unet = UNet2DConditionModel.from_pretrained(models["folder"] / "tuned" / "unet")
    unet.save_pretrained(folder / "tuned", max_shard_size="100KB")
    assert len(list((folder / "tuned").glob("*-of-*.safetensors"))) > 2
    return folder / "tuned"


def as_variant(models, folder: Path) -> Path:
    unet = UNet2DConditionModel.from_pretrained(models["folder"] / "tuned" / "unet")
    unet.save_pretrained(folder / "tuned", variant="v0-1", max_shard_size="100KB")
    return folder / "tuned"


@pytest.mark.parametrize(
    "place",
    [
        lambda models, _: models["folder"] / "tuned",
        lambda models, _: str(models["folder"] / "tuned" / "unet"),
        lambda models, _: models["folder"] / "tuned" / "unet" / "diffusion_pytorch_model.safetensors",
        sharded,
    ],
    ids=["pipeline", "unet", "file", "shards"],
)
def test_models_are_read_from_wherever_they_are(models, tmp_path, place):
    delta = compute_weight_delta(place(models, tmp_path), models["folder"] / "base", tmp_path / "delta.safetensors")
    assert delta.metadata["base"] == "base"
    assert delta.metadata["fine_tune"] in {"tuned", "diffusion_pytorch_model.safetensors"}
    made, expected = load_file(tmp_path / "delta.safetensors"), load_file(models["delta"])
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert made.keys() == expected.keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_difference_is_taken_in_float32_and_then_cast(models, tmp_path, dtype):
    """Of half-precision models too: the difference of two of their numbers is often none of theirs."""
    half = {name: weight.to(getattr(torch, dtype)) for name, weight in models["tuned"].items()}
    compute_weight_delta(half, models["base"], tmp_path / "delta.safetensors", dtype=dtype)
    for name, value in load_file(tmp_path / "delta.safetensors").items():
        assert torch.equal(value, (half[name].float() - models["base"][name]).to(getattr(torch, dtype)))


def test_equal_inputs_give_equal_files_and_nothing_is_left_beside_them(models, tmp_path):
    for name in ("a", "b"):
        compute_weight_delta(models["tuned"], models["base"], tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_was_not_finished_is_not_there(models, tmp_path):
    output = tmp_path / "delta.safetensors"
    output.write_text("the one before")
    broken = {
        **models["tuned"],
        "time_embedding.linear_1.weight": models["tuned"]["time_embedding.linear_1.weight"] / 0,
    }
    with pytest.raises(ValueError, match=r"difference of 'time_embedding.linear_1.weight' is not finite in float32"):
        compute_weight_delta(broken, models["base"], output)
    assert output.read_text() == "the one before"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_difference_beyond_the_range_of_the_file_is_refused(models, tmp_path):
    large = {**models["tuned"], FIRST: models["tuned"][FIRST] + 1e6}
    with pytest.raises(ValueError, match=f"'{FIRST}' is not finite in float16.*dtype='float32'"):
        compute_weight_delta(large, models["base"], tmp_path / "d.safetensors", dtype="float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {**w, "extra": w[FIRST]},
            r"1 of the weights of the fine-tune.* unknown to the base.*first: 'extra'",
        ),
        (
            lambda w: {name: weight for name, weight in w.items() if not name.startswith("conv_in")},
            r"2 of the weights of the base.* missing from the fine-tune.*first: 'conv_in.bias'; expected \d+ .*, got",
        ),
        (
            lambda w: {**w, "conv_in.weight": torch.zeros(8, 9, 3, 3)},
            r"shape of 'conv_in.weight' differs: expected \(8, 4, 3, 3\) .* got \(8, 9, 3, 3\) .* share one",
        ),
        (lambda w: {**w, FIRST: torch.zeros(8, dtype=torch.int8)}, f"got torch.int8 in '{FIRST}'.*quantization"),
        (lambda w: {"a.base_layer.weight": w[FIRST]}, r"got 'a.base_layer.weight'. Call pipeline.unload_lora_weights"),
        (lambda w: {}, "holds no tensors"),
    ],
    ids=["unknown", "missing", "shape", "integer", "lora", "empty"],
)
def test_models_that_do_not_match_are_refused(models, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        compute_weight_delta(change(models["tuned"]), models["base"], tmp_path / "delta.safetensors")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_of_make(models, tmp_path):
    with pytest.raises(ValueError, match=r"saved as \*.safetensors, got 'delta.bin'"):
        compute_weight_delta(models["tuned"], models["base"], tmp_path / "delta.bin")
    with pytest.raises(ValueError, match="one of float32, float16, bfloat16, got 'int8'"):
        compute_weight_delta(models["tuned"], models["base"], tmp_path / "d.safetensors", dtype="int8")


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_a_pickle_is_refused_unopened_with_the_conversion(tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"never opened")
    with pytest.raises(ValueError, match=r"is a pickle.*use_safetensors=False\).save_pretrained.*from_single_file"):
        load_weight_delta(file)


def test_metadata_that_are_null_are_none(tmp_path):
    text = b'{"__metadata__": null, "bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "delta.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert load_weight_delta(tmp_path / "delta.safetensors").metadata == {}


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 7}', '{"weight_map": {"a": ["x"]}}', "[" * 100_000])
def test_an_index_of_shards_of_other_types_is_refused(tmp_path, content):
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is no index of shards.*Download it again"):
        load_weight_delta(tmp_path)


def test_a_folder_of_pickles_is_refused_with_the_conversion(tmp_path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(FileNotFoundError, match=r"got diffusion_pytorch_model.bin. Convert it once.*use_safetensors"):
        load_weight_delta(tmp_path)


def test_a_file_cut_while_it_is_in_use_is_noticed(models, unet, tmp_path):
    file = tmp_path / "delta.safetensors"
    file.write_bytes(models["delta"].read_bytes())
    delta, before = load_weight_delta(file), copy_of(unet)
    file.write_bytes(models["delta"].read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"delta.safetensors became shorter while it was read"):
        apply_weight_delta(unet, delta)
    assert_equal(unet, before)


def test_files_that_are_missing_or_damaged(models, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No file, folder or Hub id '.*nowhere"):
        load_weight_delta(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"index.json, got none. Give the folder of a pipeline"):
        load_weight_delta(tmp_path)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(models["delta"].read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"cut.safetensors is not a complete safetensors file"):
        load_weight_delta(cut)


def test_a_missing_or_outlying_shard_is_named(models, tmp_path):
    folder = sharded(models, tmp_path)
    shard = sorted(folder.glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"expected the shard '{shard.name}'"):
        load_weight_delta(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {FIRST: "../../secret.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"expected the shard '../../secret.safetensors'"):
        load_weight_delta(folder)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"ss_network_module": "networks.lora"}, r"got 'ss_network_module'.*load_lora_weights"),
        ({"rectified_diffusers": '{"first": 0}'}, "expected a weight_delta of format version 1, got something else"),
        ({"rectified_diffusers": "no json"}, "got something else"),
        (
            {"rectified_diffusers": '{"kind": "weight_delta", "format_version": 2}'},
            "got weight_delta of version 2. Upgrade rectified_diffusers",
        ),
    ],
)
def test_foreign_metadata_is_refused(tmp_path, metadata, message):
    save_file({FIRST: torch.zeros(8)}, tmp_path / "d.safetensors", metadata)
    with pytest.raises(ValueError, match=message):
        load_weight_delta(tmp_path / "d.safetensors")


def test_a_variant_of_a_file_or_of_tensors_is_refused(models):
    with pytest.raises(ValueError, match=r"variant='v0-1' names a file in a folder, but delta.safetensors is a file"):
        load_weight_delta(models["delta"], variant="v0-1")
    with pytest.raises(ValueError, match=r"variant='v0-1' .* but a state dict"):
        load_weight_delta(models["base"], variant="v0-1")


# ---------------------------------------------------------------------------------------------- apply, take back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_applied_it_is_the_sum_in_float32_and_taken_back_bit_for_bit(models, unet, dtype, scale):
    unet.to(dtype)
    before, delta = copy_of(unet), load_file(models["delta"])
    work = torch.promote_types(dtype, torch.float32)
    applied = apply_weight_delta(unet, models["delta"], scale)
    assert_equal(unet, {name: (w.to(work) + delta[name].to(work) * scale).to(dtype) for name, w in before.items()})
    applied.take_back()
    assert_equal(unet, before)


def test_the_base_becomes_the_fine_tune(models, unet):
    unet.load_state_dict(models["base"])
    apply_weight_delta(unet, models["delta"])
    for name, weight in unet.state_dict().items():  # subtracted and added again: one rounding each
        torch.testing.assert_close(weight, models["tuned"][name], rtol=2e-7, atol=1e-8)


def test_the_pictures_change_and_come_back_bit_for_bit(models):
    pipeline: Any = make_tiny_pipeline("flow", seed=5)
    before = sample(pipeline)
    applied = apply_weight_delta(pipeline.unet, models["delta"])
    assert not torch.equal(sample(pipeline), before)
    applied.take_back()
    assert torch.equal(sample(pipeline), before)


def test_several_are_summed_before_the_one_cast(models, unet, tmp_path):
    second = make_fine_tune(unet, seed=8)
    compute_weight_delta(second, models["base"], tmp_path / "second.safetensors")
    unet.half()
    before = copy_of(unet)
    a, b = load_file(models["delta"]), load_file(tmp_path / "second.safetensors")
    opened = load_weight_delta(tmp_path / "second.safetensors")
    applied = apply_weight_delta(unet, [models["delta"], opened], [0.7, 0.4])
    assert_equal(unet, {n: (w.float() + a[n] * 0.7 + b[n] * 0.4).half() for n, w in before.items()})
    applied.take_back()
    apply_weight_delta(unet, [models["delta"], opened], 0.5, keep_undo=False)
    assert_equal(unet, {n: (w.float() + a[n] * 0.5 + b[n] * 0.5).half() for n, w in before.items()})


def test_deltas_are_taken_back_in_reverse_order(models, unet):
    before = copy_of(unet)
    first = apply_weight_delta(unet, models["delta"], 0.5)
    between = copy_of(unet)
    second = apply_weight_delta(unet, models["delta"], 0.25)
    with pytest.raises(ValueError, match=r"'conv_in.weight' changed after this delta.*reverse order"):
        first.take_back()
    second.take_back()
    assert_equal(unet, between)
    first.take_back()
    assert_equal(unet, before)
    with pytest.raises(ValueError, match="taken back already"):
        first.take_back()


def test_what_was_changed_since_is_not_overwritten(models, unet):
    applied = apply_weight_delta(unet, models["delta"])
    unet.half()
    with pytest.raises(ValueError, match=r"expected its values in torch.float32, got others in torch.float16"):
        applied.take_back()


def test_without_a_copy_there_is_no_taking_back(models, unet):
    applied = apply_weight_delta(unet, models["delta"], keep_undo=False)
    with pytest.raises(ValueError, match=r"keep_undo=False. Load the model again"):
        applied.take_back()


def corrupt(models, tmp_path: Path, value: float) -> Path:
    delta = load_file(models["delta"])
    delta["conv_out.weight"][0, 0, 0, 0] = value
    with safe_open(models["delta"], framework="pt") as file:
        save_file(delta, tmp_path / "corrupt.safetensors", file.metadata())
    return tmp_path / "corrupt.safetensors"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_delta_that_is_not_finite_is_refused_and_nothing_is_changed(models, unet, tmp_path, value):
    before = copy_of(unet)
    with pytest.raises(ValueError, match=r"corrupt.safetensors holds NaN or infinity in 'conv_out.weight'"):
        apply_weight_delta(unet, corrupt(models, tmp_path, value))
    assert_equal(unet, before)


def test_a_sum_beyond_the_range_of_the_model_is_refused_and_nothing_is_changed(models, unet):
    unet.half()
    before = copy_of(unet)
    with pytest.raises(ValueError, match=r"would not be finite in torch.float16. Use a smaller scale"):
        apply_weight_delta(unet, models["delta"], 1e9)
    assert_equal(unet, before)


def test_a_delta_of_another_architecture_is_refused_and_nothing_is_changed(models):
    unet = make_unet(in_channels=9)
    before = copy_of(unet)
    with pytest.raises(ValueError, match=r"'conv_in.weight' differs: expected \(8, 9, 3, 3\) as in UNet2DCondition"):
        apply_weight_delta(unet, models["delta"])
    assert_equal(unet, before)


def test_a_lora_must_be_unloaded_first(models, unet):
    from peft import LoraConfig

    applied = apply_weight_delta(unet, models["delta"])
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"got '.*to_q.base_layer.weight'. Call pipeline.unload_lora_weights"):
        apply_weight_delta(unet, models["delta"])
    with pytest.raises(ValueError, match=r"Call pipeline.unload_lora_weights"):
        applied.take_back()
    unet.unload_lora()
    applied.take_back()


def test_offloaded_weights_are_refused(models):
    with pytest.raises(ValueError, match=r"in memory .* on meta in torch.float32. Apply deltas before offloading"):
        apply_weight_delta(make_unet().to("meta"), models["delta"])


@pytest.mark.parametrize(
    ("count", "scale", "message"),
    [
        (0, 1.0, "got 0 deltas"),
        (2, [1.0], "got 2 deltas and 1 scales"),
        (1, float("nan"), "must be finite, got nan"),
    ],
)
def test_wrong_scales_are_refused(models, unet, count, scale, message):
    with pytest.raises(ValueError, match=message):
        apply_weight_delta(unet, [models["delta"]] * count, scale)


# ---------------------------------------------------------------------------------------------- PeRFlow's files


@pytest.fixture
def perflow(models, tmp_path) -> Path:
    """A folder in the layout of PeRFlow's deltas: a U-Net's config, and differences in fp16 as two variants."""
    folder = tmp_path / "perflow-sd15-delta-weights"
    folder.mkdir()
    config = (models["folder"] / "base" / "unet" / "config.json").read_text()
    (folder / "config.json").write_text(config)
    for number, scale in enumerate((0.5, 1.0)):
        delta = {name: (scale * value).half() for name, value in load_file(models["delta"]).items()}
        save_file(delta, folder / f"diffusion_pytorch_model.v0-{number}.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("variant", ["v0-0", "v0-1"])
def test_perflow_deltas_apply_by_variant(models, unet, perflow, variant):
    file = perflow / f"diffusion_pytorch_model.{variant}.safetensors"
    before, delta = copy_of(unet), load_file(file)
    opened = load_weight_delta(perflow, variant=variant)
    assert opened.metadata == {}
    applied = apply_weight_delta(unet, opened)
    assert_equal(unet, {name: weight + delta[name].float() for name, weight in before.items()})
    applied.take_back()
    apply_weight_delta(unet, file).take_back()  # the file by itself
    assert_equal(unet, before)


def test_a_missing_variant_lists_those_that_are_there(perflow):
    files = "diffusion_pytorch_model.v0-0.safetensors, diffusion_pytorch_model.v0-1.safetensors"
    with pytest.raises(FileNotFoundError, match=f"got {files}.*`variant`"):
        load_weight_delta(perflow)
    with pytest.raises(FileNotFoundError, match=r"expected diffusion_pytorch_model.v0-2.safetensors or .*v0-2.json"):
        load_weight_delta(perflow, variant="v0-2")


def test_a_variant_may_be_sharded(models, unet, tmp_path):
    opened = load_weight_delta(as_variant(models, tmp_path), variant="v0-1")
    assert opened.weights.shapes.keys() == models["tuned"].keys()
    assert torch.equal(opened.weights.read("conv_out.weight"), models["tuned"]["conv_out.weight"])


def test_a_whole_model_is_not_mistaken_for_a_difference(models, unet):
    """A file without metadata may be either; added as a difference, a fine-tune would double the weights."""
    unet.load_state_dict(models["base"])
    for model in (models["tuned"], models["folder"] / "tuned"):
        with pytest.raises(ValueError, match=r"holds the weights of a model.*cosine .* is 0\.9|is 1\.0"):
            apply_weight_delta(unet, model)
    assert_equal(unet, models["base"])


@pytest.mark.parametrize(("inner", "variant"), [("", "v0-1"), ("unet", None)])
def test_from_the_hub_the_unet_alone_is_asked_for(models, tmp_path, monkeypatch, inner, variant):
    asked = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.extend([hub_id, allow_patterns])
        folder = tmp_path / "snapshot"
        UNet2DConditionModel.from_pretrained(models["folder"] / "tuned" / "unet").save_pretrained(
            folder / inner, variant=variant
        )
        return str(folder)

    monkeypatch.setattr(stored, "snapshot_download", download)
    weights = stored.open_weights("someone/fine-tune", variant)
    assert weights.name == asked[0] == "someone/fine-tune"
    assert weights.shapes.keys() == models["tuned"].keys()
    part = "" if variant is None else ".v0-1"
    files = {
        f"unet/diffusion_pytorch_model{part}.safetensors": True,
        f"diffusion_pytorch_model{part}.safetensors": True,
        f"unet/diffusion_pytorch_model{part}-00001-of-00002.safetensors": True,
        f"unet/diffusion_pytorch_model.safetensors.index{part}.json": True,
        "unet/diffusion_pytorch_model.non_ema.safetensors": False,
        "unet/diffusion_pytorch_model.bin": False,
        "vae/diffusion_pytorch_model.safetensors": False,
        "v1-5-pruned.safetensors": False,
    }
    assert {name: any(fnmatch.fnmatch(name, pattern) for pattern in asked[1]) for name in files} == files


# ---------------------------------------------------------------------------------------------- VAE, text encoder


def test_the_fine_tunes_vae_and_text_encoder_on_request(models):
    pipeline = make_tiny_pipeline("flow", seed=5).to(dtype=torch.bfloat16)
    vae, text_encoder, before = pipeline.vae, pipeline.text_encoder, sample(pipeline)
    swapped = swap_components(pipeline, models["folder"] / "tuned")
    theirs: Any = make_tiny_pipeline("diffusion", seed=3).to(dtype=torch.bfloat16)
    assert_equal(pipeline.vae, theirs.vae.state_dict())
    assert_equal(pipeline.text_encoder, theirs.text_encoder.state_dict())
    assert not pipeline.vae.training
    assert not torch.equal(sample(pipeline), before)
    swapped.take_back()
    assert pipeline.vae is vae
    assert pipeline.text_encoder is text_encoder
    assert torch.equal(sample(pipeline), before)


def test_one_component_alone(models):
    pipeline = make_tiny_pipeline("flow", seed=5)
    text_encoder = pipeline.text_encoder
    swap_components(pipeline, models["folder"] / "tuned", ["vae"])
    assert pipeline.text_encoder is text_encoder


def test_components_that_do_not_fit_are_refused_and_nothing_is_changed(models, tmp_path):
    pipeline: Any = make_tiny_pipeline("flow", seed=5)
    before = dict(pipeline.components)
    with pytest.raises(ValueError, match=r"has no model 'vea'; its models: .*vae"):
        swap_components(pipeline, models["folder"] / "tuned", ["text_encoder", "vea"])
    config = {**pipeline.vae.config, "_use_default_values": []}
    AutoencoderKL.from_config({**config, "scaling_factor": 0.5}).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"scaling_factor of the fine-tune's vae is 0.5, expected 0.18215"):
        swap_components(pipeline, tmp_path, ["vae"])
    AutoencoderKL.from_config({**config, "latent_channels": 8}).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"shape of 'decoder.conv_in.weight' differs"):
        swap_components(pipeline, tmp_path, ["vae"])
    from peft import LoraConfig

    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"attached to the pipeline's text_encoder.*unload_lora_weights"):
        swap_components(pipeline, models["folder"] / "tuned")
    assert pipeline.components == before


# ---------------------------------------------------------------------------------------------- memory


def test_one_tensor_of_each_model_is_in_memory_at_a_time(models, tmp_path, unet, monkeypatch):
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    read = stored._read

    def counted(place: Any) -> torch.Tensor:
        nonlocal most
        tensor = read(place)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(stored, "_read", counted)
    folder = models["folder"]
    compute_weight_delta(folder / "tuned", folder / "base", tmp_path / "delta.safetensors")
    assert most == 2
    most = 0
    apply_weight_delta(unet, [tmp_path / "delta.safetensors"] * 3, keep_undo=False)
    assert most <= 2  # a name keeps the one before until it is bound to the next


MEASURE = r"""
import re, sys
from pathlib import Path
import torch
from rectified_diffusers.weights.delta import apply_weight_delta, compute_weight_delta
from safetensors.torch import save_file

folder, tensors, rows = Path(sys.argv[1]), 40, 1_000_000  # 40 tensors of 4 MB
def peak():
    # In MB. Not ru_maxrss: on Linux a process inherits that of its parent.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
class Model(torch.nn.Module):
    def __init__(self, tensors, rows):
        super().__init__()
        self.layers = torch.nn.ParameterList([torch.zeros(rows) for _ in range(tensors)])
def make(name):
    files = (folder / f"{kind}-{name}.safetensors" for kind in ("tuned", "base", "delta"))
    compute_weight_delta(*files)
def apply(model, name):
    apply_weight_delta(model, folder / f"delta-{name}.safetensors", 0.5, keep_undo=sys.argv[2] == "undo")
if sys.argv[2] == "write":
    for kind in ("tuned", "base"):
        save_file({f"layers.{i}": torch.randn(rows) for i in range(tensors)}, folder / f"{kind}-large.safetensors")
        save_file({"layers.0": torch.randn(9)}, folder / f"{kind}-small.safetensors")
elif sys.argv[2] == "make":
    make("small")  # the first call also loads code of libraries
    before = peak()
    make("large")
    print(peak() - before)
else:
    model = Model(tensors, rows)
    apply(Model(1, 9), "small")
    before = peak()
    apply(model, "large")
    print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_memory_is_a_few_tensors_and_with_an_undo_copy_one_more_model(tmp_path):
    """Resident memory, mapped files included, of a model of 160 MB in tensors of 4 MB."""
    # The allocator returns a freed tensor at once. By default it learns from their sizes to keep some for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}

    def measure(what: str) -> float:
        arguments = [sys.executable, "-c", MEASURE, str(tmp_path), what]
        output = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout
        return float(output or 0)

    measure("write")
    assert measure("make") < 30
    assert measure("no undo") < 30
    assert 150 < measure("undo") < 160 + 30


# ---------------------------------------------------------------------------------------------- command line, example


@pytest.fixture
def refused(capsys):
    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("rectified-diffusers: error: ")

    return run


@pytest.mark.parametrize("arguments", [["delta", "--help"], ["delta", "make", "--help"], ["delta", "apply", "--help"]])
def test_help_answers_without_torch(arguments):
    code = (
        "import sys\nfrom rectified_diffusers.cli import main\ntry:\n"
        f"    main({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'diffusers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rectified-diffusers delta" in done.stdout


def test_make_and_apply_from_the_command_line(models, tmp_path, capsys):
    folder, delta, output = models["folder"], tmp_path / "d.safetensors", tmp_path / "out"
    make_tiny_pipeline("flow", seed=5).save_pretrained(tmp_path / "model")
    make = ["delta", "make", "--fine-tune", f"{folder}/tuned", "--base", f"{folder}/base", "--output", str(delta)]
    assert cli.main(make) == 0
    assert capsys.readouterr().out == f"{delta}: tuned - base, {len(models['base'])} weights\n"
    apply = ["delta", "apply", "--model", f"{tmp_path}/model", "--output", str(output)]
    assert cli.main([*apply, "--delta", f"{delta}=0.5", "--delta", str(delta)]) == 0
    assert capsys.readouterr().out == f"{output}: {tmp_path}/model with 2 deltas\n"
    made: Any = RectifiedFlowPipeline.from_pretrained(output)
    by_hand: Any = make_tiny_pipeline("flow", seed=5)
    apply_weight_delta(by_hand.unet, [delta, delta], [0.5, 1.0])
    assert torch.equal(sample(made), sample(by_hand))


def test_apply_with_the_fine_tunes_components_and_a_variant(models, tmp_path, perflow):
    make_tiny_pipeline("flow", seed=5).save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    arguments = ["--delta", f"{perflow}=0.5", "--variant", "v0-1", "--delta", f"{models['delta']}"]
    arguments += ["--components-from", str(models["folder"] / "tuned"), "--dtype", "float16"]
    assert cli.main(["delta", "apply", "--model", f"{tmp_path}/model", *arguments, "--output", str(output)]) == 0
    made: Any = RectifiedFlowPipeline.from_pretrained(output).to(dtype=torch.float16)
    by_hand: Any = make_tiny_pipeline("flow", seed=5).to(dtype=torch.float16)
    deltas = [load_weight_delta(perflow, variant="v0-1"), models["delta"]]
    apply_weight_delta(by_hand.unet, deltas, [0.5, 1.0])
    swap_components(by_hand, models["folder"] / "tuned")
    for name in ("unet", "vae", "text_encoder"):
        assert_equal(getattr(made, name), copy_of(getattr(by_hand, name)))


def test_the_command_line_refuses(models, tmp_path, refused):
    base = str(models["folder"] / "base")
    make = ["delta", "make", "--fine-tune", base, "--base", base, "--output"]
    assert "must be a file whose name ends in .safetensors" in refused(*make, str(tmp_path / "d.bin"))
    assert "does not exist; make it first" in refused(*make, str(tmp_path / "no" / "d.safetensors"))
    apply = ["delta", "apply", "--model", base, "--delta"]
    assert "already holds a pipeline" in refused(*apply, str(models["delta"]), "--output", base)
    assert "must be a number, got 'much'" in refused(*apply, "d.safetensors=much", "--output", str(tmp_path))
    assert "No file, folder or Hub id" in refused(*apply, "d.safetensors=0.5", "--output", str(tmp_path))
    assert "expected a difference of two" in refused(*apply, base, "--output", str(tmp_path))
    assert "required: --delta" in refused("delta", "apply", "--model", base, "--output", str(tmp_path))


def test_debug_may_stand_before_or_after_the_action(models, tmp_path):
    make = ["--fine-tune", "nothing", "--base", "nothing", "--output", str(tmp_path / "d.safetensors")]
    for arguments in (["delta", "--debug", "make", *make], ["delta", "make", *make, "--debug"]):
        with pytest.raises(FileNotFoundError):
            cli.main(arguments)


@pytest.mark.slow
def test_the_example_runs(models, tmp_path, monkeypatch):
    make_tiny_pipeline("flow", seed=5).save_pretrained(tmp_path / "model")
    folder = models["folder"]
    arguments = ["--model", f"{tmp_path}/model", "--fine-tune", f"{folder}/tuned", "--base", f"{folder}/base"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments, "--output-dir", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert {"delta.safetensors", "before.png", "after.png"} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "before.png").read_bytes() != (tmp_path / "after.png").read_bytes()
