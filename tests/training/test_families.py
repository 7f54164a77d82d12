"""Every family of pipelines: triplets can be made, reflow straightens, and the saved folder draws in one step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)

from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.dataset import JoinedTriplets, TripletDataset
from rectified_diffusers.data.generate import generate_triplets
from rectified_diffusers.evaluation.straightness import pipeline_straightness
from rectified_diffusers.flow.ode import euler
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.pipelines.stable_diffusion_xl import RectifiedFlowXLPipeline
from rectified_diffusers.training.config import DistillConfig, ReflowConfig
from rectified_diffusers.training.distill import DistillTrainer
from rectified_diffusers.training.reflow import ReflowTrainer
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import PROMPTS, SHORT, digests

pytestmark = pytest.mark.slow

SIZE = {"height": 32, "width": 32}
FINISHED: dict[str, type[Any]] = {
    "diffusion": RectifiedFlowPipeline,
    "v_prediction": RectifiedFlowPipeline,
    "zero_snr": RectifiedFlowPipeline,
    "flow": RectifiedFlowPipeline,
    "xl": RectifiedFlowXLPipeline,
    "xl_flow": RectifiedFlowXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
}
# Of each kind but the very slow ones.
MARKS: dict[str, Any] = {"diffusion": (), "sd3": pytest.mark.slow, "xl": pytest.mark.slow, "flux": pytest.mark.slow}
FIT: dict[str, Any] = {
    "max_steps": 20,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "lr_schedule": "cosine",
    "mixed_precision": "no",
    "ema_decay": 0.8,
}


def make_teacher(kind: Any) -> Any:
    """Build a tiny teacher; of a flow, whose untrained network hardly varies, one with paths that bend."""
    pipeline = make_tiny_pipeline(kind)
    denoiser = Denoiser.of(pipeline)
    if denoiser.diffusion() is None:
        last = denoiser.network.conv_out if denoiser.component == "unet" else denoiser.network.proj_out
        with torch.no_grad():
            last.weight.mul_(4)
    return pipeline


def make_triplets(teacher: Any, folder: Path, count: int = 16, **options: Any) -> TripletDataset:
    settings: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 1.0, "storage_dtype": "float32", **SIZE}
    return generate_triplets(
        teacher, PROMPTS, folder, TripletConfig(num_triplets=count, **{**settings, **options}), progress=False
    )


def total_straightness(pipeline: Any) -> float:
    return pipeline_straightness(pipeline, PROMPTS, steps=10, bins=5, progress=False, **SIZE).total


def one_step_error(pipeline: Any, dataset: TripletDataset, network: Any = None, guidance: float = 1.0) -> float:
    """Return the RMSE between the data and noise + v(noise, 0), by the pipeline's network or another one."""
    denoiser, triplets = Denoiser.of(pipeline, guidance, SIZE), dataset.rows(range(len(dataset)))
    told = denoiser.encode(triplets.prompts, "cpu")
    with torch.no_grad():
        made = euler(lambda x, t: denoiser.velocity(network or denoiser.network, x, t, told), triplets.noise, 1)
    return (made - triplets.data).square().mean().sqrt().item()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=MARKS.get(kind, pytest.mark.very_slow)) for kind in FINISHED]
)
def test_reflow_straightens_and_the_folder_draws(kind: str, tmp_path: Path) -> None:
    teacher = make_teacher(kind)
    dataset = make_triplets(teacher, tmp_path / "triplets")
    assert dataset.manifest.latent_shape == ((16, 16) if kind == "flux" else (4, 8, 8))
    trainer = ReflowTrainer(teacher, dataset, ReflowConfig(output_dir=tmp_path / "run", prompt_dropout=0.0, **FIT))
    error = one_step_error(teacher, dataset, trainer.student.network)
    trainer.train()
    for pipeline_class in (DiffusionPipeline, FINISHED[kind]):
        pipeline: Any = pipeline_class.from_pretrained(tmp_path / "run")
        assert type(pipeline) is FINISHED[kind]
    assert total_straightness(pipeline) < 0.7 * total_straightness(teacher)
    assert one_step_error(pipeline, dataset) < error
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="np", **SIZE).images
    assert images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("kind", ["zero_snr", pytest.param("v_prediction", marks=pytest.mark.slow)])
def test_triplets_of_v_prediction_follow_the_teachers_ode(kind: Any, tmp_path: Path) -> None:
    """25 steps of DPM-Solver++ land where 100 of the teacher's own DDIM do, to its first order."""
    teacher = make_tiny_pipeline(kind)
    options = {"timestep_spacing": "trailing"}
    teacher.scheduler = DDIMScheduler.from_config(teacher.scheduler.config, **options)
    fast = make_triplets(teacher, tmp_path / "fast", count=4, num_inference_steps=25).rows(range(4))
    slow = make_triplets(teacher, tmp_path / "slow", count=4, num_inference_steps=100, solver="teacher").rows(range(4))
    assert torch.equal(fast.noise, slow.noise)
    error, size = (fast.data - slow.data).square().mean().sqrt(), slow.data.square().mean().sqrt()
    assert error < 0.1 * size


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_one_step_of_a_finished_flow_is_noise_plus_velocity(kind: Any, tmp_path: Path) -> None:
    """The saved scheduler starts at sigma = 1 and has no shift, fixed or dynamic."""
    teacher = make_tiny_pipeline(kind)
    dataset = make_triplets(teacher, tmp_path / "triplets", count=4, num_inference_steps=2)
    options = {**SHORT, "max_steps": 1, "validate_every_steps": 1, "validation_prompts": ("a cat",)}
    DistillTrainer(teacher, dataset, DistillConfig(output_dir=tmp_path / "run", **options)).train()
    assert (tmp_path / "run" / "validation" / "step-00000001.png").exists()
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    assert pipeline.scheduler.config["shift"] == 1
    assert not pipeline.scheduler.config["use_dynamic_shifting"]
    again = make_triplets(pipeline, tmp_path / "again", count=4, num_inference_steps=1)
    assert one_step_error(pipeline, again) < 1e-5


@pytest.mark.parametrize("kind", ["sd3", "flux", pytest.param("xl", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(kind: Any, tmp_path: Path) -> None:
    teacher = make_tiny_pipeline(kind)
    dataset = make_triplets(teacher, tmp_path / "triplets", count=4, num_inference_steps=2)

    def train(folder: str, steps: int) -> None:
        options = {**SHORT, "max_steps": steps, "save_every_steps": 1}
        ReflowTrainer(teacher, dataset, ReflowConfig(output_dir=tmp_path / folder, **options)).train()

    train("whole", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReflowTrainer, "finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            train("parts", 1)
    train("parts", 2)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def _interrupt(trainer: Any) -> None:
    raise KeyboardInterrupt


def test_the_sign_of_the_students_start_is_kept(tmp_path: Path) -> None:
    """A U-Net that predicts noise - data is trained as it is, and its finished pipeline says so."""
    teacher: Any = make_tiny_pipeline("flow")
    teacher.scheduler = RectifiedFlowEulerScheduler(velocity_direction="noise")
    dataset = make_triplets(teacher, tmp_path / "triplets", count=4, num_inference_steps=2)
    trainer = ReflowTrainer(teacher, dataset, ReflowConfig(output_dir=tmp_path / "run", **{**SHORT, "max_steps": 1}))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    conditioning: Any = trainer.prompt_encoder(["a cat"])
    with torch.no_grad():
        answer = teacher.unet(x, 500.0, conditioning["encoder_hidden_states"]).sample
        torch.testing.assert_close(trainer.predict_velocity(x, t, ["a cat"]), -answer)
    trainer.train()
    finished = RectifiedFlowPipeline.from_pretrained(tmp_path / "run")
    assert finished.scheduler.config["velocity_direction"] == "noise"


def test_flux_is_trained_at_the_guidance_of_its_triplets(tmp_path: Path) -> None:
    teacher = make_tiny_pipeline("flux")
    dataset = make_triplets(teacher, tmp_path / "triplets", count=4, num_inference_steps=1, guidance_scale=3.5)
    trainer = ReflowTrainer(teacher, dataset, ReflowConfig(output_dir=tmp_path / "run", **SHORT))
    assert trainer.denoiser.guidance == 3.5
    assert one_step_error(teacher, dataset) > 1e-3  # at guidance 1
    triplets = dataset.rows(range(4))
    with torch.no_grad():
        velocity = trainer.predict_velocity(triplets.noise, torch.zeros(4), triplets.prompts)
    torch.testing.assert_close(triplets.noise + velocity, triplets.data, rtol=1e-4, atol=1e-5)


def test_flux_is_trained_at_one_guidance(tmp_path: Path) -> None:
    teacher = make_tiny_pipeline("flux")
    for guidance in (1.0, 3.5):
        make_triplets(teacher, tmp_path / str(guidance), count=4, num_inference_steps=1, guidance_scale=guidance)
    config = ReflowConfig(output_dir=tmp_path / "run", **SHORT)
    with pytest.raises(ValueError, match=r"several guidances: \[1\.0, 3\.5\]\. Make them all with one guidance_scale"):
        ReflowTrainer(teacher, JoinedTriplets([tmp_path / "1.0", tmp_path / "3.5"]), config)
