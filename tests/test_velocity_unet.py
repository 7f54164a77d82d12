"""A diffusion U-Net with its flow around it: a velocity before any training, else a U-Net like any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

import rectified_diffusers
from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.generate import generate_triplets
from rectified_diffusers.flow.ode import euler
from rectified_diffusers.flow.prediction import scale_of
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.models.stacked_unet import StackedUNet
from rectified_diffusers.models.velocity import PipelineVelocity
from rectified_diffusers.models.velocity_unet import DiffusionVelocityUNet
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.pipelines.stable_diffusion_xl import RectifiedFlowXLPipeline
from rectified_diffusers.training.config import DistillConfig, ReflowConfig
from rectified_diffusers.training.distill import DistillTrainer
from rectified_diffusers.training.reflow import ReflowTrainer
from tests.marks import slow_but
from tests.tiny import make_diffusion_scheduler, make_tiny_pipeline, make_unet
from tests.training.helpers import PROMPTS, SHORT, digests

pytestmark = pytest.mark.usefixtures("plain_charts")
TEACHERS = ["diffusion", "v_prediction", "zero_snr", "xl"]


def make_model(kind: Any = "diffusion") -> tuple[Any, DiffusionVelocityUNet]:
    teacher = make_tiny_pipeline(kind)
    return teacher, DiffusionVelocityUNet.from_unet(teacher.unet, teacher.scheduler)


def relative(error: Tensor, to: Tensor) -> float:
    return (error.square().mean().sqrt() / to.square().mean().sqrt()).item()


# ---------------------------------------------------------------------------------------------- the velocity


@pytest.mark.parametrize("kind", TEACHERS)
def test_it_is_the_teacher_seen_as_a_flow(kind: str) -> None:
    teacher, model = make_model(kind)
    view = PipelineVelocity.of(teacher, ["a cat", "the sea", ""])
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.3, 1.0])
    t = t.clamp(min=0.01) if kind == "zero_snr" else t
    with torch.no_grad():
        velocity = Denoiser.of(teacher).velocity(model, x, t, view.conditioning)
        torch.testing.assert_close(velocity, view(x, t), rtol=1e-4, atol=1e-4)


def test_a_scalar_timestep_serves_all_rows() -> None:
    teacher, model = make_model()
    x, told = torch.randn(2, 4, 8, 8), teacher.encode_prompt(PROMPTS[:2], "cpu", 1, False)[0]
    with torch.no_grad():
        expected = model(x, torch.tensor([700.0, 700.0]), told).sample
        for timestep in (700, 700.0, torch.tensor(700)):
            assert torch.equal(model(x, timestep, told, return_dict=False)[0], expected)


@pytest.mark.parametrize("kind", slow_but(["diffusion"], ["diffusion", "zero_snr", "v_prediction"]))
def test_euler_lands_where_the_teachers_ode_does(kind: Any) -> None:
    """DDIM's ODE solved by DPM-Solver++, to 4% with 50 Euler steps, whose error halves with twice the steps.

    From where the schedule begins; a schedule that ends in pure noise begins at t = 0.
    """
    teacher, model = make_model(kind)
    config = {**teacher.scheduler.config, "timestep_spacing": "linspace"}
    teacher.scheduler = DPMSolverMultistepScheduler.from_config(config)
    noise = torch.randn(2, 4, 8, 8)
    landed = teacher(
        PROMPTS[:2], latents=noise, num_inference_steps=50, guidance_scale=1.0, output_type="latent"
    ).images
    as_flow = model.as_flow
    start = as_flow.start
    assert start == pytest.approx(0.0 if kind == "zero_snr" else 0.064, abs=1e-3)
    told = {"encoder_hidden_states": teacher.encode_prompt(PROMPTS[:2], "cpu", 1, False)[0]}

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return Denoiser.of(teacher).velocity(model, x, t, told)

    state = noise / scale_of(torch.tensor(start))
    with torch.no_grad():
        coarse, fine = (euler(velocity, state, steps, start) for steps in (25, 50))
    assert relative(fine - landed, landed) < 0.04
    assert relative(fine - landed, landed) < 0.7 * relative(coarse - landed, landed)


def test_the_part_that_the_schedule_lacks_is_bridged(monkeypatch: pytest.MonkeyPatch) -> None:
    """From t = 0, with the epsilon of Gaussian data of standard deviation 0.7 in the place of a U-Net's.

    DDIM takes the noise for a sample of the last timestep, and so do we: s * noise up to alpha = 0.068 there.
    """
    _, model = make_model()
    schedule, s = model.as_flow.schedule, 0.7

    def forward(self: Any, sample: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        angle = schedule.angle(timestep.double())[0].view(-1, 1, 1, 1)
        return ((angle.sin() / (s**2 * angle.cos() ** 2 + angle.sin() ** 2) * sample).to(sample.dtype),)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    ends = euler(lambda x, t: model(x, 1000 * (1 - t), torch.empty(2, 1, 16)).sample, noise, 150)
    assert relative(ends - s * noise, noise) < 0.02


def test_half_precision_rounds_only_the_unet() -> None:
    teacher, model = make_model()
    x, told = torch.randn(2, 4, 8, 8).half(), teacher.encode_prompt(PROMPTS[:2], "cpu", 1, False)[0]
    with torch.no_grad():
        exact = model(x.float(), 1000.0, told).sample
        rounded = model.to(torch.bfloat16)(x.bfloat16(), 1000.0, told.bfloat16()).sample
    assert rounded.dtype == torch.bfloat16
    assert relative(rounded.float() - exact, exact) < 0.05


# ---------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("kind", TEACHERS)
def test_names_of_weights_are_the_plain_unets_and_it_loads_again(kind: str, tmp_path: Path) -> None:
    teacher, model = make_model(kind)
    assert model.state_dict().keys() == teacher.unet.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = DiffusionVelocityUNet.from_pretrained(tmp_path)
    assert loaded.config["diffusion_schedule"] == model.config["diffusion_schedule"]
    assert loaded.as_flow == model.as_flow
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in teacher.unet.state_dict().items())
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not torch.equal(next(model.parameters()), next(teacher.unet.parameters()))  # a copy, no view


def test_trained_betas_are_kept(tmp_path: Path) -> None:
    betas = torch.linspace(0.001, 0.02, 10)
    scheduler = DDIMScheduler(trained_betas=betas.numpy(), num_train_timesteps=10)
    DiffusionVelocityUNet.from_unet(make_unet(), scheduler).save_pretrained(tmp_path)
    loaded = DiffusionVelocityUNet.from_pretrained(tmp_path)
    torch.testing.assert_close(torch.tensor(loaded.as_flow.schedule.alphas_cumprod).float(), scheduler.alphas_cumprod)


@pytest.mark.parametrize("pipeline_kind", ["diffusion", "xl"])
def test_it_takes_a_lora(pipeline_kind: Any, tmp_path: Path) -> None:
    teacher, model = make_model(pipeline_kind)
    finished: Any = RectifiedFlowXLPipeline if pipeline_kind == "xl" else RectifiedFlowPipeline
    parts = {**teacher.components, "unet": model, "scheduler": None}
    pipeline = finished(**parts, **({} if pipeline_kind == "xl" else {"requires_safety_checker": False}))
    plain = teacher.unet
    plain.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    finished.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(plain))
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    pipeline.set_adapters(["style"], [0.5])
    pipeline.set_progress_bar_config(disable=True)
    with_lora = pipeline("a cat", generator=torch.manual_seed(0), output_type="latent").images
    pipeline.unload_lora_weights()
    assert not torch.equal(with_lora, pipeline("a cat", generator=torch.manual_seed(0), output_type="latent").images)


def test_what_is_no_diffusion_unet_is_refused() -> None:
    from_unet, scheduler = DiffusionVelocityUNet.from_unet, make_diffusion_scheduler()
    with pytest.raises(TypeError, match="plain UNet2DConditionModel of a diffusion model, got StackedUNet"):
        from_unet(StackedUNet.from_unet(make_unet()), scheduler)
    with pytest.raises(TypeError, match="of a diffusion model, got DiffusionVelocityUNet"):
        from_unet(from_unet(make_unet(), scheduler), scheduler)
    with pytest.raises(ValueError, match="got in_channels=9 and out_channels=4"):
        from_unet(make_unet(9), scheduler)
    with pytest.raises(ValueError, match="got RectifiedFlowEulerScheduler with 'flow_prediction'"):
        from_unet(make_unet(), rectified_diffusers.RectifiedFlowEulerScheduler())
    with pytest.raises(ValueError, match="predicts epsilon has no flow on a schedule that ends in pure noise"):
        from_unet(make_unet(), make_diffusion_scheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match=r"Create the model with DiffusionVelocityUNet.from_unet\(unet, scheduler\)"):
        DiffusionVelocityUNet(sample_size=8)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.square()
    with pytest.raises(ValueError, match="DDIMScheduler does not determine its alphas_cumprod"):
        from_unet(make_unet(), scheduler)


def test_a_zero_of_a_schedule_may_be_rounded_up() -> None:
    """DPM-Solver++ has 2^-24 at the end, where DDIM has 0."""
    config = make_diffusion_scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").config
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    assert scheduler.alphas_cumprod[-1] > 0
    assert DiffusionVelocityUNet.from_unet(make_unet(), scheduler).as_flow.schedule.alphas_cumprod[-1] == 0


# ---------------------------------------------------------------------------------------------- training


def make_triplets(teacher: Any, folder: Path) -> TripletDataset:
    config = TripletConfig(num_triplets=8, num_inference_steps=20, guidance_scale=1.0, storage_dtype="float32")
    return generate_triplets(teacher, PROMPTS, folder, config, progress=False)


@pytest.mark.parametrize("kind", ["diffusion", "xl"])
def test_it_begins_with_less_to_learn(kind: Any, tmp_path: Path) -> None:
    """The loss on the teacher's triplets, before any update, beside that of the bare weights and of no velocity.

    Of epsilon: an untrained network of v answers about 0, for which bare weights are the straighter choice.
    """
    teacher = make_tiny_pipeline(kind)
    dataset = make_triplets(teacher, tmp_path / "triplets")
    triplets = dataset.rows(list(range(8)) * 4)
    t = (torch.arange(32) // 8 + 0.5) / 4
    losses: dict[str, float] = {}
    for initialisation in ("weights", "snr_matching"):
        options = {**SHORT, "initialisation": initialisation}
        trainer = ReflowTrainer(teacher, dataset, ReflowConfig(output_dir=tmp_path / "run", **options))
        with torch.no_grad():
            losses[initialisation] = trainer.compute_loss(triplets, t).mean().item()
    trivial = (triplets.data - triplets.noise).square().mean().item()
    assert losses["snr_matching"] < 0.8 * losses["weights"], (losses, trivial)
    assert losses["snr_matching"] < 0.8 * trivial


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    teacher = make_tiny_pipeline("v_prediction")
    dataset = make_triplets(teacher, tmp_path / "triplets")
    for folder, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        options = {**SHORT, "max_steps": steps, "initialisation": "snr_matching"}
        ReflowTrainer(teacher, dataset, ReflowConfig(output_dir=tmp_path / folder, **options)).train()
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["v_prediction", pytest.param("xl", marks=pytest.mark.slow)])
def test_the_finished_folder_loads_and_draws(kind: Any, tmp_path: Path) -> None:
    teacher = make_tiny_pipeline(kind)
    dataset = make_triplets(teacher, tmp_path / "triplets")
    options = {**SHORT, "max_steps": 2, "initialisation": "snr_matching"}
    DistillTrainer(teacher, dataset, DistillConfig(output_dir=tmp_path / "run", **options)).train()
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline) is (RectifiedFlowXLPipeline if kind == "xl" else RectifiedFlowPipeline)
    assert type(pipeline.unet) is DiffusionVelocityUNet
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", output_type="np").images.shape == (1, 32, 32, 3)
    again = ReflowTrainer(pipeline, dataset, ReflowConfig(output_dir=tmp_path / "second", **SHORT))
    assert type(again.student.network) is DiffusionVelocityUNet


def test_a_flow_needs_no_conversion(tmp_path: Path) -> None:
    config = ReflowConfig(output_dir=tmp_path / "run", **{**SHORT, "initialisation": "snr_matching"})
    for kind in ("flow", "sd3"):
        teacher = make_tiny_pipeline(kind)
        dataset = make_triplets(teacher, tmp_path / kind)
        with pytest.raises(ValueError, match="snr_matching' makes a diffusion model a flow, which"):
            ReflowTrainer(teacher, dataset, config)
