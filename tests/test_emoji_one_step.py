"""examples/emoji/one_step.py in small: all stages, from a teacher that predicts v to a finished one-step model."""

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from rectified_diffusers import RectifiedFlowPipeline
from tests import emoji
from tests.emoji import SIZE, write_data
from tests.tiny import make_components, make_diffusion_scheduler, make_unet, sample

STAGES = ("2-rectified-flow", "finished", "one-step-l2", "one-step-lpips")


@pytest.fixture
def arguments(backbone, tmp_path) -> list[str]:
    data, teacher, weights, prompts = (tmp_path / name for name in ("data", "given", "weights", "prompts.txt"))
    components = {**make_components(), "unet": make_unet(sample_size=SIZE // 4, block_out_channels=(48, 64))}
    scheduler = make_diffusion_scheduler(prediction_type="v_prediction")
    StableDiffusionPipeline(**components, scheduler=scheduler).save_pretrained(teacher)
    write_data(data)
    weights.mkdir()
    (weights / "lpips_alexnet.safetensors").symlink_to(backbone)
    prompts.write_text("square\ndark\n", encoding="utf-8")
    given = {"data": data, "prompts": prompts, "weights": weights, "teacher": teacher, "output": tmp_path / "stages"}
    small = dict.fromkeys(("first-triplets", "second-triplets", "real-pictures"), 2)
    steps = dict.fromkeys(("teacher-steps", "reflow-steps", "l2-steps", "lpips-steps", "matching-steps"), 1)
    return [f"--{name}={value}" for name, value in {**given, **small, **steps, "batch-size": 2}.items()]


def made(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("unet/*.safetensors")}


@pytest.mark.very_slow
def test_it_goes_from_a_teacher_to_one_step_once(arguments, monkeypatch, tmp_path):
    stages = tmp_path / "stages"
    with emoji.example("one_step.py", monkeypatch) as run:
        run(*arguments)
        first = made(stages)
        run(*arguments)
    assert made(stages) == first
    assert sorted(path.parent.parent.name for path in first) == sorted([*STAGES, "teacher"])
    triplets = ("real-triplets", "triplets-1", "triplets-2")
    assert sorted(path.name for path in stages.iterdir()) == sorted([*STAGES, "teacher", *triplets])
    pipeline = RectifiedFlowPipeline.from_pretrained(stages / "finished")
    assert type(pipeline.unet) is UNet2DConditionModel
    assert sample(pipeline, num_inference_steps=1).isfinite().all()
