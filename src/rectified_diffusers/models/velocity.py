"""The velocity of a pipeline, data - noise at (x_t, t, conditioning): flow or diffusion, with or without guidance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.flow.prediction import DiffusionAsFlow, PredictionType
from rectified_diffusers.models.denoiser import Conditioning, Denoiser
from rectified_diffusers.pipelines.scheduler import time_to_timestep


@dataclass(frozen=True)
class PipelineVelocity:
    """Velocity v(x, t) of a pipeline's network for given prompts and guidance. Create it with `PipelineVelocity.of`.

    Guidance is v_null + w * (v_text - v_null) when w > 1, otherwise one forward pass. Flux's network receives w as an
    input, or does not use it. A diffusion network is viewed as a straight flow through equal signal-to-noise ratios
    (`DiffusionAsFlow`). Its schedule does not reach pure noise, so its flow starts at `start` > 0, with the initial
    state of its sampler: noise as the sample of the last timestep.

    Attributes:
        denoiser: adapter for the pipeline's network.
        conditioning: of the prompts, B rows; with guidance 2B rows, those of the empty prompt first.
        guidance_scale: w, 1 where it needs no second pass.
        as_flow: the view of a diffusion model; None for a model that predicts the velocity.
        prediction_type: of a diffusion model.
    """

    denoiser: Denoiser
    conditioning: Conditioning
    guidance_scale: float = 1.0
    as_flow: DiffusionAsFlow | None = None
    prediction_type: PredictionType = "velocity"

    @classmethod
    def of(cls, pipeline: Any, prompts: Sequence[str], guidance_scale: float = 1.0) -> "PipelineVelocity":
        """Bind a text-to-image pipeline, flow or diffusion, of a family known to `Denoiser.of`, to prompts."""
        denoiser = Denoiser.of(pipeline, guidance_scale)
        as_flow, prediction_type = denoiser.diffusion() or (None, "velocity")
        guided = guidance_scale > 1 and denoiser.guides_by_two_passes
        with torch.no_grad():
            conditioning = denoiser.encode(list(prompts), pipeline.device)
            if guided:
                null = denoiser.encode([""] * len(prompts), pipeline.device)
                conditioning = {name: torch.cat([null[name], part]) for name, part in conditioning.items()}
        return cls(denoiser, conditioning, guidance_scale if guided else 1.0, as_flow, prediction_type)

    @property
    def start(self) -> float:
        """Return the flow time at which the model's own range starts; 0 for a flow model."""
        if self.as_flow is None:
            return 0.0
        last_timestep = torch.tensor([len(self.as_flow.alphas_cumprod) - 1.0], dtype=torch.float64)
        return self.as_flow.time_of(last_timestep).item()

    def state_at_start(self, noise: Tensor) -> Tensor:
        """Convert noise of unit variance `(B, ...)` to the state of the straight flow at `start`."""
        if self.as_flow is None:
            return noise
        return noise / self.as_flow.scale_of(torch.tensor(self.start)).to(noise)

    def noise_at_start(self, state: Tensor) -> Tensor:
        """Convert the state of the straight flow at `start` to unit-variance noise: inverts `state_at_start`."""
        if self.as_flow is None:
            return state
        return state * self.as_flow.scale_of(torch.tensor(self.start)).to(state)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity data - noise at x `(B, C, H, W)` and t `(B,)`, after guidance."""
        if self.as_flow is None:
            answer = self._predict(x, time_to_timestep(t, self.denoiser.num_train_timesteps))
            return answer if self.denoiser.direction == "data" else -answer
        prediction = self._predict(*self.as_flow.network_input(x, t))
        return self.as_flow.velocity(prediction, x, t, self.prediction_type)

    def _predict(self, sample: Tensor, timestep: Tensor) -> Tensor:
        network = self.denoiser.network
        sample, timestep = sample.to(network.dtype), timestep.to(torch.float32)
        if self.guidance_scale <= 1:
            return self.denoiser.predict(network, sample, timestep, self.conditioning)
        twice = torch.cat([sample, sample]), torch.cat([timestep, timestep])
        null, text = self.denoiser.predict(network, *twice, self.conditioning).chunk(2)
        return null + self.guidance_scale * (text - null)
