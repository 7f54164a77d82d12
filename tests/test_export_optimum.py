"""The exports draw our images in optimum's pipelines, with onnxruntime and with OpenVINO.

optimum needs older transformers and diffusers than the newest, so these tests run in an environment of their own:

    pip install -e . "optimum-onnx==0.1.0" "optimum-intel==1.27.0" "transformers==4.57.6" "diffusers==0.38.0"
    pip install openvino onnx onnxruntime pytest
    pytest tests/test_export_optimum.py
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rectified_diffusers import RectifiedFlowPipeline, bundled_checkpoint, export_diffusers, export_onnx
from tests.tiny import make_tiny_pipeline

LEVELS = 8  # what is left of the stock grid, see test_export.py
PROMPTS = ["a cat", "a red apple", "a house", "a smiling face"]


def ort() -> Any:
    return pytest.importorskip("optimum.onnxruntime", exc_type=ImportError).ORTStableDiffusionPipeline


def openvino() -> Any:
    pytest.importorskip("openvino")
    return pytest.importorskip("optimum.intel", exc_type=ImportError).OVStableDiffusionPipeline


@pytest.fixture(scope="module")
def bundled() -> Any:
    return RectifiedFlowPipeline.from_pretrained(bundled_checkpoint())


@pytest.fixture(scope="module")
def onnx(bundled, tmp_path_factory) -> Path:
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(bundled, folder)
    return folder


@pytest.fixture(scope="module")
def stock(bundled, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    export_diffusers(bundled, folder)
    return folder


def levels(theirs: Any, ours: Any, steps: int, size: int = 64, guidance_scale: float = 1.0) -> float:
    """Return the largest difference of the images of two pipelines, of 255 levels."""
    channels, factor = ours.unet.config.in_channels, ours.vae_scale_factor
    shape = (len(PROMPTS), channels, size // factor, size // factor)
    call = {
        "latents": torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "output_type": "np",
    }
    for pipeline in (theirs, ours):
        pipeline.set_progress_bar_config(disable=True)
    images = theirs(PROMPTS, height=size, width=size, **call).images
    return float(255 * np.abs(images - ours(PROMPTS, **call).images).max())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_onnxruntime_draws_our_images(bundled, onnx, steps):
    assert levels(ort().from_pretrained(onnx), bundled, steps) < LEVELS


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_openvino_draws_our_images(bundled, onnx, steps):
    """In float32, which the folder says; otherwise some processors compute in bfloat16."""
    theirs = openvino().from_pretrained(onnx, from_onnx=True)
    assert theirs.ov_config["INFERENCE_PRECISION_HINT"] == "f32"
    assert levels(theirs, bundled, steps) < LEVELS


@pytest.mark.slow
def test_openvinos_precision_is_the_callers_to_choose(onnx):
    theirs = openvino().from_pretrained(onnx, from_onnx=True, ov_config={"INFERENCE_PRECISION_HINT": "bf16"})
    assert theirs.ov_config["INFERENCE_PRECISION_HINT"] == "bf16"


@pytest.mark.very_slow
@pytest.mark.parametrize("steps", [1, 4])
def test_onnxruntime_exports_the_stock_folder(bundled, stock, steps, tmp_path):
    """In a process without this package, as its users are; optimum then finds the library of a pipeline's class."""
    ort()
    code = "import sys; from optimum.onnxruntime import ORTStableDiffusionPipeline as Pipeline; "
    code += "Pipeline.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, str(stock), str(tmp_path / "out")], check=True)
    assert levels(ort().from_pretrained(tmp_path / "out"), bundled, steps) < LEVELS


@pytest.mark.very_slow
@pytest.mark.parametrize("steps", [1, 4])
def test_openvino_exports_the_stock_folder(bundled, stock, steps):
    theirs = openvino().from_pretrained(stock, export=True, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
    assert levels(theirs, bundled, steps) < LEVELS


@pytest.mark.slow
def test_another_size_and_guidance(bundled, onnx):
    assert levels(ort().from_pretrained(onnx), bundled, 2, size=96, guidance_scale=2.0) < LEVELS


@pytest.mark.slow
def test_a_diffusion_model_keeps_its_scheduler_and_its_sign(tmp_path):
    pytest.importorskip("onnx")
    ours: Any = make_tiny_pipeline("diffusion")
    export_onnx(ours, tmp_path)
    theirs = ort().from_pretrained(tmp_path)
    assert type(theirs.scheduler) is type(ours.scheduler)
    assert levels(theirs, ours, 3, size=32) < 1
