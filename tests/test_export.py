"""The exports draw the pictures of the model: ONNX graphs by onnxruntime, the sign-folded folder by diffusers."""

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UniPCMultistepScheduler
from peft import LoraConfig
from transformers import CLIPTokenizer

from rectified_diffusers import (
    RectifiedFlowControlNetPipeline,
    RectifiedFlowPipeline,
    RectifiedFlowXLPipeline,
    bundled_checkpoint,
    cli,
)
from rectified_diffusers.export.onnx import export_onnx, gather
from rectified_diffusers.export.stock import export_diffusers, fold_sign, stock_solver
from rectified_diffusers.models.stacked_unet import StackedUNet
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
from tests.marks import slow_but
from tests.tiny import make_tiny_controlnet, make_tiny_pipeline, make_xl_components

# onnxruntime sums in another order than torch: about 1e-6 of values of about 1 here, over the whole pipeline.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def pipeline():
    return make_tiny_pipeline("flow")


@pytest.fixture(scope="module")
def bundled():
    pipeline = RectifiedFlowPipeline.from_pretrained(bundled_checkpoint())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(count: int = 1, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(5))


def with_lora(part: str) -> StableDiffusionPipeline:
    pipeline = make_tiny_pipeline("flow")
    targets = {"unet": ["to_q"], "text_encoder": ["q_proj"]}
    getattr(pipeline, part).add_adapter(LoraConfig(r=2, target_modules=targets[part], init_lora_weights=False))
    return pipeline


# ---------------------------------------------------------------------------------------------- ONNX


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(pipeline, folder)
    return folder


def run(folder: Path, name: str, **inputs: torch.Tensor | np.ndarray) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / name / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {key: np.asarray(value) for key, value in inputs.items()})


@pytest.mark.slow
def test_the_folder_has_the_layout_of_the_communitys(exported):
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    for name in ("text_encoder", "unet", "vae_decoder"):
        assert {f"{name}/model.onnx", f"{name}/config.json"} <= files
    assert {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"} <= files
    assert not [file for file in files if Path(file).name.startswith("tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_text_encoder_is_torchs(pipeline, exported, count):
    tokens = pipeline.tokenizer(["a fox", "the red owl", ""][:count], padding="max_length", return_tensors="pt")
    hidden, pooled = run(exported, "text_encoder", input_ids=tokens.input_ids.to(torch.int32))
    with torch.no_grad():
        expected = pipeline.text_encoder(tokens.input_ids)
    np.testing.assert_allclose(hidden, expected.last_hidden_state, **TOLERANCE)
    np.testing.assert_allclose(pooled, expected.pooler_output, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "height", "width"), [(1, 8, 8), (2, 8, 8), (3, 12, 16)])
@pytest.mark.parametrize("timestep", [1000.0, 333.3])
def test_the_unet_and_the_vae_are_torchs_at_any_size(pipeline, exported, count, height, width, timestep):
    sample = noise(count, height, width)
    embeds = torch.randn(count, 77, 16)
    inputs = {"timestep": torch.tensor([timestep]), "encoder_hidden_states": embeds}
    (predicted,) = run(exported, "unet", sample=sample, **inputs)
    (pixels,) = run(exported, "vae_decoder", latent_sample=sample)
    with torch.no_grad():
        expected = pipeline.unet(sample, **inputs).sample
        np.testing.assert_allclose(predicted, -expected, **TOLERANCE)  # noise - data, as stock schedulers expect
        np.testing.assert_allclose(pixels, pipeline.vae.decode(sample).sample, **TOLERANCE)


@pytest.mark.slow
def test_the_graphs_alone_draw_the_picture_of_the_pipeline(pipeline, exported):
    """With the tokenizer and the config that are in the folder, numpy, and the Euler method."""
    tokenizer = CLIPTokenizer.from_pretrained(exported / "tokenizer")
    config = json.loads((exported / "vae_decoder" / "config.json").read_text())
    tokens = tokenizer(["", "a fox"], padding="max_length", return_tensors="np").input_ids.astype(np.int32)
    embeds, _ = run(exported, "text_encoder", input_ids=tokens)
    x, steps, guidance_scale = noise().numpy(), 3, 2.0
    for i in range(steps):
        timestep = np.array([1000 * (1 - i / steps)], np.float32)
        (predicted,) = run(
            exported, "unet", sample=np.concatenate([x, x]), timestep=timestep, encoder_hidden_states=embeds
        )
        null, text = np.split(predicted, 2)
        x = x - (null + guidance_scale * (text - null)) / steps
    (pixels,) = run(exported, "vae_decoder", latent_sample=(x / config["scaling_factor"]).astype(np.float32))
    picture = (pixels / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "latents": noise(), "output_type": "np"}
    np.testing.assert_allclose(picture, pipeline("a fox", **call).images, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(diffusers, "OnnxStableDiffusionPipeline"), reason="diffusers has dropped it")
def test_diffusers_own_onnx_pipeline_runs_the_graphs(pipeline, exported):
    names = ("text_encoder", "unet", "vae_decoder")
    graphs = {name: diffusers.OnnxRuntimeModel.from_pretrained(exported / name, provider_options={}) for name in names}
    theirs = diffusers.OnnxStableDiffusionPipeline(
        **graphs,
        vae_encoder=None,
        tokenizer=CLIPTokenizer.from_pretrained(exported / "tokenizer"),
        scheduler=RectifiedFlowEulerScheduler.from_pretrained(
            exported, subfolder="scheduler", velocity_direction="noise"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 2.0}
    # It takes latents for 8 times smaller than the picture; the tiny VAE makes them 4.
    seen = theirs("a fox", latents=noise().numpy(), height=64, width=64, output_type="np", **call).images
    expected = pipeline("a fox", latents=noise(), output_type="np", **call).images
    np.testing.assert_allclose(seen, expected, **TOLERANCE)


@pytest.mark.slow
def test_weights_above_the_formats_limit_become_one_file(exported, tmp_path):
    """Here by asking for them in files of their own, which is what torch does above 2 GB."""
    import onnx

    traced, folder = tmp_path / "traced", tmp_path / "out" / "unet"
    traced.mkdir()
    folder.mkdir(parents=True)
    (folder / "model.onnx_data").write_bytes(b"of an earlier export")
    many = {"save_as_external_data": True, "all_tensors_to_one_file": False, "size_threshold": 0}
    onnx.save_model(onnx.load(exported / "unet" / "model.onnx"), traced / "model.onnx", **many)
    assert len(list(traced.iterdir())) > 2
    gather(traced, folder)
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx_data"}
    inputs = {"sample": noise(), "timestep": np.float32([500]), "encoder_hidden_states": torch.zeros(1, 77, 16)}
    np.testing.assert_array_equal(run(tmp_path / "out", "unet", **inputs), run(exported, "unet", **inputs))


@pytest.mark.slow
def test_the_pipeline_is_left_as_it_was(pipeline, exported):
    assert not pipeline.unet.training
    assert torch.equal(pipeline.unet.conv_out.weight, make_tiny_pipeline("flow").unet.conv_out.weight)


def test_onnx_refuses(tmp_path, monkeypatch):
    bfloat16 = make_tiny_pipeline("flow")
    bfloat16.unet.to(torch.bfloat16)
    with pytest.raises(ValueError, match="cannot convolve bfloat16"):
        export_onnx(bfloat16, tmp_path)
    with pytest.raises(ValueError, match="got RectifiedFlowXLPipeline"):
        export_onnx(RectifiedFlowXLPipeline(**make_xl_components(), scheduler=None), tmp_path)
    headless = make_tiny_pipeline("flow")
    headless.text_encoder = None
    with pytest.raises(TypeError, match="got RectifiedFlowPipeline without text_encoder"):
        export_onnx(headless, tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install \"rectified_diffusers\[onnx\]\""):
        export_onnx(make_tiny_pipeline("flow"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("export", [export_onnx, export_diffusers])
def test_an_attached_lora_is_refused(export, part, tmp_path):
    with pytest.raises(ValueError, match=f"attached to the pipeline's {part}.*fuse_lora.*unload_lora_weights"):
        export(with_lora(part), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- stock diffusers


def without_us(monkeypatch) -> None:
    """Make every import of this package fail."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rectified_diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)


def load_stock(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("dpm_solver++", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)],
)
def test_stock_diffusers_loads_and_runs_the_folder_without_us(pipeline, tmp_path, monkeypatch, name, scheduler):
    export_diffusers(pipeline, tmp_path, name)
    assert not [path for path in tmp_path.rglob("*.json") if "rectified" in path.read_text(encoding="utf-8").lower()]
    call = {"latents": noise(), "guidance_scale": 1.0, "output_type": "latent"}
    expected = {steps: pipeline("a fox", num_inference_steps=steps, **call).images for steps in (1, 4)}
    without_us(monkeypatch)
    stock = load_stock(tmp_path)
    assert type(stock) is StableDiffusionPipeline
    assert type(stock.scheduler) is scheduler
    assert not [part for part in stock.components.values() if type(part).__module__.startswith("rectified")]
    for steps, images in expected.items():
        seen = stock("a fox", num_inference_steps=steps, **call).images
        assert stock.scheduler.timesteps[0] == 1000
        # From the other grid; the next test says that there is nothing else.
        assert (seen - images).norm() / images.norm() < 0.01


@pytest.mark.parametrize("name", ["dpm_solver++", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_on_the_stock_grid_our_euler_gives_the_same(pipeline, tmp_path, steps, name):
    """Order 1 is the Euler method: what is left is where the grid begins and that its timesteps are whole numbers."""
    export_diffusers(pipeline, tmp_path, name)
    stock = load_stock(tmp_path)
    call = {"latents": noise(), "guidance_scale": 2.0, "output_type": "latent"}
    seen = stock("a fox", num_inference_steps=steps, **call).images
    velocity_of = stock.unet  # folded: noise - data
    embeds, null = stock.encode_prompt("a fox", stock.device, 1, True)
    x = noise()
    sigmas = [*stock.scheduler.sigmas.tolist()]
    for sigma, after, timestep in zip(sigmas[:-1], sigmas[1:], stock.scheduler.timesteps, strict=True):
        with torch.no_grad():
            text, empty = (velocity_of(x, timestep, encoder_hidden_states=e).sample for e in (embeds, null))
        x = x + (after - sigma) * (empty + 2.0 * (text - empty))
    torch.testing.assert_close(seen, x, atol=2e-5, rtol=1e-4)
    assert stock.scheduler.timesteps[0] == 1000
    assert sigmas[0] == pytest.approx(1 if name == "unipc" else 1000 / 1001, abs=1e-5)


@pytest.mark.parametrize("shift", slow_but([3.0], [1.0, 3.0]))
def test_the_second_order_beats_euler(shift, tmp_path):
    """On a U-Net that is smooth in t, against many steps of our own."""
    pipeline: Any = make_tiny_pipeline("flow")
    with torch.no_grad():
        pipeline.unet.time_embedding.linear_1.weight.unflatten(1, (2, -1))[:, :, :-1] = 0
    pipeline.scheduler = RectifiedFlowEulerScheduler(shift=shift)
    export_diffusers(pipeline, tmp_path, solver_order=2)
    stock = load_stock(tmp_path)
    assert stock.scheduler.config.flow_shift == shift
    call = {"latents": noise(), "guidance_scale": 1.0, "output_type": "latent"}
    exact = pipeline("a fox", num_inference_steps=100, **call).images
    euler, second = (p("a fox", num_inference_steps=8, **call).images for p in (pipeline, stock))
    assert (second - exact).norm() < 0.75 * (euler - exact).norm()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["dpm_solver++", "unipc"])
def test_a_distilled_models_stock_images_are_ours(bundled, tmp_path, name, steps):
    """Those of the bundled model: within 6 levels, but for single values at 2 and 4 steps.

    At most 7 of the 49,152 values are above 6 there. Their bound is a sixteenth of what a second order is off at 4
    steps, 124 or 159 levels.
    """
    prompts = ["a cat", "a red apple", "a house", "a smiling face"]

    def levels_off(order: int, steps: int) -> np.ndarray:
        folder = tmp_path / str(order)
        export_diffusers(bundled, folder, name, solver_order=order)
        call = {"latents": noise(4, 16, 16), "num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "np"}
        seen, expected = (p(prompts, **call).images for p in (load_stock(folder), bundled))
        return 255 * np.abs(seen - expected)

    off = levels_off(1, steps)
    assert np.quantile(off, 0.999) < 6
    assert off.max() < (levels_off(2, 4).max() / 16 if steps in (2, 4) else 6)


@pytest.mark.parametrize("count", [1000, 100])
def test_our_scheduler_reads_the_timesteps_of_an_exported_one(count):
    ours = RectifiedFlowEulerScheduler(num_train_timesteps=count)
    stock = stock_solver(ours, "unipc", 1)
    for solver in (stock, DPMSolverMultistepScheduler.from_config(stock.config)):
        again = RectifiedFlowEulerScheduler.from_config(solver.config, velocity_direction="noise")
        assert again.config["num_train_timesteps"] == count
    for others in (count, count + 1):
        solver = UniPCMultistepScheduler(num_train_timesteps=others, use_flow_sigmas=True)
        again = RectifiedFlowEulerScheduler.from_config(solver.config, velocity_direction="noise")
        assert again.config["num_train_timesteps"] == others


def test_folding_negates_the_prediction_to_the_bit_and_touches_nothing(pipeline):
    sample, embeds = noise(2), torch.randn(2, 77, 16)
    with torch.no_grad():
        before = pipeline.unet(sample, 500, encoder_hidden_states=embeds).sample
        folded = fold_sign(pipeline.unet)
        assert torch.equal(folded(sample, 500, encoder_hidden_states=embeds).sample, -before)
        assert torch.equal(pipeline.unet(sample, 500, encoder_hidden_states=embeds).sample, before)
    assert folded.conv_in.weight is pipeline.unet.conv_in.weight
    assert folded.config == pipeline.unet.config


def test_a_model_that_predicts_noise_minus_data_is_saved_as_it_is(tmp_path):
    pipeline = make_tiny_pipeline("flow")
    pipeline.scheduler = RectifiedFlowEulerScheduler(velocity_direction="noise")
    export_diffusers(pipeline, tmp_path)
    assert torch.equal(load_stock(tmp_path).unet.conv_out.weight, pipeline.unet.conv_out.weight)


def test_ours_runs_the_folder_when_it_is_told_the_sign(pipeline, tmp_path):
    export_diffusers(pipeline, tmp_path)
    told = RectifiedFlowEulerScheduler(velocity_direction="noise")
    again = RectifiedFlowPipeline.from_pretrained(tmp_path, scheduler=told)
    again.set_progress_bar_config(disable=True)
    call = {"latents": noise(), "output_type": "latent"}
    assert torch.equal(again("a fox", **call).images, pipeline("a fox", **call).images)


def test_stable_diffusion_xl_becomes_its_stock_class(tmp_path):
    pipeline: Any = RectifiedFlowXLPipeline(**make_xl_components(), scheduler=None)
    pipeline.set_progress_bar_config(disable=True)
    export_diffusers(pipeline, tmp_path)
    stock = load_stock(tmp_path)
    assert type(stock) is diffusers.StableDiffusionXLPipeline
    call = {"latents": noise(), "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    expected = pipeline("a fox", **call).images
    assert (stock("a fox", **call).images - expected).norm() / expected.norm() < 0.02


def test_diffusers_refuses(pipeline, tmp_path):
    with pytest.raises(ValueError, match="got DDIMScheduler"):
        export_diffusers(make_tiny_pipeline("diffusion"), tmp_path)
    with pytest.raises(ValueError, match=r"one of dpm_solver\+\+, unipc, got 'euler'"):
        export_diffusers(pipeline, tmp_path, "euler")
    controlled = RectifiedFlowControlNetPipeline(**pipeline.components, controlnet=make_tiny_controlnet(pipeline.unet))
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no controlnet"):
        export_diffusers(controlled, tmp_path)
    stacked = make_tiny_pipeline("flow")
    stacked.unet = StackedUNet.from_unet(stacked.unet)
    with pytest.raises(ValueError, match="got StackedUNet"):
        export_diffusers(stacked, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_the_command_exports_to_onnx(model, tmp_path, capsys, exported):
    output = tmp_path / "out"
    assert cli.main(["export", "onnx", "--model", model, "--output", str(output), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{output}: exported as onnx\n"
    inputs = {"sample": noise(), "timestep": np.float32([500]), "encoder_hidden_states": torch.zeros(1, 77, 16)}
    np.testing.assert_array_equal(run(output, "unet", **inputs), run(exported, "unet", **inputs))


def test_the_command_exports_to_diffusers(model, tmp_path, capsys):
    given = ["export", "diffusers", "--model", model, "--output", str(tmp_path), "--scheduler", "dpm_solver++"]
    assert cli.main([*given, "--solver-order", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: exported as diffusers\n"
    scheduler = load_stock(tmp_path).scheduler
    assert type(scheduler) is DPMSolverMultistepScheduler
    assert scheduler.config.solver_order == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coreml"], "invalid choice: 'coreml'"),
        ([], "required: format"),
        (["onnx", "--scheduler", "unipc"], "--scheduler is for the format diffusers"),
        (["comfyui", "--solver-order", "2"], "--solver-order is for the format diffusers"),
        (["diffusers", "--solver-order", "0"], "solver_order must be at least 1"),
        (["diffusers", "--scheduler", "euler"], "invalid choice: 'euler'"),
        (["onnx", "--model", "no-such-folder"], "no folder 'no-such-folder'"),
    ],
)
def test_the_command_refuses(model, tmp_path, capsys, arguments, message):
    chosen = [] if "--model" in arguments else ["--model", model]
    assert cli.main(["export", *arguments, *chosen, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_diffusion_model_is_one_line(tmp_path, capsys):
    make_tiny_pipeline("diffusion").save_pretrained(tmp_path / "model")
    assert cli.main(["export", "diffusers", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "out")]) == 2
    assert "got DDIMScheduler" in capsys.readouterr().err


def test_ours_refuses_the_folder_unless_it_is_told_the_sign(pipeline, tmp_path):
    export_diffusers(pipeline, tmp_path)
    with pytest.raises(ValueError, match="velocity_direction='noise'"):
        RectifiedFlowPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="velocity_direction='noise'"):
        RectifiedFlowPipeline.from_pipe(load_stock(tmp_path))
