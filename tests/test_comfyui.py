"""The shipped workflow in ComfyUI's own server, with random weights.

ComfyUI recognizes a model by its widths. The text encoder and the VAE have the sizes of Stable Diffusion 1.5, and the
U-Net its widths at two resolutions. With the environment variable COMFYUI_FULL=1, it has all four, and the test needs
11 GB of memory.

    python -m pytest tests/test_comfyui.py --comfyui=CHECKOUT -s

The server runs with CHECKOUT/.venv if there is one, otherwise with this Python. The page is opened where there is a
Chromium. With the environment variable WRITE_SCREENSHOTS=1, the screenshot replaces the one in docs/images.
"""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.very_slow
ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / "examples" / "comfyui"
SIZE, PROMPT, SEED = 128, "a photo of a fox in the snow", 7


@pytest.fixture(scope="module")
def checkout(request) -> Path:
    if (folder := request.config.getoption("--comfyui")) is None:
        pytest.skip("needs a checkout of ComfyUI: --comfyui=CHECKOUT")
    return Path(folder).resolve()


@pytest.fixture(scope="module")
def pipeline(checkout) -> Any:
    """A pipeline of Stable Diffusion 1.5's widths; its random images use most of the range of levels."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from rectified_diffusers import RectifiedFlowEulerScheduler, RectifiedFlowPipeline

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    blocks: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    unet: dict[str, Any] = {
        "block_out_channels": (320, 640),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
    }
    if os.environ.get("COMFYUI_FULL"):
        unet = {}
    pipeline = RectifiedFlowPipeline(
        vae=AutoencoderKL(latent_channels=4, **blocks).eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(checkout / "comfy" / "sd1_tokenizer", model_max_length=77),
        unet=UNet2DConditionModel(sample_size=SIZE // 8, cross_attention_dim=768, **unet).eval(),
        scheduler=RectifiedFlowEulerScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipeline.unet.conv_out.weight *= 10
    return pipeline


@pytest.fixture(scope="module")
def models(pipeline, tmp_path_factory) -> Path:
    """Write the files of the workflow, as docs/how_to/export.md describes, into the folders of ComfyUI."""
    from rectified_diffusers import cli

    base, saved = tmp_path_factory.mktemp("comfyui"), tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(saved)
    for name in ("diffusion_models", "text_encoders", "vae"):
        (base / "models" / name).mkdir(parents=True)
    for name in ("custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir()
    unet = base / "models" / "diffusion_models" / "instaflow.safetensors"
    assert cli.main(["export", "comfyui", "--model", str(saved), "-o", str(unet), "--device", "cpu"]) == 0
    (saved / "text_encoder" / "model.safetensors").rename(
        base / "models" / "text_encoders" / "instaflow-text.safetensors"
    )
    (saved / "vae" / "diffusion_pytorch_model.safetensors").rename(
        base / "models" / "vae" / "instaflow-vae.safetensors"
    )
    return base


@pytest.fixture(scope="module")
def server(checkout, models) -> Any:
    """Start ComfyUI on the CPU, reachable from this machine alone, and return its address."""
    python = checkout / ".venv" / "bin" / "python"
    arguments = ["--cpu", "--port", "8189", "--base-directory", str(models)]
    arguments += ["--disable-all-custom-nodes", "--disable-api-nodes"]
    command = [str(python) if python.exists() else sys.executable, str(checkout / "main.py"), *arguments]
    with (models / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=checkout) as process:
        address, deadline = "http://127.0.0.1:8189", time.monotonic() + 300
        while not _is_up(address):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail((models / "log").read_text()[-4000:])
            time.sleep(1)
        yield address
        process.terminate()


def _is_up(address: str) -> bool:
    try:
        return urlopen(f"{address}/queue").status == 200
    except URLError:
        return False


def history(address: str) -> dict[str, Any]:
    return json.load(urlopen(f"{address}/history"))


def run_workflow(address: str, **changes: dict[str, Any]) -> np.ndarray:
    """Return the image of the shipped workflow, with changed inputs of its nodes."""
    workflow = json.loads((WORKFLOWS / "one_step_api.json").read_text())
    workflow["6"]["inputs"].update(width=SIZE, height=SIZE)
    for node, inputs in changes.items():
        workflow[node.removeprefix("node_")]["inputs"].update(inputs)
    try:
        answer = json.load(urlopen(f"{address}/prompt", json.dumps({"prompt": workflow}).encode()))
    except HTTPError as error:
        raise AssertionError(error.read().decode()) from error
    while answer["prompt_id"] not in (finished := history(address)):
        time.sleep(1)
    done = finished[answer["prompt_id"]]
    assert done["status"]["status_str"] == "success", done["status"]["messages"]
    name = done["outputs"]["10"]["images"][0]["filename"]
    return np.asarray(Image.open(io.BytesIO(urlopen(f"{address}/view?filename={name}").read())), dtype=int)


@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (4, 1.0), (2, 1.5)])
def test_its_image_is_ours(server, pipeline, steps, scale):
    """The same seed gives the same noise: ComfyUI and our pipeline both draw it on the CPU."""
    generator = torch.Generator().manual_seed(SEED)
    size: dict[str, int] = {"height": SIZE, "width": SIZE}
    call = {"num_inference_steps": steps, "guidance_scale": scale, "generator": generator, "output_type": "np"}
    ours = (255 * pipeline(PROMPT, **size, **call).images[0]).astype(int)
    theirs = run_workflow(server, node_7={"steps": steps, "cfg": scale})
    difference = abs(ours - theirs)
    print(f"{steps} steps, cfg {scale}: at most {difference.max()} of 255 levels, mean {difference.mean():.4f}")
    assert ours.std() > 25
    assert ((ours > 0) & (ours < 255)).mean() > 0.8
    assert difference.max() <= 2


def test_without_the_node_of_flow_models_it_is_another_image(server):
    flow = run_workflow(server)
    diffusion = run_workflow(server, node_7={"model": ["1", 0]})
    assert abs(flow - diffusion).mean() > 20


RUN = """(size) => {
  const widgets = app.graph.getNodeById(6).widgets;
  widgets[0].value = widgets[1].value = size;
  return app.queuePrompt(0);
}"""


def test_the_page_opens_the_workflow(server, tmp_path):
    """Both files are one workflow: the page converts the one for the editor to the one for the API."""
    workflow, expected = (json.loads((WORKFLOWS / f"one_step{kind}.json").read_text()) for kind in ("", "_api"))
    kinds = {node["class_type"] for node in expected.values()}
    settings = b'{"Comfy.TutorialCompleted": true, "Comfy.Minimap.Visible": false}'
    urlopen(Request(f"{server}/settings", settings, {"Content-Type": "application/json"}))
    from tests.test_demo_browser import chromium  # skips this test where there is no playwright

    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 640})
        page.set_default_timeout(120_000)
        page.goto(server)
        page.wait_for_function(f"{[*kinds]}.every((kind) => window.LiteGraph?.registered_node_types[kind])")
        page.wait_for_function("window.app.extensionManager")
        page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        converted = page.evaluate("async () => (await app.graphToPrompt()).output")
        before = len(history(server))
        page.evaluate(RUN, SIZE)
        while len(history(server)) == before:
            page.wait_for_timeout(1000)
        page.wait_for_timeout(3000)
        folder = ROOT / "docs" / "images" if os.environ.get("WRITE_SCREENSHOTS") else tmp_path
        page.screenshot(path=folder / "comfyui.png")
    assert converted == {node: {**each, "_meta": converted[node]["_meta"]} for node, each in expected.items()}
