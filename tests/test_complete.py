"""A model with missing or left-over weights is an error that names it and the first key; never random weights."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from rectified_diffusers import (
    RectifiedFlowImg2ImgPipeline,
    RectifiedFlowPipeline,
    RectifiedFlowXLPipeline,
    bundled_checkpoint,
)
from rectified_diffusers.cli import main
from rectified_diffusers.loading.complete import complete_components
from rectified_diffusers.loading.saving import save_pipeline
from rectified_diffusers.weights.components import swap_components
from tests.hub.client import sample
from tests.original_layout import original_layout
from tests.tiny import (
    make_feature_extractor,
    make_safety_checker,
    make_tiny_pipeline,
    make_tiny_xl_pipeline,
)

PARTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "safety_checker": "safety_checker/model.safetensors",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A complete folder, with a safety checker, as the published checkpoints have one."""
    folder = tmp_path_factory.mktemp("saved")
    pipeline = make_tiny_pipeline("flow")
    checker, extractor = make_safety_checker(flags=False), make_feature_extractor()
    pipeline.register_modules(safety_checker=checker, feature_extractor=extractor)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(file: Path, kind: str, position: int = 3) -> str:
    """Take a weight out of a file or put one in; return its name."""
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    if kind == "missing":
        name = sorted(weights)[position]
        del weights[name]
    else:
        name = "somewhere.else.weight"
        weights[name] = torch.zeros(2)
    save_file(weights, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
@pytest.mark.parametrize("part", PARTS)
def test_a_changed_part_is_named_with_the_first_key(folder, part, kind):
    name = change(folder / PARTS[part], kind)
    words = rf"{part}: 1 weights are {kind}, the first '.*{name.split('.')[-1]}'"
    with pytest.raises(ValueError, match=words) as error:
        RectifiedFlowPipeline.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("position", [0, -1, 10])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_the_commands_say_it_in_one_line_and_exit_with_2(folder, part, position, capsys):
    change(folder / PARTS[part], "missing", position)
    assert main(["generate", "--model", str(folder), "a red apple", "-o", str(folder / "a.png")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{part}: 1 weights are missing" in message
    assert not (folder / "a.png").exists()


def test_every_command_that_reads_a_model(folder, tmp_path, capsys):
    change(folder / PARTS["text_encoder"], "missing")
    model, output = str(folder), str(tmp_path / "output")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    for command in (
        ["interpolate", "a", "b", "--model", model, "-o", str(tmp_path / "a.gif")],
        ["triplets", "--teacher", model, "--prompts", str(prompts), "--output-dir", output, "--num-triplets", "1"],
        ["export", "diffusers", "--model", model, "--output", output],
    ):
        code = main(command)
        message = capsys.readouterr().err
        assert code == 2, (command, message)
        assert "text_encoder: 1 weights are missing" in message, (command, message)
        assert message.count("\n") == 1, (command, message)


def test_both_text_encoders_of_xl(tmp_path):
    make_tiny_xl_pipeline().save_pretrained(tmp_path)
    for part in ("text_encoder", "text_encoder_2"):
        whole = (tmp_path / part / "model.safetensors").read_bytes()
        change(tmp_path / part / "model.safetensors", "missing")
        with pytest.raises(ValueError, match=f"^{part}: 1 weights are missing"):
            RectifiedFlowXLPipeline.from_pretrained(tmp_path)
        (tmp_path / part / "model.safetensors").write_bytes(whole)
    RectifiedFlowXLPipeline.from_pretrained(tmp_path)


def test_several_missing_are_counted_and_the_first_is_named(folder):
    file = folder / PARTS["unet"]
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    gone = sorted(weights)[5:8]
    save_file({name: weights[name] for name in weights if name not in gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"unet: 3 weights are missing, the first '{gone[0]}'"):
        RectifiedFlowPipeline.from_pretrained(folder)


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": False}, {"torch_dtype": torch.float16}], ids=str)
def test_options_of_loading_change_nothing_about_it(folder, options):
    change(folder / PARTS["vae"], "missing")
    with pytest.raises(ValueError, match="vae: 1 weights are missing"):
        RectifiedFlowImg2ImgPipeline.from_pretrained(folder, **options)


# What is no fault


def test_position_ids_of_older_releases_are_no_weights(folder):
    for part, prefix in (("text_encoder", "text_model."), ("safety_checker", "vision_model.vision_model.")):
        weights = {name: tensor.clone() for name, tensor in load_file(folder / PARTS[part]).items()}
        assert any(name.startswith(prefix) for name in weights)
        weights[f"{prefix}embeddings.position_ids"] = torch.arange(16)[None]
        save_file(weights, folder / PARTS[part], metadata={"format": "pt"})
    assert torch.equal(sample(RectifiedFlowPipeline.from_pretrained(folder)), sample(make_tiny_pipeline("flow")))


def test_the_attention_of_a_vae_under_its_older_names(folder):
    """As the published checkpoints have it; diffusers knows both names."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {name: tensor.clone() for name, tensor in load_file(folder / PARTS["vae"]).items()}
    renamed = {}
    for name, tensor in weights.items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.") if "attentions" in name else name
        renamed[name] = tensor
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / PARTS["vae"], metadata={"format": "pt"})
    loaded = RectifiedFlowPipeline.from_pretrained(folder)
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.vae.state_dict().items())


def test_passing_the_part_itself_is_the_remedy(folder):
    change(folder / PARTS["vae"], "missing")
    vae = AutoencoderKL.from_pretrained(bundled_checkpoint(), subfolder="vae")
    assert RectifiedFlowPipeline.from_pretrained(folder, vae=vae).vae is vae


def test_other_loads_are_as_they_were(folder):
    """Outside of our own loads diffusers and transformers only warn, as they do without this package."""
    RectifiedFlowPipeline.from_pretrained(bundled_checkpoint())
    change(folder / PARTS["unet"], "unexpected")
    UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    load: Any = UNet2DConditionModel.from_pretrained
    _, info = load(folder, subfolder="unet", output_loading_info=True)
    assert list(info["unexpected_keys"]) == ["somewhere.else.weight"]


def test_loading_info_that_the_caller_asks_for_is_given(folder):
    load: Any = UNet2DConditionModel.from_pretrained
    with complete_components():
        model, info = load(folder, subfolder="unet", output_loading_info=True)
    assert isinstance(model, UNet2DConditionModel)
    assert not info["missing_keys"]


# Other ways to load


def test_parts_of_a_fine_tune(folder):
    change(folder / PARTS["text_encoder"], "missing")
    with pytest.raises(ValueError, match="text_encoder: 1 weights are missing"):
        swap_components(make_tiny_pipeline("flow"), folder)


def test_a_controlnet_of_the_demo(tmp_path):
    from rectified_diffusers.cli.demo import _load_controlnet

    pipeline: Any = make_tiny_pipeline("flow")
    ControlNetModel.from_unet(pipeline.unet).save_pretrained(tmp_path / "canny")
    change(tmp_path / "canny" / "diffusion_pytorch_model.safetensors", "missing")
    with pytest.raises(ValueError, match="canny: 1 weights are missing"):
        _load_controlnet(str(tmp_path / "canny"), torch.float32)


@pytest.mark.parametrize("prefix", ["model.", "first_stage_model.", "cond_stage_model."])
def test_a_single_file(tmp_path, prefix):
    pipeline = make_tiny_pipeline("flow")
    save_pipeline(pipeline, tmp_path / "settings")
    for file in (tmp_path / "settings").rglob("*.safetensors"):
        file.unlink()
    weights = original_layout(pipeline)
    del weights[next(name for name in weights if name.startswith(prefix))]
    save_file(weights, tmp_path / "flow.safetensors")
    with pytest.raises(ValueError, match=r"flow.safetensors lacks .*weights of the"):
        RectifiedFlowPipeline.from_single_file(
            str(tmp_path / "flow.safetensors"),
            config=str(tmp_path / "settings"),
            local_files_only=True,
            safety_checker=None,
        )
