"""Make the solver of a teacher's ODE: its own scheduler, DPM-Solver++ or another diffusers scheduler."""

import copy
import inspect
from typing import Any

import diffusers
from diffusers import DPMSolverMultistepScheduler

from rectified_diffusers.models.denoiser import is_diffusion
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler

# Samplers that add noise at each step. `sde` variants of other classes are recognized by their config.
_STOCHASTIC = (
    "CogVideoXDPMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
)
# Options that determine the ODE itself, not how it is solved. A solver without one of them solves a different ODE.
_SCHEDULE = {
    "diffusion": ("beta_schedule", "trained_betas", "prediction_type", "rescale_betas_zero_snr"),
    "flow": ("use_dynamic_shifting", "invert_sigmas", "shift_terminal"),
}


def make_solver(scheduler: Any, solver: str) -> Any:
    """Return a scheduler that solves the teacher's ODE. The teacher's own scheduler is copied, never modified.

    Args:
        scheduler: the teacher's own scheduler, which defines the schedule.
        solver: a value of `TripletConfig.solver`.
    """
    config = scheduler.config
    diffusion = is_diffusion(scheduler)
    if solver == "teacher" or (solver == "auto" and not diffusion):
        _require_ode(scheduler, solver)
        return copy.deepcopy(scheduler)
    if solver in ("auto", "dpm_solver++"):
        if not diffusion:
            raise ValueError(
                f"solver 'dpm_solver++' is for diffusion teachers, and the teacher's {type(scheduler).__name__} is a "
                "flow's; use solver 'teacher' or 'auto'."
            )
        return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
    made = _from_class(scheduler, getattr(diffusers, solver), "diffusion" if diffusion else "flow")
    _require_ode(made, solver)
    return made


def _from_class(scheduler: Any, solver: type[Any], kind: str) -> Any:
    """Return a diffusers solver with the teacher's schedule; raise ValueError if the class does not support it."""
    config, name = scheduler.config, type(scheduler).__name__
    known = inspect.signature(solver.__init__).parameters
    if isinstance(scheduler, RectifiedFlowEulerScheduler):
        raise ValueError(
            f"{solver.__name__} cannot solve the flow of a {name}, whose velocity points from noise to data; "
            "use solver 'teacher' or 'auto'."
        )
    for_flows = "use_flow_sigmas" in known or solver.__name__.startswith("FlowMatch")
    if not ("beta_schedule" in known if kind == "diffusion" else for_flows):
        raise ValueError(
            f"{solver.__name__} is no solver for a {kind} teacher, whose own scheduler is {name}; "
            "choose another solver, or 'teacher'."
        )
    lost = [key for key in _SCHEDULE[kind] if config.get(key) and key not in known]
    if lost:
        raise ValueError(
            f"{solver.__name__} does not know {lost[0]}, which is {config[lost[0]]!r} in the schedule of the "
            f"teacher's {name}: it would solve another ODE. Choose another solver, or 'teacher'."
        )
    changes: dict[str, Any] = {}
    if kind == "flow" and "use_flow_sigmas" in known:
        changes = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        changes["flow_shift"] = config.get("shift", config.get("flow_shift", 1.0))
    elif kind == "flow" and "shift" not in config:
        changes["shift"] = config.get("flow_shift", 1.0)
    if "clip_sample" in known and "clip_sample" not in config:
        changes["clip_sample"] = False  # the default of these classes is meant for pixels in [-1, 1]
    return solver.from_config(config, **changes)


def _require_ode(scheduler: Any, solver: str) -> None:
    """Raise ValueError if a scheduler adds noise while sampling."""
    name, config = type(scheduler).__name__, scheduler.config
    sde = "sde" in str(config.get("algorithm_type")) or config.get("stochastic_sampling", False)
    if name in _STOCHASTIC or sde:
        remedy = "give the teacher a scheduler that solves the ODE" if solver == "teacher" else "choose another solver"
        raise ValueError(
            f"{name} adds noise in its steps, so that its data is not a function of the noise it started from; "
            f"use solver 'dpm_solver++' for a diffusion teacher, or {remedy}."
        )
