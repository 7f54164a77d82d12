"""Fine-tuning in the shape of diffusers' scripts trains the velocity, and its results load everywhere."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.training import objective
from tests.tiny import make_tiny_pipeline, sample

pytest.importorskip("datasets")

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "fine_tuning"
PATCHES = ("train_text_to_image", "train_text_to_image_lora")
SOURCE = os.environ.get("DIFFUSERS_SOURCE")  # a checkout of diffusers with its examples/
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 210), "grey": (90, 90, 90)}


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of four captioned pictures in the layout of `datasets`' imagefolder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 36), colour).save(folder / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": f"a {name} square"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a rectified flow saved as the published ones are: with a diffusion scheduler, which must be ignored."""
    folder = tmp_path / "model"
    make_tiny_pipeline("diffusion").save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "RectifiedFlowPipeline"}))
    return folder


@pytest.fixture
def tune(model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return `tune(script, options)`, which runs an example in this process and gives its output folder."""

    def run(script: str, **options: Any) -> Path:
        known = {"model": model, "train_data_dir": pictures, "output_dir": tmp_path / script, **options}
        words = [word for name, value in known.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
        return tmp_path / script

    return run


class Spy:
    """Records what each step handed to the objective, what the U-Net saw, and what was compared with what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.targets: list[torch.Tensor] = []
        prepare, loss, forward = (
            objective.FlowObjective.prepare,
            objective.FlowObjective.loss,
            UNet2DConditionModel.forward,
        )

        def spy_prepare(of: Any, **ends: Any) -> Any:
            self.ends.append((ends["noise"], ends["data"]))
            return prepare(of, **ends)

        def spy_loss(of: Any, prediction: torch.Tensor, batch: Any) -> Any:
            self.targets.append(batch.velocity)
            return loss(of, prediction, batch)

        def spy_forward(of: Any, x: torch.Tensor, timestep: torch.Tensor, *rest: Any, **options: Any) -> Any:
            if of.training:
                self.seen.append((x.detach(), timestep))
            return forward(of, x, timestep, *rest, **options)

        monkeypatch.setattr(objective.FlowObjective, "prepare", spy_prepare)
        monkeypatch.setattr(objective.FlowObjective, "loss", spy_loss)
        monkeypatch.setattr(UNet2DConditionModel, "forward", spy_forward)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def check_that_the_velocity_was_trained(spy: Spy, steps: int) -> None:
    """The target of every step is data - noise, the U-Net saw the straight path between them, timestep 1000 too."""
    assert len(spy.ends) == len(spy.seen) == len(spy.targets) == steps
    for (noise, data), (x_t, timesteps), target in zip(spy.ends, spy.seen, spy.targets, strict=True):
        torch.testing.assert_close(target, data - noise)
        assert noise.std().item() == pytest.approx(1, abs=0.2)
        t = (1 - timesteps / 1000).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(x_t, t * data + (1 - t) * noise)
    timesteps = torch.cat([timesteps for _, timesteps in spy.seen])
    assert (timesteps == 1000).any()
    assert timesteps.is_floating_point()
    assert timesteps.min() < 250


def one_step_error(pipeline: Any, colour: tuple[int, int, int]) -> float:
    """Return the RMSE between a one-step result and the latents of an image of one color."""
    with torch.no_grad():
        pixels = torch.tensor(colour).div(127.5).sub(1).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
        data = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    drawn = sample(pipeline, num_inference_steps=1, guidance_scale=1.0, prompt="a grey square")
    return (drawn - data).square().mean().sqrt().item()


@pytest.mark.slow
def test_the_full_example_trains_the_velocity(tune: Any, model: Path, pictures: Path, spy: Spy) -> None:
    """On one picture the flow from any noise ends in that picture, in one step: the wrong target would not."""
    colour = COLOURS["grey"]
    for file in pictures.glob("*.png"):
        Image.new("RGB", (40, 36), colour).save(file)
    steps = 100
    folder = tune("text_to_image", max_train_steps=steps, learning_rate=2e-2)
    check_that_the_velocity_was_trained(spy, steps)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "RectifiedFlowPipeline"
    assert index["scheduler"] == ["rectified_diffusers", "RectifiedFlowEulerScheduler"]
    tuned = DiffusionPipeline.from_pretrained(folder)
    assert type(tuned) is RectifiedFlowPipeline
    assert isinstance(tuned.scheduler, RectifiedFlowEulerScheduler)
    before = one_step_error(RectifiedFlowPipeline.from_pretrained(model), colour)
    assert before > 0.8
    assert one_step_error(tuned, colour) < 0.5 * before


def test_the_lora_example_makes_a_lora_that_loads_everywhere(tune: Any, model: Path, spy: Spy) -> None:
    steps = 12
    folder = tune("text_to_image_lora", max_train_steps=steps, gradient_accumulation_steps=2, learning_rate=1e-2)
    check_that_the_velocity_was_trained(spy, steps)  # four pictures are one micro-batch and the end of an epoch
    assert [path.name for path in folder.iterdir()] == ["pytorch_lora_weights.safetensors"]
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    names = re.compile(r"unet\..*\.attn[12]\.to_(q|k|v|out\.0)\.lora\.(down|up)\.weight|unet\..*\.lora_[AB]\.weight")
    assert all(names.fullmatch(name) for name in weights)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(value.any() for value in weights.values())  # up starts at zero
    stock = StableDiffusionPipeline.from_pretrained(model, scheduler=RectifiedFlowEulerScheduler())
    results = []
    for pipeline in (stock, RectifiedFlowPipeline.from_pretrained(model)):
        plain = sample(pipeline, guidance_scale=1.0)
        pipeline.load_lora_weights(folder)
        results.append(sample(pipeline, guidance_scale=1.0))
        assert not torch.allclose(results[-1], plain, atol=1e-3)
        pipeline.unload_lora_weights()
        assert torch.equal(sample(pipeline, guidance_scale=1.0), plain)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", PATCHES)
def test_the_patch_is_seven_lines_and_the_page_shows_it(name: str) -> None:
    patch = (EXAMPLES / f"{name}.patch").read_text()
    added = [line for line in patch.splitlines() if re.match(r"\+(?!\+\+ )", line)]
    assert len(added) == 7
    page = (ROOT / "docs" / "fine_tuning.md").read_text()
    assert all(line[1:].strip() in page for line in added)
    ours = (EXAMPLES / f"{name.removeprefix('train_')}.py").read_text()
    assert "objective.prepare(noise=" in ours  # the examples have the same lines
    assert "objective.loss(" in ours


@pytest.mark.very_slow
@pytest.mark.skipif(not SOURCE, reason="DIFFUSERS_SOURCE names no checkout of diffusers")
@pytest.mark.parametrize("name", PATCHES)
def test_the_patched_stock_script_trains_the_velocity(
    name: str, model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spy: Spy
) -> None:
    script = tmp_path / f"{name}.py"
    shutil.copy(Path(str(SOURCE), "examples", "text_to_image", script.name), script)
    command = ["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "-i", str(EXAMPLES / f"{name}.patch")]
    subprocess.run(command, cwd=tmp_path, check=True)
    options = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": pictures,
        "output_dir": tmp_path / "out",
        "cache_dir": tmp_path / "cache",
        "resolution": 32,
        "train_batch_size": 4,
        "max_train_steps": 12,
        "seed": 0,
    }
    monkeypatch.setattr(
        sys, "argv", [name, *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
    )
    runpy.run_path(str(script), run_name="__main__")
    check_that_the_velocity_was_trained(spy, 12)
    pipeline = RectifiedFlowPipeline.from_pretrained(model)
    if name.endswith("lora"):
        plain = sample(pipeline, guidance_scale=1.0)
        pipeline.load_lora_weights(tmp_path / "out")
        assert not torch.equal(sample(pipeline, guidance_scale=1.0), plain)
    else:
        tuned = DiffusionPipeline.from_pretrained(tmp_path / "out")
        assert type(tuned) is RectifiedFlowPipeline
        assert isinstance(tuned.scheduler, RectifiedFlowEulerScheduler)
