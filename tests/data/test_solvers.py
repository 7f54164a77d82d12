"""Solvers by name: each solves the teacher's own ODE, and whatever would solve another one is refused."""

import inspect
from typing import Any, get_args, get_type_hints

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.solvers import _STOCHASTIC, make_solver
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
from tests.marks import slow_but

NAMES = get_args(get_type_hints(TripletConfig)["solver"])[3:]
FLOW_NAMES = [
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
]
DIFFUSION_NAMES = [name for name in NAMES if not name.startswith("FlowMatch")]
# Schedulers with a beta schedule that are neither: they invert, inpaint, or have a schedule of their own on top.
OTHERS = {
    "CogVideoXDDIMScheduler",
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "RePaintScheduler",
}
MEAN, STD = 0.3, 0.5  # of the Gaussian data whose flow is known


def stable_diffusion_schedule(**changes: Any) -> DDIMScheduler:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return DDIMScheduler(**{**settings, "set_alpha_to_one": False, "steps_offset": 1, **changes})


def gaussian_epsilon(teacher: DDIMScheduler) -> Any:
    """Return the exact epsilon of Gaussian data; between two timesteps, log alpha_bar is linear."""
    log_alphas = teacher.alphas_cumprod.double().log()

    def epsilon(x: Tensor, timestep: Tensor) -> Tensor:
        below = min(int(timestep), len(log_alphas) - 2)
        alpha = torch.lerp(log_alphas[below], log_alphas[below + 1], float(timestep) - below).exp()
        return (1 - alpha).sqrt() * (x - alpha.sqrt() * MEAN) / (alpha * STD**2 + 1 - alpha)

    return epsilon


def gaussian_velocity(x: Tensor, timestep: Tensor) -> Tensor:
    """Return E[noise - data | x] at x = (1 - sigma) data + sigma noise, which a Stable Diffusion 3 model predicts."""
    sigma = float(timestep) / 1000
    data = MEAN + (1 - sigma) * STD**2 * (x - (1 - sigma) * MEAN) / ((1 - sigma) ** 2 * STD**2 + sigma**2)
    return (x - data) / sigma


def draw_start() -> Tensor:
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def solve(scheduler: Any, model: Any, steps: int, seed: int = 0) -> Tensor:
    scheduler.set_timesteps(steps)
    torch.manual_seed(seed)
    x = draw_start() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled.double(), timestep), timestep, x).prev_sample.double()
    return x


def rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()


FAST = ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler"]


@pytest.mark.parametrize("name", slow_but(FAST, DIFFUSION_NAMES))
def test_diffusion_solvers_end_where_ddim_of_many_steps_ends(name):
    teacher = stable_diffusion_schedule()
    model = gaussian_epsilon(teacher)
    target = solve(stable_diffusion_schedule(steps_offset=0), model, 1000)
    solver: Any = make_solver(teacher, name)
    assert type(solver).__name__ == name
    assert solver.config["beta_end"] == 0.012
    data = solve(solver, model, 100)
    assert rms(data - target) < 0.02, "of data with std 0.5; DDIM, of first order, is off by 0.01"
    assert torch.equal(solve(make_solver(teacher, name), model, 100, seed=1), data)


@pytest.mark.parametrize("name", FLOW_NAMES)
def test_flow_solvers_end_at_the_gaussian_data(name):
    """The flow between Gaussians takes noise to MEAN + STD * noise."""
    teacher = FlowMatchEulerDiscreteScheduler(shift=3.0)
    target = MEAN + STD * draw_start()
    solver: Any = make_solver(teacher, name)
    assert solver.config.get("flow_shift", solver.config.get("shift")) == 3.0
    data = solve(solver, gaussian_velocity, 100)
    assert rms(data - target) < 0.02
    assert torch.equal(solve(make_solver(teacher, name), gaussian_velocity, 100, seed=1), data)


def test_every_scheduler_with_a_beta_schedule_is_a_solver_or_known_to_be_none():
    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and name != "Scheduler"]
    classes = {name: getattr(diffusers, name) for name in names}
    beta = {name for name, made in classes.items() if "beta_schedule" in inspect.signature(made.__init__).parameters}
    assert beta - OTHERS - set(_STOCHASTIC) == set(DIFFUSION_NAMES)
    assert set(NAMES) <= set(names)
    assert not set(_STOCHASTIC) & set(NAMES)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler"])
def test_the_prediction_type_and_trained_betas_are_kept(name):
    teacher = DDIMScheduler(trained_betas=torch.linspace(0.001, 0.02, 10).tolist(), prediction_type="v_prediction")
    solver: Any = make_solver(teacher, name)
    assert solver.config["prediction_type"] == "v_prediction"
    assert torch.equal(solver.betas, teacher.betas)


def test_a_schedule_that_the_solver_does_not_know_raises():
    teacher = stable_diffusion_schedule(rescale_betas_zero_snr=True)
    assert make_solver(teacher, "UniPCMultistepScheduler").config["rescale_betas_zero_snr"]
    with pytest.raises(ValueError, match="PNDMScheduler does not know rescale_betas_zero_snr, which is True in the"):
        make_solver(teacher, "PNDMScheduler")
    flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler does not know use_dynamic_shifting"):
        make_solver(flow, "FlowMatchHeunDiscreteScheduler")


def test_latents_are_not_clipped_because_the_teacher_does_not_say():
    teacher = PNDMScheduler(beta_schedule="scaled_linear")
    assert make_solver(teacher, "DDIMScheduler").config["clip_sample"] is False


def test_latents_are_clipped_if_the_teacher_says_so():
    teacher = stable_diffusion_schedule(clip_sample=True)
    assert make_solver(teacher, "DDIMParallelScheduler").config["clip_sample"] is True


@pytest.mark.parametrize("options", [{"prediction_type": "flow_prediction"}, {"use_flow_sigmas": True}], ids=str)
def test_a_solver_of_diffusion_models_can_be_that_of_a_flow(options):
    teacher = UniPCMultistepScheduler(**options)
    assert type(make_solver(teacher, "auto")) is UniPCMultistepScheduler
    with pytest.raises(ValueError, match=r"'dpm_solver\+\+' is for diffusion teachers, and the teacher's UniPC"):
        make_solver(teacher, "dpm_solver++")


def test_the_shift_of_a_flow_is_kept_by_either_name_and_none_is_1():
    shifted = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    unshifted = EulerDiscreteScheduler(prediction_type="flow_prediction")
    for teacher, shift in ((shifted, 3.0), (unshifted, 1.0)):
        assert make_solver(teacher, "DPMSolverMultistepScheduler").config["flow_shift"] == shift
        assert make_solver(teacher, "FlowMatchEulerDiscreteScheduler").config["shift"] == shift


@pytest.mark.parametrize(
    ("teacher", "solver", "match"),
    [
        (DDIMScheduler(), "FlowMatchEulerDiscreteScheduler", "is no solver for a diffusion teacher"),
        (FlowMatchEulerDiscreteScheduler(), "PNDMScheduler", "is no solver for a flow teacher"),
        (RectifiedFlowEulerScheduler(), "UniPCMultistepScheduler", "points from noise to data; use solver 'teacher'"),
    ],
)
def test_solvers_of_another_kind_raise(teacher, solver, match):
    with pytest.raises(ValueError, match=match):
        make_solver(teacher, solver)


def test_an_sde_hidden_in_the_teachers_options_raises():
    teacher = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    with pytest.raises(ValueError, match=r"adds noise in its steps.*or choose another solver\.$"):
        make_solver(teacher, "DPMSolverMultistepScheduler")
    remedy = r"or give the teacher a scheduler that solves the ODE\.$"
    with pytest.raises(ValueError, match=rf"adds noise in its steps.*{remedy}"):
        make_solver(teacher, "teacher")
