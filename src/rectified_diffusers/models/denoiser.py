"""Adapters for the networks of diffusers pipelines, one per family: which inputs they take, and what they predict.

Only this module converts between conventions of time, sign and layout. A flow network predicts our velocity data -
noise up to a sign, at the flow time t, 0 noise and 1 data:

| family | latents | time | prediction of its flow | prompt |
|---|---|---|---|---|
| Stable Diffusion 1, 2 | (B, C, H, W) | 1000 (1 - t) | data - noise (ours) | embeddings |
| Stable Diffusion XL | (B, C, H, W) | 1000 (1 - t) | data - noise (ours) | two encoders', pooled; six sizes |
| Stable Diffusion 3 | (B, C, H, W) | 1000 sigma, sigma = 1 - t | noise - data | three encoders', pooled |
| Flux | packed (B, H W / 4, 4 C) | sigma | noise - data | T5's, CLIP's pooled; positions; guidance |
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from rectified_diffusers.flow.interpolation import VariancePreserving
from rectified_diffusers.flow.prediction import DIFFUSION_TYPES, DiffusionAsFlow
from rectified_diffusers.models.latents import pack, unpack
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler, VelocityDirection, time_to_timestep

Conditioning = dict[str, Tensor]
"""Encoded prompts: tensors by name, of B rows each, independent of the time and the image size."""

Network = Callable[..., Any]
"""A pipeline's U-Net or transformer, or a wrapper that trains it."""


def is_diffusion(scheduler: Any) -> bool:
    """Return whether a scheduler belongs to a diffusion model, whose network predicts epsilon, v or the data.

    The others belong to flows, among them DPM-Solver++ and more of diffusers' classes with `use_flow_sigmas`, which
    serve networks of noise - data.
    """
    config = getattr(scheduler, "config", {})
    scheduled = getattr(scheduler, "alphas_cumprod", None) is not None and not config.get("use_flow_sigmas")
    return scheduled and config.get("prediction_type") in DIFFUSION_TYPES


class Denoiser(ABC):
    """Base class of the adapters for the networks of one pipeline family. Create one with `Denoiser.of`.

    The network is an argument of the methods, because during training it is a copy of the pipeline's network, wrapped
    for several processes.

    Args:
        pipeline: defines sign and time of its flow, and encodes prompts; it is not changed.
        guidance: for a network that takes guidance as an input (FLUX.1-dev); no effect on others.
    """

    component: ClassVar[str] = "unet"
    direction_of_flow: ClassVar[VelocityDirection] = "data"
    guides_by_two_passes: ClassVar[bool] = True

    def __init__(self, pipeline: Any, guidance: float = 1.0) -> None:
        self.pipeline, self.guidance = pipeline, guidance

    @staticmethod
    def of(pipeline: Any, guidance: float = 1.0) -> "Denoiser":
        """Return the adapter for a text-to-image pipeline; a pipeline of another family raises a `TypeError`."""
        for pipeline_class, denoiser_class in _FAMILIES.items():
            if isinstance(pipeline, pipeline_class):
                return denoiser_class(pipeline, guidance)
        known = ", ".join(pipeline_class.__name__ for pipeline_class in _FAMILIES)
        raise TypeError(
            f"Expected one of {known} or a subclass, got {type(pipeline).__name__}. Other pipelines condition their "
            "networks in other ways, which are not known here."
        )

    @property
    def network(self) -> Any:
        """Return the pipeline's own network."""
        return getattr(self.pipeline, self.component)

    @property
    def two_passes(self) -> bool:
        """Return whether `guidance` needs a second forward pass, with the empty prompt."""
        return self.guidance > 1 and self.guides_by_two_passes

    @property
    def direction(self) -> VelocityDirection:
        """Return what the network's flow predicts: "data" for data - noise, "noise" for noise - data.

        A diffusion network has no flow yet. When it is turned into one, it gets our direction, as InstaFlow did.
        """
        scheduler = self.pipeline.scheduler
        if isinstance(scheduler, RectifiedFlowEulerScheduler):
            return scheduler.config["velocity_direction"]
        return "noise" if scheduler.config.get("use_flow_sigmas") else self.direction_of_flow

    @property
    def num_train_timesteps(self) -> int:
        """Return the timestep at t = 0; a diffusion network that is turned into a flow gets ours."""
        scheduler = self.pipeline.scheduler
        return 1000 if is_diffusion(scheduler) else scheduler.config["num_train_timesteps"]

    def diffusion(self) -> DiffusionAsFlow | None:
        """Return the view of a diffusion network as a flow; None if the network is a flow."""
        scheduler = self.pipeline.scheduler
        if is_diffusion(scheduler):
            schedule = VariancePreserving(scheduler.alphas_cumprod)
            return DiffusionAsFlow(schedule, scheduler.config["prediction_type"])
        if isinstance(scheduler, RectifiedFlowEulerScheduler) or self.direction == "noise":
            return None
        raise TypeError(
            "Expected a RectifiedFlowEulerScheduler or a diffusion scheduler with alphas_cumprod and a "
            f"prediction_type, got {type(scheduler).__name__}."
        )

    def velocity(self, network: Network, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity data - noise predicted by a flow network at x_t `(B, C, H, W)` and t `(B,)`."""
        velocity = self.predict(network, x_t, time_to_timestep(t, self.num_train_timesteps), conditioning)
        return velocity if self.direction == "data" else -velocity

    @abstractmethod
    def encode(self, prompts: Sequence[str], device: str | torch.device) -> Conditioning:
        """Run the text encoders and return the conditioning of prompts."""

    @abstractmethod
    def predict(self, network: Network, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the network's prediction, in its own sign, at `(B, C, H, W)` and timesteps `(B,)` in [0, 1000]."""


class StableDiffusionDenoiser(Denoiser):
    """Adapter for Stable Diffusion 1 and 2, and all of our models of that architecture, including the StackedUNet."""

    def encode(self, prompts: Sequence[str], device: str | torch.device) -> Conditioning:
        return {"encoder_hidden_states": self.pipeline.encode_prompt(list(prompts), device, 1, False)[0]}

    def predict(self, network: Network, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return network(sample, timestep, **conditioning, return_dict=False)[0]


class StableDiffusionXLDenoiser(Denoiser):
    """Adapter for Stable Diffusion XL. Size conditioning: the image's own size, uncropped, as in its pipeline."""

    def encode(self, prompts: Sequence[str], device: str | torch.device) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipeline.config.get("force_zeros_for_empty_prompt", True):
            there = torch.tensor([prompt != "" for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds * there[:, None, None], pooled * there[:, None]
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def predict(self, network: Network, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        pooled, factor = conditioning["text_embeds"], self.pipeline.vae_scale_factor
        size = [pixels * factor for pixels in sample.shape[-2:]]
        # Original size, crop corner, target size.
        sizes = torch.tensor([*size, 0, 0, *size], dtype=pooled.dtype, device=sample.device)
        return network(
            sample,
            timestep,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes.expand(len(sample), -1)},
            return_dict=False,
        )[0]


class StableDiffusion3Denoiser(Denoiser):
    """Adapter for Stable Diffusion 3 and 3.5."""

    component = "transformer"
    direction_of_flow = "noise"

    def encode(self, prompts: Sequence[str], device: str | torch.device) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), prompt_2=None, prompt_3=None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(self, network: Network, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return network(hidden_states=sample, timestep=timestep, **conditioning, return_dict=False)[0]


class FluxDenoiser(Denoiser):
    """Adapter for FLUX.1: tokens are 2 x 2 squares of latents. The network of dev takes guidance, schnell's not."""

    component = "transformer"
    direction_of_flow = "noise"
    guides_by_two_passes = False

    def encode(self, prompts: Sequence[str], device: str | torch.device) -> Conditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=device)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(self, network: Network, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        count, height, width = len(sample), sample.shape[-2], sample.shape[-1]
        takes_guidance = self.network.config["guidance_embeds"]
        rows = torch.arange(height // 2, device=sample.device, dtype=sample.dtype)
        columns = torch.arange(width // 2, device=sample.device, dtype=sample.dtype)
        places = torch.cartesian_prod(rows.new_zeros(1), rows, columns)
        length = conditioning["encoder_hidden_states"].shape[1]  # of the prompt
        tokens = network(
            hidden_states=pack(sample),
            timestep=timestep / self.num_train_timesteps,
            guidance=timestep.new_full((count,), self.guidance) if takes_guidance else None,
            **conditioning,
            txt_ids=places.new_zeros(length, 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


_FAMILIES: dict[type, type[Denoiser]] = {
    StableDiffusionPipeline: StableDiffusionDenoiser,
    StableDiffusionXLPipeline: StableDiffusionXLDenoiser,
    StableDiffusion3Pipeline: StableDiffusion3Denoiser,
    FluxPipeline: FluxDenoiser,
}
