"""The teacher: which solver, which latents, and a pipeline that is left as it was."""

import copy
import json
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)

from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.teacher import Teacher, fingerprint
from tests.tiny import make_components, make_tiny_pipeline


def config(**options):
    return TripletConfig(**{"num_triplets": 4, "num_inference_steps": 2, **options})


@pytest.fixture
def pipeline():
    return make_tiny_pipeline("diffusion")


def test_a_diffusion_teacher_gets_dpm_solver(pipeline):
    settings = Teacher.of(pipeline, config()).settings()
    assert settings["solver"] == "DPMSolverMultistepScheduler"
    expected = {"algorithm_type": "dpmsolver++", "solver_order": 2, "beta_end": 0.012, "prediction_type": "epsilon"}
    assert {key: settings["solver_config"][key] for key in expected} == expected
    assert settings["solver_config"]["lambda_min_clipped"] == "-inf"
    assert "clip_sample" not in settings["solver_config"]  # DDIM's, of no meaning here
    assert Teacher.of(pipeline, config(solver="dpm_solver++")).settings() == settings


def test_trained_betas_become_a_list(pipeline):
    betas = torch.linspace(0.001, 0.02, 10)
    pipeline.scheduler = DDPMScheduler(trained_betas=betas.numpy(), num_train_timesteps=10)
    settings = Teacher.of(pipeline, config()).settings()
    assert json.loads(json.dumps(settings))["solver_config"]["trained_betas"] == betas.tolist()


def test_the_sde_of_a_diffusion_teacher_is_solved_as_an_ode(pipeline):
    pipeline.scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    assert Teacher.of(pipeline, config()).settings()["solver_config"]["algorithm_type"] == "dpmsolver++"


def test_the_teachers_own_solver_is_copied(pipeline):
    teacher = Teacher.of(pipeline, config(solver="teacher"))
    assert teacher.settings()["solver"] == "DDIMScheduler"
    assert teacher.pipeline.scheduler is not pipeline.scheduler


def test_a_flow_teacher_keeps_its_scheduler():
    pipeline = make_tiny_pipeline("flow")
    settings = Teacher.of(pipeline, config()).settings()
    assert settings["solver"] == "RectifiedFlowEulerScheduler"
    with pytest.raises(
        ValueError, match=r"'dpm_solver\+\+' is for diffusion teachers.*use solver 'teacher' or 'auto'"
    ):
        Teacher.of(pipeline, config(solver="dpm_solver++"))


@pytest.mark.parametrize(
    "scheduler",
    [DDPMScheduler(), DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_samplers_that_add_noise_raise(pipeline, scheduler):
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__} adds noise in its steps"):
        Teacher.of(pipeline, config(solver="teacher"))


def test_a_stochastic_flow_sampler_raises(pipeline):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="adds noise in its steps"):
        Teacher.of(pipeline, config())


@pytest.mark.parametrize("solver", ["auto", "teacher"])
def test_the_pipeline_is_left_as_it_was(pipeline, solver):
    pipeline.set_progress_bar_config(leave=False)
    pipeline(["a"], num_inference_steps=3, guidance_scale=2.0, output_type="latent")
    before, scheduler, models = dict(vars(pipeline)), pipeline.scheduler, pipeline.unet.state_dict()
    scheduler_before, models = copy.deepcopy(vars(scheduler)), {name: value.clone() for name, value in models.items()}
    teacher = Teacher.of(pipeline, config(solver=solver))
    teacher(["a"], torch.randn(1, 4, 8, 8))
    assert vars(pipeline) == before
    assert pipeline.scheduler is scheduler
    assert str(vars(scheduler)) == str(scheduler_before)
    assert all(torch.equal(models[name], value) for name, value in pipeline.unet.state_dict().items())


def test_the_progress_bar_is_silent(pipeline, capfd):
    pipeline.set_progress_bar_config()
    Teacher.of(pipeline, config())(["a"], torch.randn(1, 4, 8, 8))
    assert capfd.readouterr() == ("", "")


def test_latents_scaled_by_the_pipeline_start_from_unit_noise(pipeline):
    """`EulerDiscreteScheduler` starts at std 14.6; the pipeline scales the latents that it is given."""
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    noise = torch.randn(2, 4, 8, 8)
    data = Teacher.of(pipeline, config(solver="teacher", guidance_scale=1.0))(["a", "b"], noise)
    scheduler: Any = pipeline.scheduler
    embeds, _ = pipeline.encode_prompt(["a", "b"], "cpu", 1, False)
    scheduler.set_timesteps(2)
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, timestep)
            x = scheduler.step(pipeline.unet(scaled, timestep, embeds).sample, timestep, x).prev_sample
    assert torch.equal(data, x)


def test_neither_vae_nor_safety_checker_runs(pipeline, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(StableDiffusionPipeline, "run_safety_checker", forbidden)
    monkeypatch.setattr(type(pipeline.vae), "decode", forbidden)
    data = Teacher.of(pipeline, config())(["a"], torch.randn(1, 4, 8, 8))
    assert data.shape == (1, 4, 8, 8)
    assert not data.requires_grad


def test_size_in_pixels_decides_the_latents(pipeline):
    assert Teacher.of(pipeline, config()).latent_shape == (4, 8, 8)
    teacher = Teacher.of(pipeline, config(height=64, width=48))
    assert teacher.latent_shape == (4, 16, 12)
    assert teacher(["a"], torch.randn(1, 4, 16, 12)).shape == (1, 4, 16, 12)
    with pytest.raises(ValueError, match="width must be a multiple of 4 for this VAE, got 33"):
        Teacher.of(pipeline, config(width=33))


def test_a_network_without_a_size_needs_one_in_the_config(pipeline):
    pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="UNet2DConditionModel does not say its sample_size; set height"):
        Teacher.of(pipeline, config())
    pipeline.unet.register_to_config(sample_size=[8, 16])
    assert Teacher.of(pipeline, config()).latent_shape == (4, 8, 16)


def test_what_is_no_teacher_raises():
    with pytest.raises(TypeError, match="Expected a text-to-image pipeline of diffusers, got UNet2DConditionModel"):
        Teacher.of(make_components()["unet"], config())


def test_a_pipeline_without_a_prompt_is_no_teacher(pipeline):
    with pytest.raises(TypeError, match="DDPMPipeline cannot be adapted: the call of DDPMPipeline takes no prompt"):
        Teacher.of(DDPMPipeline(pipeline.unet, DDPMScheduler()), config())


def test_a_teacher_in_training_mode_raises(pipeline):
    pipeline.text_encoder.train()
    with pytest.raises(ValueError, match=r"text_encoder is in training mode.*pipeline.text_encoder.eval\(\)"):
        Teacher.of(pipeline, config())


def test_the_pipeline_is_asked_for_data_of_the_noise_and_of_its_size(pipeline, monkeypatch):
    """SDXL is told the size in pixels, which decides the picture there."""
    asked = []
    monkeypatch.setattr(type(pipeline), "__call__", lambda self, **call: (asked.append(call), (call["latents"],))[1])
    noise = torch.randn(1, 4, 16, 12).half()
    data = Teacher.of(pipeline, config(height=64, width=48, guidance_scale=3.0))(["a"], noise)
    assert torch.equal(data, noise)
    (call,) = asked
    assert torch.equal(call.pop("latents"), noise.float())
    sizes = {"height": 64, "width": 48, "num_inference_steps": 2, "guidance_scale": 3.0}
    assert call == {"prompt": ["a"], **sizes, "output_type": "latent", "return_dict": False}


def test_latents_of_flux_are_its_tokens():
    pipeline = make_tiny_pipeline("flux")
    teacher = Teacher.of(pipeline, config(height=32, width=64))
    assert teacher.latent_shape == (32, 16)
    noise = torch.randn(1, *teacher.latent_shape)
    options = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.5, "output_type": "latent"}
    assert torch.equal(teacher(["a"], noise), pipeline(["a"], latents=noise, **options).images)
    assert teacher.settings()["guidance_scale"] == 3.5  # the default of its call


@pytest.mark.parametrize(("kind", "guidance"), [("diffusion", 7.5), ("xl", 5.0), ("flow", 1.0), ("sd3", 7.0)])
def test_the_guidance_is_the_default_of_the_pipelines_call(kind, guidance):
    pipeline = make_tiny_pipeline(kind)
    sizes = {"height": 32, "width": 32} if kind == "sd3" else {}
    teacher = Teacher.of(pipeline, config(**sizes))
    assert teacher.settings()["guidance_scale"] == guidance
    noise = torch.randn(1, *teacher.latent_shape)
    pipeline.scheduler = teacher.pipeline.scheduler
    call = {"num_inference_steps": 2, "latents": noise.clone(), "output_type": "latent", **sizes}
    assert torch.equal(teacher(["a"], noise), pipeline(["a"], **call)[0])
    given = Teacher.of(pipeline, config(guidance_scale=2.5, **sizes))
    assert given.settings()["guidance_scale"] == 2.5


def test_latents_of_another_shape_raise(pipeline, monkeypatch):
    monkeypatch.setattr(type(pipeline), "__call__", lambda self, **call: (call["latents"].flatten(2),))
    with pytest.raises(ValueError, match=r"latents of shape \(1, 4, 64\) for noise of shape \(1, 4, 8, 8\)"):
        Teacher.of(pipeline, config(guidance_scale=1.0))(["a"], torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage_dtype", ["float32", "float16", "bfloat16"])
def test_rounded_noise_is_exact_in_both_dtypes(pipeline, teacher_dtype, storage_dtype):
    teacher = Teacher.of(pipeline.to(teacher_dtype), config(storage_dtype=storage_dtype))
    noise = torch.cat([torch.randn(10_000), torch.randn(10_000) * 2.0 ** -torch.arange(10_000).remainder(30)])
    noise = teacher.round(noise)
    assert noise.dtype == getattr(torch, storage_dtype)
    assert torch.equal(noise.to(teacher_dtype).to(noise.dtype), noise)


def test_the_fingerprint_tells_teachers_apart(pipeline):
    def fingerprint(pipeline):
        return Teacher.of(pipeline, config()).settings()["teacher_sha256"]

    first = fingerprint(pipeline)
    assert fingerprint(make_tiny_pipeline("diffusion")) == first
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.add_(1)  # draws no latents
    assert fingerprint(pipeline) == first
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight.add_(1)
    assert fingerprint(pipeline) != first
    assert fingerprint(make_tiny_pipeline("diffusion", seed=1)) != first
    pipeline.unet.to("meta")  # as sequential offloading leaves it
    assert fingerprint(pipeline) != first


@pytest.mark.parametrize("name", ["safety_checker", "image_encoder"])
def test_networks_that_make_no_latents_are_no_part_of_the_teacher(pipeline, name):
    before = Teacher.of(pipeline, config()).settings()["teacher_sha256"]
    setattr(pipeline, name, torch.nn.Linear(2, 2))  # in training mode
    assert Teacher.of(pipeline, config()).settings()["teacher_sha256"] == before


def test_the_fingerprint_has_every_name_shape_dtype_and_value_of_small_tensors():
    model = torch.nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(3, 2))
    turned, halved, changed = torch.nn.Linear(3, 2, bias=False), copy.deepcopy(model).half(), copy.deepcopy(model)
    with torch.no_grad():
        turned.weight.copy_(torch.arange(6.0).reshape(2, 3))
        changed.weight[0, 1] = 7
    models = [{"unet": each} for each in (model, turned, halved, changed)]
    prints = [fingerprint(each) for each in (*models, {"transformer": model})]
    assert len(set(prints)) == 5
    assert fingerprint({"unet": copy.deepcopy(model)}) == prints[0]


def test_the_settings_have_the_names_that_manifests_have_always_had(pipeline):
    """A folder is only gone on with where all of them are the same."""
    pipeline.vae.register_to_config(shift_factor=0.1)
    settings = Teacher.of(pipeline, config()).settings()
    assert len(settings.pop("teacher_sha256")) == 64
    assert isinstance(settings.pop("solver_config"), dict)
    assert settings == {
        "pipeline": "StableDiffusionPipeline",
        "teacher_dtype": "float32",
        "mixed_precision": "no",
        "solver": "DPMSolverMultistepScheduler",
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
        "latent_shape": [4, 8, 8],
        "vae_scaling_factor": 0.18215,
        "vae_shift_factor": 0.1,
    }


def test_provenance_names_teacher_and_revision(pipeline):
    pipeline.unet.register_to_config(_name_or_path=f"/cache/models--a--b/snapshots/{'0123456789' * 4}/unet")
    assert Teacher.of(pipeline, config()).provenance()["teacher"] is None
    pipeline.register_to_config(_name_or_path="owner/name")
    provenance = Teacher.of(pipeline, config()).provenance()
    assert provenance["teacher"] == "owner/name"
    assert provenance["revision"] == "0123456789" * 4
    assert provenance["versions"].keys() > {"rectified_diffusers", "torch", "diffusers"}


@pytest.mark.parametrize(("precision", "dtype"), [("no", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_forward_passes_have_the_precision_of_the_options(pipeline, precision, dtype):
    with Teacher.of(pipeline, config(mixed_precision=precision)).autocast():
        assert torch.is_autocast_enabled("cpu") is (dtype is not None)
        assert dtype in (None, torch.get_autocast_dtype("cpu"))


def test_mixed_precision_changes_rounding_only_and_keeps_the_latents_float32(pipeline):
    noise = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))
    exact, rounded = (
        Teacher.of(pipeline, config(guidance_scale=1.0, storage_dtype="float32", mixed_precision=precision))(
            ["a", "b"], noise
        )
        for precision in ("no", "bf16")
    )
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    # bfloat16 has 8 significant bits, and the first step divides the network's error by alpha = 0.068.
    assert (rounded - exact).square().mean() < 0.1**2 * exact.square().mean()
    assert Teacher.of(pipeline, config(mixed_precision="bf16")).settings()["mixed_precision"] == "bf16"
