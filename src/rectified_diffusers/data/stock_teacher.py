"""The teacher for pipelines other than Stable Diffusion's: the stock call from given noise, with its own guidance."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.solvers import make_solver
from rectified_diffusers.data.teacher import Teacher, require_evaluation
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.calibration import CALL_ERRORS, PROMPTS, STEPS, require_ode
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.models.self_test import self_test


@dataclass(frozen=True)
class StockTeacher(Teacher):
    """A pipeline whose stock call generates the data. Noise and data have the layout that its scheduler sees.

    The data is the result of the scheduler's last step, so any guidance, shift or guider is the pipeline's own.
    """

    @classmethod
    def of(cls, pipeline: Any, config: TripletConfig) -> Teacher:
        """Return a teacher that passed the self-test of its adapter, with the solver that the options specify.

        Raises:
            UnsupportedPipelineError: the pipeline does not fit, or its solver adds noise.
            ValueError: an option does not fit the pipeline.
        """
        denoiser: Any = Denoiser.of(pipeline, config.guidance_scale, config.arguments())
        require_evaluation(pipeline)
        solver = make_solver(pipeline.scheduler, config.solver)
        scale = getattr(solver, "init_noise_sigma", 1.0)
        if scale != 1:
            raise ValueError(
                f"{type(solver).__name__} scales its samples by {float(scale):.3g}, which noise of unit variance does "
                "not fit. Choose another solver."
            )
        noise = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
        try:
            self_test(denoiser)
            noise = noise.to(denoiser.network.device)
            require_ode(denoiser.call, denoiser.calibration.off, noise, denoiser.calibration.noise_place, solver)
        except UnsupportedPipelineError as error:
            raise UnsupportedPipelineError(f"{type(pipeline).__name__} cannot be a teacher: {error}.") from error
        if config.guidance_scale is not None and denoiser.scale_argument is None:
            raise ValueError(
                f"{type(pipeline).__name__} takes no guidance scale, got guidance_scale={config.guidance_scale}. "
                "Leave it out."
            )
        adapted = copy.copy(pipeline)
        adapted.scheduler = solver
        teacher = cls(adapted, denoiser.network, config, denoiser.latent_shape, denoiser)
        if not bool(teacher._solve(PROMPTS[:1], noise, STEPS).isfinite().all()):
            raise UnsupportedPipelineError(
                f"{type(pipeline).__name__} cannot be a teacher: with guidance {teacher.guidance_scale:g} its latents "
                f"are not finite in {denoiser.dtype}."
            )
        if config.batch_size > 1:
            _ = teacher.takes_batches  # found out before anything is written
        if config.store_text_embeddings:
            teacher.encode(list(PROMPTS))  # raises for embeddings that cannot be stored
        return teacher

    @property
    def adapter(self) -> PipelineDenoiser:
        return cast(PipelineDenoiser, self.denoiser)

    @property
    def guidance_scale(self) -> float:
        argument = self.adapter.scale_argument
        default = self.adapter.call.default(argument) if argument else None
        scale = default if self.config.guidance_scale is None else self.config.guidance_scale
        return 1.0 if scale is None else float(scale)

    @cached_property
    def _guided(self) -> dict[str, Any]:
        """Arguments of the stock call for the guidance of the options; none are its own defaults."""
        argument, call = self.adapter.scale_argument, self.adapter.call
        if argument is None or self.config.guidance_scale is None:
            return {}
        two_passes = self.adapter.guidance_found.two_passes
        # Some guide only if there is a negative prompt.
        negative = two_passes is not None and two_passes.argument == argument and call.negative in two_passes.options
        return {argument: self.config.guidance_scale, **(call.negated if negative else {})}

    @cached_property
    def takes_batches(self) -> bool:
        """Whether the stock call takes several prompts at once; some do not, others only without guidance."""
        noise = torch.randn(len(PROMPTS), *self.latent_shape, generator=torch.Generator().manual_seed(0))
        try:
            return self._solve(PROMPTS, noise, STEPS).shape == noise.shape
        except torch.OutOfMemoryError:
            raise
        except CALL_ERRORS:
            return False

    @torch.no_grad()
    def _solve(self, prompts: Sequence[str], noise: Tensor, steps: int) -> Tensor:
        with self.autocast():
            noise = noise.to(self.network.device)
            trace = self.adapter.solve(prompts, noise, steps, self.pipeline.scheduler, **self._guided)
        return trace.steps[-1].result

    def __call__(self, prompts: list[str], noise: Tensor) -> Tensor:
        """Run the stock call from unit-variance noise `(B, ...)`; return its last latents in the storage dtype."""
        together = len(prompts) == 1 or self.takes_batches
        parts = [slice(None)] if together else [slice(i, i + 1) for i in range(len(prompts))]
        steps = self.config.num_inference_steps
        data = torch.cat([self._solve(prompts[part], noise[part], steps) for part in parts])
        return data.to("cpu", noise.dtype)

    def settings(self) -> dict[str, Any]:
        options = json.dumps(self.adapter.options, sort_keys=True)
        return {**super().settings(), "format": 2, "call_options": options}
