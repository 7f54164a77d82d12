"""The velocity of a pipeline, data - noise at (x_t, t, conditioning): flow or diffusion, with or without guidance.

`PipelineVelocity` is the velocity of a pipeline's own network, guided by `guidance.py`. `denoiser.py` has what differs
between families, and decides which models are a flow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.flow.prediction import DiffusionAsFlow, scale_of
from rectified_diffusers.models.denoiser import Conditioning, Denoiser
from rectified_diffusers.models.guidance import guided


@dataclass(frozen=True)
class PipelineVelocity:
    """Velocity v(x, t) of a pipeline's network for given prompts and guidance. Create it with `PipelineVelocity.of`.

    With w > 1 it is guided, see `guided`. Flux's network receives w as an input, or does not use it. A diffusion
    network is viewed as a straight flow through equal signal-to-noise ratios (`DiffusionAsFlow`). Its schedule does
    not reach pure noise, so its flow starts at `start` > 0, with the initial state of its sampler: noise as the sample
    of the last timestep.

    Attributes:
        denoiser: adapter for the pipeline's network, which also has w.
        conditioning: of the prompts, B rows.
        null: of the empty prompt, B rows; None where there is no second pass.
        as_flow: the view of a diffusion model; None for a flow.
    """

    denoiser: Denoiser
    conditioning: Conditioning
    null: Conditioning | None = None
    as_flow: DiffusionAsFlow | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, pipeline: Any, prompts: Sequence[str], guidance_scale: float | None = None) -> "PipelineVelocity":
        """Bind a text-to-image pipeline, flow or diffusion, to prompts; `guidance_scale` as `Denoiser.of` takes it."""
        return cls.bind(Denoiser.of(pipeline, guidance_scale), prompts)

    @classmethod
    @torch.no_grad()
    def bind(cls, denoiser: Denoiser, prompts: Sequence[str]) -> "PipelineVelocity":
        """Bind the adapter of a pipeline to prompts."""
        if denoiser.guidance > 1 and not (denoiser.guides_by_two_passes or denoiser.takes_guidance):
            raise ValueError(
                f"Two passes do not repeat the guidance of {type(denoiser.pipeline).__name__}. Leave out the guidance."
            )
        as_flow, device = denoiser.diffusion(), denoiser.pipeline.device
        conditioning = denoiser.encode(list(prompts), device)
        null = denoiser.encode([""] * len(prompts), device) if denoiser.two_passes else None
        return cls(denoiser, conditioning, null, as_flow)

    @property
    def start(self) -> float:
        """Return the flow time at which the model's own range starts; 0 for a flow model."""
        return 0.0 if self.as_flow is None else self.as_flow.start

    def state_at_start(self, noise: Tensor) -> Tensor:
        """Convert noise of unit variance `(B, ...)` to the state of the straight flow at `start`."""
        return noise / scale_of(torch.tensor(self.start)).to(noise)

    def noise_at_start(self, state: Tensor) -> Tensor:
        """Convert the state of the straight flow at `start` to unit-variance noise: inverts `state_at_start`."""
        return state * scale_of(torch.tensor(self.start)).to(state)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity data - noise at x `(B, C, H, W)` and t `(B,)`, after guidance."""
        denoiser, network = self.denoiser, self.denoiser.network
        if self.as_flow is None:
            return self._guided(partial(denoiser.velocity, network), x, t)
        return self.as_flow(partial(self._guided, partial(denoiser.predict, network)), x, t)

    def _guided(self, predict: Callable[[Tensor, Tensor, Conditioning], Tensor], x: Tensor, time: Tensor) -> Tensor:
        x = x.to(self.denoiser.network.dtype)
        return guided(predict, x, time, self.conditioning, self.null, self.denoiser.guidance)
