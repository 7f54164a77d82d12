"""Adapters for the networks of diffusers pipelines: which inputs they take, and what they predict.

Only this module converts between conventions of time, sign and layout. A flow network predicts our velocity data -
noise up to a sign, at the flow time t, 0 noise and 1 data:

| family | latents | time | prediction of its flow | prompt |
|---|---|---|---|---|
| Stable Diffusion 1, 2 | (B, C, H, W) | 1000 (1 - t) | data - noise (ours) | embeddings |
| Stable Diffusion XL | (B, C, H, W) | 1000 (1 - t) | data - noise (ours) | two encoders', pooled; six sizes |
| all others, see `any_pipeline` | the scheduler's | read off the stock call | either sign | a tree of arguments |
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.flow.interpolation import VariancePreserving
from rectified_diffusers.flow.prediction import DIFFUSION_TYPES, DiffusionAsFlow
from rectified_diffusers.models.conditioning import PromptConditioning
from rectified_diffusers.models.latents import latent_shape, unscale
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler, VelocityDirection, time_to_timestep

Conditioning = dict[str, Tensor] | PromptConditioning
"""Encoded prompts: tensors by name, of B rows each, or a tree for each prompt. `conditioning` joins and moves both."""

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

    component: str = "unet"

    def __init__(self, pipeline: Any, guidance: float = 1.0, options: Mapping[str, Any] | None = None) -> None:
        self.pipeline, self.guidance, self.options = pipeline, guidance, dict(options or {})

    @staticmethod
    def of(pipeline: Any, guidance: float | None = None, options: Mapping[str, Any] | None = None) -> "Denoiser":
        """Return the adapter for a text-to-image pipeline.

        Args:
            guidance: scale, as the pipeline's call takes it; None is no second pass, and the pipeline's default for a
                network that takes guidance as an input.
            options: arguments of the pipeline's call that determine the image size, such as height and width.

        Raises:
            UnsupportedPipelineError: the pipeline does not fit; it is a TypeError, and its message says why.
        """
        for pipeline_class, denoiser_class in _FAMILIES.items():
            if isinstance(pipeline, pipeline_class):
                return denoiser_class(pipeline, 1.0 if guidance is None else guidance, options)
        if not hasattr(pipeline, "components"):
            raise UnsupportedPipelineError(
                f"Expected a text-to-image pipeline of diffusers, got {type(pipeline).__name__}."
            )
        from rectified_diffusers.models.any_pipeline import PipelineDenoiser

        try:
            return PipelineDenoiser(pipeline, guidance, options)
        except UnsupportedPipelineError as error:
            raise UnsupportedPipelineError(f"{type(pipeline).__name__} cannot be adapted: {error}.") from error

    @property
    def guides_by_two_passes(self) -> bool:
        """Return whether two evaluations of the network repeat the guidance of the pipeline."""
        return True

    @property
    def takes_guidance(self) -> bool:
        """Return whether the network takes guidance as an input."""
        return False

    @property
    def has_guidance(self) -> bool:
        """Return whether the pipeline guides in any way."""
        return True

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of the latents of one image."""
        return latent_shape(self.pipeline, self.options.get("height"), self.options.get("width"))

    @property
    def network(self) -> Any:
        """Return the pipeline's own network."""
        return getattr(self.pipeline, self.component)

    @property
    def two_passes(self) -> bool:
        """Return whether `guidance` needs a second forward pass, with the empty prompt."""
        return self.guidance > 1 and self.guides_by_two_passes

    def guide(self, scale: float) -> None:
        """Set the guidance of the two passes, as the pipeline's call takes it; raise if they cannot repeat it.

        A scale of 1 or less is no guidance.
        """
        self.guidance = scale

    @property
    def direction(self) -> VelocityDirection:
        """Return what the network's flow predicts: "data" for data - noise, "noise" for noise - data.

        A diffusion network has no flow yet. When it is turned into one, it gets our direction, as InstaFlow did.
        """
        scheduler = self.pipeline.scheduler
        if isinstance(scheduler, RectifiedFlowEulerScheduler):
            return scheduler.config["velocity_direction"]
        return "noise" if scheduler.config.get("use_flow_sigmas") else "data"

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
        raise UnsupportedPipelineError(
            "Expected a RectifiedFlowEulerScheduler or a diffusion scheduler with alphas_cumprod and a "
            f"prediction_type, got {type(scheduler).__name__}."
        )

    def velocity(self, network: Network, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity data - noise predicted by a flow network at x_t `(B, C, H, W)` and t `(B,)`."""
        velocity = self.predict(network, x_t, time_to_timestep(t, self.num_train_timesteps), conditioning)
        return velocity if self.direction == "data" else -velocity

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Decode latents to images `(B, 3, H, W)` in about [-1, 1], float32, with their gradient."""
        vae = self.pipeline.vae
        return vae.decode(unscale(vae, latents).to(vae.dtype), return_dict=False)[0].float()

    @property
    def guidance_arguments(self) -> dict[str, Any]:
        """Return arguments of the pipeline's call for a single pass; guidance that is a network's input stays."""
        return {"guidance_scale": 1.0}

    def call_arguments(self, prompt: str, num_inference_steps: int, guidance: float = 1.0) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for an image of this size; guidance 1 is none."""
        steps = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance}
        return {"prompt": prompt, **self.options, **steps}

    @abstractmethod
    def encode(self, prompts: Sequence[str], device: str | torch.device) -> Conditioning:
        """Run the text encoders and return the conditioning of prompts."""

    @abstractmethod
    def predict(self, network: Network, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the network's prediction, in its own sign, at `(B, C, H, W)` and timesteps `(B,)` in [0, 1000]."""


class StableDiffusionDenoiser(Denoiser):
    """Adapter for Stable Diffusion 1 and 2, and all of our models of that architecture, including the StackedUNet."""

    def encode(self, prompts: Sequence[str], device: str | torch.device) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.pipeline.encode_prompt(list(prompts), device, 1, False)[0]}

    def predict(self, network: Network, sample: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
        return network(sample, timestep, **conditioning, return_dict=False)[0]


class StableDiffusionXLDenoiser(Denoiser):
    """Adapter for Stable Diffusion XL. Size conditioning: the image's own size, uncropped, as in its pipeline."""

    def encode(self, prompts: Sequence[str], device: str | torch.device) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipeline.config.get("force_zeros_for_empty_prompt", True):
            there = torch.tensor([prompt != "" for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds * there[:, None, None], pooled * there[:, None]
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def predict(self, network: Network, sample: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
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


_FAMILIES: dict[type, type[Denoiser]] = {
    StableDiffusionPipeline: StableDiffusionDenoiser,
    StableDiffusionXLPipeline: StableDiffusionXLDenoiser,
}
