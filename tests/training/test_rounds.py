"""The way of a user: a teacher's triplets, reflow, the result's triplets, reflow again, distillation."""

from pathlib import Path
from typing import Any

import pytest

from rectified_diffusers import cli
from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.generate import generate_triplets
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.training.config import (
    DistillConfig,
    DistributionMatchingConfig,
    ProgressiveConfig,
    ReflowConfig,
    TrainerConfig,
)
from rectified_diffusers.training.distill import DistillTrainer
from rectified_diffusers.training.dmd import DistributionMatchingTrainer
from rectified_diffusers.training.progressive import ProgressiveTrainer
from rectified_diffusers.training.reflow import ReflowTrainer
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import SHORT, digests

pytestmark = pytest.mark.slow

PROMPTS = ["a red apple", "the sea"]


def make_triplets(teacher: Any, folder: Path, **options: Any) -> Any:
    config = TripletConfig(num_triplets=8, triplets_per_shard=4, num_inference_steps=4, **options)
    return generate_triplets(teacher, PROMPTS, folder, config, progress=False)


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_a_result_is_the_next_teacher(lora: dict[str, Any], tmp_path: Path) -> None:
    """A k-th reflow is a reflow of the (k - 1)-th's output on triplets that it drew."""
    options = {**SHORT, **lora, "max_steps": 2, "batch_size": 2}
    teacher: Any = make_tiny_pipeline("diffusion")
    solvers = []
    for k in (2, 3):
        triplets = make_triplets(teacher, tmp_path / f"triplets-{k}", guidance_scale=1.5)
        solvers.append((triplets.manifest.settings["solver"], triplets.manifest.settings["pipeline"]))
        ReflowTrainer(teacher, triplets, ReflowConfig(output_dir=tmp_path / f"{k}-flow", **options)).train()
        teacher = RectifiedFlowPipeline.from_pretrained(tmp_path / f"{k}-flow")
    assert solvers == [
        ("DPMSolverMultistepScheduler", "StableDiffusionPipeline"),
        ("RectifiedFlowEulerScheduler", "RectifiedFlowPipeline"),
    ]
    fingerprints = {make_triplets(teacher, tmp_path / "last").manifest.settings["teacher_sha256"]} | {
        make_triplets(
            RectifiedFlowPipeline.from_pretrained(tmp_path / "2-flow"), tmp_path / "first"
        ).manifest.settings["teacher_sha256"]
    }
    assert len(fingerprints) == 2
    triplets = make_triplets(teacher, tmp_path / "triplets-distill")
    DistillTrainer(teacher, triplets, DistillConfig(output_dir=tmp_path / "one-step", **options)).train()
    pipeline = RectifiedFlowPipeline.from_pretrained(tmp_path / "one-step")
    assert pipeline("a red apple", num_inference_steps=1, guidance_scale=1.0).images[0].size == (32, 32)


def test_progressive_distillation_of_a_diffusion_model(tmp_path: Path) -> None:
    """Seen as a velocity, it needs no reflow before."""
    teacher = make_tiny_pipeline("diffusion")
    triplets = make_triplets(teacher, tmp_path / "triplets")
    options = {name: value for name, value in SHORT.items() if name != "max_steps"}
    config = ProgressiveConfig(
        output_dir=tmp_path / "run", teacher_steps=4, steps_per_round=2, initialisation="snr_matching", **options
    )
    trainer = ProgressiveTrainer(teacher, triplets, config)
    pipeline = trainer.make_pipeline(trainer.train())
    assert isinstance(pipeline, RectifiedFlowPipeline)
    assert pipeline("a red apple", num_inference_steps=1, guidance_scale=1.0).images[0].size == (32, 32)


COMMANDS: dict[str, tuple[Any, type[TrainerConfig], dict[str, Any]]] = {
    "reflow": (ReflowTrainer, ReflowConfig, {"preset": "modern", "initialisation": "weights", "max_steps": 2}),
    "distill": (DistillTrainer, DistillConfig, {"preset": "instaflow", "max_steps": 2, "lora_rank": 2}),
    "progressive": (ProgressiveTrainer, ProgressiveConfig, {"teacher_steps": 4, "steps_per_round": 1}),
    "dmd": (DistributionMatchingTrainer, DistributionMatchingConfig, {"max_steps": 2, "fake_updates": 1}),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_is_the_python_api(command: str, tmp_path: Path) -> None:
    trainer_class, config_class, options = COMMANDS[command]
    options = {**options, "batch_size": 2, "mixed_precision": "no"}
    make_tiny_pipeline("flow").save_pretrained(tmp_path / "model")
    pipeline = RectifiedFlowPipeline.from_pretrained(tmp_path / "model")
    triplets = make_triplets(pipeline, tmp_path / "triplets")
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    given = ["--model", str(tmp_path / "model"), "--triplets", str(tmp_path / "triplets")]
    teacher: dict[str, Any] = {}
    if command == "dmd":
        make_tiny_pipeline("diffusion").save_pretrained(tmp_path / "teacher")
        given += ["--teacher", str(tmp_path / "teacher")]
        teacher["teacher"] = make_tiny_pipeline("diffusion")
    assert cli.main([command, *given, "--output-dir", str(tmp_path / "cli"), *words]) == 0
    preset = options.pop("preset", None)
    make = (lambda **given: config_class.preset(preset, **given)) if preset else config_class
    trainer_class(pipeline, triplets, make(output_dir=tmp_path / "api", **options), **teacher).train()
    assert digests(tmp_path / "cli") == digests(tmp_path / "api")
