"""A U-Net in one file: the layout of the original Stable Diffusion, and the same predictions when it is read back."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig
from safetensors.torch import load_file

from rectified_diffusers import cli
from rectified_diffusers.export.original_layout import export_unet, original_unet_layout
from rectified_diffusers.models.stacked_unet import StackedUNet
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
from tests.original_layout import original_layout
from tests.tiny import make_adapter_unet, make_tiny_pipeline, make_unet, make_xl_unet

SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}

Shapes = dict[str, tuple[int, ...]]


def layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def resnet(name: str, before: int, after: int) -> Shapes:
    shapes = {
        **layer(f"{name}.in_layers.0", before),
        **layer(f"{name}.in_layers.2", after, before, 3, 3),
        **layer(f"{name}.emb_layers.1", after, 1280),
        **layer(f"{name}.out_layers.0", after),
        **layer(f"{name}.out_layers.3", after, after, 3, 3),
    }
    return {**shapes, **(layer(f"{name}.skip_connection", after, before, 1, 1) if before != after else {})}


def transformer(name: str, width: int) -> Shapes:
    block = f"{name}.transformer_blocks.0"
    shapes = {**layer(f"{name}.norm", width), **layer(f"{name}.proj_in", width, width, 1, 1)}
    for attention, context in (("attn1", width), ("attn2", 768)):
        shapes |= {f"{block}.{attention}.to_q.weight": (width, width)}
        shapes |= {f"{block}.{attention}.to_{part}.weight": (width, context) for part in "kv"}
        shapes |= layer(f"{block}.{attention}.to_out.0", width, width)
    for i in (1, 2, 3):
        shapes |= layer(f"{block}.norm{i}", width)
    shapes |= layer(f"{block}.ff.net.0.proj", 8 * width, width) | layer(f"{block}.ff.net.2", width, 4 * width)
    return {**shapes, **layer(f"{name}.proj_out", width, width, 1, 1)}


def stock_layout() -> Shapes:
    """Return names and shapes of Stable Diffusion 1.5's U-Net from its published config.

    v1-inference.yaml: model_channels 320, channel_mult [1, 2, 4, 4], num_res_blocks 2, attention_resolutions
    [4, 2, 1], context_dim 768; the blocks are laid out as by the constructor of CompVis' UNetModel.
    """
    widths = (320, 640, 1280, 1280)
    shapes = (
        layer("time_embed.0", 1280, 320) | layer("time_embed.2", 1280, 1280) | layer("input_blocks.0.0", 320, 4, 3, 3)
    )
    number, width, skips = 1, 320, [320]
    for level, wanted in enumerate(widths):
        for _ in range(2):
            shapes |= resnet(f"input_blocks.{number}.0", width, wanted)
            shapes |= transformer(f"input_blocks.{number}.1", wanted) if level < 3 else {}
            number, width = number + 1, wanted
            skips.append(width)
        if level < 3:
            shapes |= layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
            number += 1
            skips.append(width)
    shapes |= resnet("middle_block.0", 1280, 1280) | transformer("middle_block.1", 1280)
    shapes |= resnet("middle_block.2", 1280, 1280)
    number = 0
    for level in (3, 2, 1, 0):
        for i in range(3):
            shapes |= resnet(f"output_blocks.{number}.0", width + skips.pop(), widths[level])
            width, next_place = widths[level], 1
            if level < 3:
                shapes |= transformer(f"output_blocks.{number}.1", width)
                next_place = 2
            if level and i == 2:
                shapes |= layer(f"output_blocks.{number}.{next_place}.conv", width, width, 3, 3)
            number += 1
    return shapes | layer("out.0", 320) | layer("out.2", 4, 320, 3, 3)


def test_stable_diffusion_15_gets_the_names_and_shapes_of_its_first_file():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    weights = original_unet_layout(unet.state_dict(), 2)
    expected = {f"model.diffusion_model.{name}": shape for name, shape in stock_layout().items()}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected
    assert len(expected) == 686  # the count of the published file
    back = convert_ldm_unet_checkpoint(weights, unet.config)
    assert back.keys() == unet.state_dict().keys()
    assert all(back[name] is weights[new] for name, new in zip(unet.state_dict(), weights, strict=True))


UNETS = {
    "attention_below": make_unet,
    "attention_above": make_adapter_unet,
    "three_levels_of_two": lambda: make_unet(
        block_out_channels=(8, 8, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=True,  # as in 2.x
    ),
}


def export(unet: UNet2DConditionModel, folder: Path, unet_format: Any) -> Path:
    pipeline: Any = make_tiny_pipeline("flow")
    pipeline.unet = unet
    path = folder / "unet.safetensors"
    export_unet(pipeline, path, unet_format)
    unet.save_pretrained(folder / "unet")
    return path


@pytest.mark.parametrize(("unet_format", "sign"), [("ldm", 1), ("comfyui", -1)])
@pytest.mark.parametrize("make", UNETS.values(), ids=UNETS)
def test_diffusers_reads_the_file_back_to_the_bit(make, unet_format, sign, tmp_path):
    unet = make()
    path = export(unet, tmp_path, unet_format)
    again: Any = UNet2DConditionModel.from_single_file(path, config=str(tmp_path), subfolder="unet")
    expected = {name: sign * w if name.startswith("conv_out.") else w for name, w in unet.state_dict().items()}
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(seen, expected[name]) for name, seen in again.state_dict().items())


def test_the_names_are_those_of_the_tests_own_table():
    """`tests.original_layout` was written for reading files, before there was an export."""
    pipeline: Any = make_tiny_pipeline("flow")
    theirs = {name for name in original_layout(pipeline) if name.startswith("model.diffusion_model.")}
    assert set(original_unet_layout(pipeline.unet.state_dict(), 1)) == theirs


def test_the_pipeline_is_left_as_it_was(tmp_path):
    pipeline: Any = make_tiny_pipeline("flow")
    export_unet(pipeline, tmp_path / "unet.safetensors")
    untouched: Any = make_tiny_pipeline("flow")
    assert torch.equal(pipeline.unet.conv_out.weight, untouched.unet.conv_out.weight)


def test_the_sampler_of_comfyui_takes_our_steps(tmp_path):
    """CONST and ModelSamplingDiscreteFlow of comfy/model_sampling.py, which its node ModelSamplingSD3 puts in, and the
    Euler method of k-diffusion: denoised = x - sigma * output at timestep 1000 sigma."""
    pipeline: Any = make_tiny_pipeline("flow")
    path = export(pipeline.unet, tmp_path, "comfyui")
    unet: Any = UNet2DConditionModel.from_single_file(path, config=str(tmp_path), subfolder="unet")
    embeds, _ = pipeline.encode_prompt("a fox", "cpu", 1, False)
    noise = torch.randn(1, 4, 8, 8)
    for steps in (1, 4):
        x, sigmas = noise, torch.linspace(1, 0, steps + 1)
        for sigma, after in pairwise(sigmas):
            with torch.no_grad():
                denoised = x - sigma * unet(x, 1000 * sigma, encoder_hidden_states=embeds).sample
            x = x + (x - denoised) / sigma * (after - sigma)
        call = {"latents": noise, "num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
        torch.testing.assert_close(x, pipeline("a fox", **call).images, atol=2e-5, rtol=1e-4)


def test_a_model_that_predicts_noise_minus_data_keeps_its_sign(tmp_path):
    pipeline: Any = make_tiny_pipeline("flow")
    pipeline.scheduler = RectifiedFlowEulerScheduler(velocity_direction="noise")
    export_unet(pipeline, tmp_path / "unet.safetensors")
    weights = load_file(tmp_path / "unet.safetensors")
    assert torch.equal(weights["model.diffusion_model.out.2.weight"], pipeline.unet.conv_out.weight)


def test_half_precision_stays(tmp_path):
    pipeline: Any = make_tiny_pipeline("flow")
    pipeline.unet.half()
    export_unet(pipeline, tmp_path / "unet.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "unet.safetensors").values()} == {torch.float16}


def test_it_refuses(tmp_path):
    pipeline: Any = make_tiny_pipeline("flow")
    file = tmp_path / "unet.safetensors"
    with pytest.raises(ValueError, match="one of comfyui, ldm, got 'a1111'"):
        export_unet(pipeline, file, "a1111")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"ends in \.safetensors, got .*unet\.ckpt"):
        export_unet(pipeline, tmp_path / "unet.ckpt")
    with pytest.raises(ValueError, match="got DDIMScheduler"):
        export_unet(make_tiny_pipeline("diffusion"), file)
    pipeline.unet = make_xl_unet()
    with pytest.raises(ValueError, match=r"weight 'add_embedding\.linear_1\.\w+', which has no place"):
        export_unet(pipeline, file)
    pipeline.unet = StackedUNet.from_unet(make_unet())
    with pytest.raises(ValueError, match="got StackedUNet"):
        export_unet(pipeline, file)
    pipeline.unet = make_unet()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="attached to the pipeline's unet"):
        export_unet(pipeline, file)
    with pytest.raises(ValueError, match=r"weight 'down_blocks\.0\.resnets\.0\.attn\.to_q\.weight', which has no"):
        original_unet_layout({"down_blocks.0.resnets.0.attn.to_q.weight": torch.zeros(1)}, 2)
    with pytest.raises(ValueError, match="weight 'add_embedding'"):
        original_unet_layout({"add_embedding": torch.zeros(1)}, 2)
    assert not file.exists()


def test_a_diffusion_model_can_be_had_in_the_original_layout(tmp_path):
    export_unet(make_tiny_pipeline("diffusion"), tmp_path / "unet.safetensors", "ldm")
    assert load_file(tmp_path / "unet.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_pipeline("flow").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("unet_format", ["comfyui", "ldm"])
def test_the_command_writes_the_file(model, unet_format, tmp_path, capsys):
    path, expected = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert cli.main(["export", unet_format, "--model", model, "-o", str(path), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{path}: exported as {unet_format}\n"
    export_unet(make_tiny_pipeline("flow"), expected, unet_format)
    assert path.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("unet.ckpt", [], "name ends in .safetensors"),
        ("no-such-folder/unet.safetensors", [], "does not exist"),
        ("unet.safetensors", ["--scheduler", "unipc"], "--scheduler is for the format diffusers"),
    ],
)
def test_the_command_refuses(model, output, more, message, tmp_path, capsys):
    assert cli.main(["export", "comfyui", "--model", model, "-o", str(tmp_path / output), *more]) == 2
    assert message in capsys.readouterr().err
