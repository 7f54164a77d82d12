"""Stable Diffusion's pipelines as rectified-flow pipelines: our scheduler, other defaults, all else inherited."""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers import (
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor
from typing_extensions import Self

from rectified_diffusers.schedulers import RectifiedFlowEulerScheduler

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def one_step_by_default(call: Callable[P, R]) -> Callable[P, R]:
    """Give a pipeline's `__call__` with one step and no guidance as defaults; the body and all else stay diffusers'.

    Stable Diffusion's own, 50 steps and guidance 7.5, waste time on a rectified flow and burn its colours. The
    signature stays spelled out, with the new defaults in it: diffusers and its tests inspect it.
    """
    signature = inspect.signature(call)
    defaults = {"num_inference_steps": 1, "guidance_scale": 1.0}
    parameters = [
        parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in signature.parameters.items()
    ]
    signature = signature.replace(parameters=parameters)

    @functools.wraps(call)
    def call_with_defaults(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        return call(*arguments.args, **arguments.kwargs)

    call_with_defaults.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return call_with_defaults


class RectifiedFlowMixin(DiffusionPipeline):
    """Make a diffusers pipeline sample a rectified flow, whatever scheduler its checkpoint was saved with.

    A scheduler reaches a pipeline in three ways, and each is met where it can be told from the others:

    - *stored*: the published InstaFlow checkpoints name PNDMScheduler, which samples a velocity as if it were noise.
      The loader asks `extract_init_dict` what a checkpoint names; there it becomes ours, with a message at info level.
    - *carried over* by `from_pipe` from another pipeline: becomes ours likewise.
    - *passed* to the constructor or a loader, or assigned: nobody but the caller can have chosen it, so anything that
      is not ours is an error. `None` asks for the default.
    """

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Read a checkpoint's list of components, with our scheduler in place of a stored diffusion scheduler."""
        library, class_name = config_dict.get("scheduler") or (None, "")
        # A stored flow scheduler is left alone, so that __setattr__ refuses it: its models predict noise - data.
        if library == "diffusers" and not class_name.startswith("FlowMatch"):
            ours = RectifiedFlowEulerScheduler.__name__
            logger.info("The checkpoint's %s is a diffusion scheduler; %s takes its place.", class_name, ours)
            config_dict = {**config_dict, "scheduler": ["rectified_diffusers", ours]}
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Build this pipeline on another's components; a diffusion scheduler among them is replaced by ours."""
        theirs = pipeline.components.get("scheduler")
        if "scheduler" not in kwargs and not isinstance(theirs, RectifiedFlowEulerScheduler):
            ours = RectifiedFlowEulerScheduler()
            logger.info("%s of the given pipeline is replaced by %s.", type(theirs).__name__, type(ours).__name__)
            kwargs["scheduler"] = ours
        made: Any = super().from_pipe(pipeline, **kwargs)
        return made

    def register_modules(self, **kwargs: Any) -> None:
        """Take in the components; `scheduler=None` is given the default scheduler."""
        if "scheduler" in kwargs and kwargs["scheduler"] is None:
            kwargs["scheduler"] = RectifiedFlowEulerScheduler()
        super().register_modules(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # Construction ends here too, so that `pipeline.scheduler = ...` and `scheduler=...` are one check.
        is_ours = isinstance(value, RectifiedFlowEulerScheduler)
        if name == "scheduler" and isinstance(value, SchedulerMixin) and not is_ours:
            raise ValueError(
                f"{type(self).__name__} needs a RectifiedFlowEulerScheduler, got {type(value).__name__}, which would "
                "sample the predicted velocity as something else. Leave the scheduler out, or build one with "
                "RectifiedFlowEulerScheduler(); for a diffusion model use the stock diffusers pipeline."
            )
        super().__setattr__(name, value)


class RectifiedFlowPipeline(RectifiedFlowMixin, StableDiffusionPipeline):
    """Text to image by a rectified flow such as InstaFlow (arXiv:2309.06380): StableDiffusionPipeline, in one step.

    Every feature of StableDiffusionPipeline is inherited. Use `guidance_scale` in [1, 2] and a few steps for a
    2-Rectified Flow; the distilled one-step model runs unguided, as is the default here.
    """

    __call__ = one_step_by_default(StableDiffusionPipeline.__call__)


class _StartFromImage(RectifiedFlowMixin):
    """Begin at t = 1 - strength, with every one of the requested steps spent after it."""

    scheduler: RectifiedFlowEulerScheduler

    def get_timesteps(
        self, num_inference_steps: int, strength: float, device: str | torch.device
    ) -> tuple[Tensor, int]:
        """Give the grid from t = 1 - strength to 1, in place of the one that `__call__` has just laid from 0.

        The flow is continuous in t. Skipping the first steps of a full grid, as diffusion does, leaves a one-step
        model with no step at all.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength is the share of the flow that is run again, in (0, 1], got {strength}.")
        laid = self.scheduler.sigmas[:-1]
        self.scheduler.set_timesteps(num_inference_steps, device, start=1 - strength)
        if not torch.allclose(self.scheduler.sigmas[:-1], strength * laid):  # the caller's own grid: keep its shape
            timesteps = self.scheduler.config["num_train_timesteps"] * strength * laid
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        return self.scheduler.timesteps, num_inference_steps


class RectifiedFlowImg2ImgPipeline(_StartFromImage, StableDiffusionImg2ImgPipeline):
    """Image to image by a rectified flow: StableDiffusionImg2ImgPipeline, at any strength in one step."""

    __call__ = one_step_by_default(StableDiffusionImg2ImgPipeline.__call__)


class RectifiedFlowInpaintPipeline(_StartFromImage, StableDiffusionInpaintPipeline):
    """Inpainting by a rectified flow: StableDiffusionInpaintPipeline, at any strength in one step."""

    __call__ = one_step_by_default(StableDiffusionInpaintPipeline.__call__)
