"""The student of a training run: its initial network, and the pipeline that samples it."""

import copy
from typing import Any, Literal

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from rectified_diffusers.checks import require_type
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.models.latents import latent_channels
from rectified_diffusers.models.velocity_unet import DiffusionVelocityUNet
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler, record_student_steps
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.pipelines.stable_diffusion_xl import RectifiedFlowXLPipeline
from rectified_diffusers.training.guards import require_same_latents


def denoiser_for(pipeline: Any, dataset: TripletDataset) -> Denoiser:
    """Return the adapter of a pipeline; raise if it or the triplets are unsuitable, before anything is moved.

    A network that takes guidance as an input is trained at the guidance of the triplets: at that value it starts as
    the flow that generated them, and at that value it must be sampled.
    """
    require_type("dataset", dataset, TripletDataset, "Open a folder of triplets: TripletDataset(folder).")
    denoiser = Denoiser.of(pipeline, dataset.manifest.guidance_scale)
    shape, channels = tuple(dataset.rows([0]).data.shape), latent_channels(pipeline)
    if shape[1] != channels:
        raise ValueError(
            f"The {denoiser.component} takes {channels} channels, the triplets have {shape[1]} (shape {shape}). "
            "Make the triplets with a teacher that shares the VAE of this pipeline."
        )
    require_same_latents(pipeline.vae, dataset.manifest)
    guidances = {part.guidance_scale for part in dataset.manifest.parts}
    if denoiser.network.config.get("guidance_embeds") and len(guidances) > 1:
        raise ValueError(
            f"The {denoiser.component} takes guidance as an input, and the folders of triplets were made with several "
            f"guidances: {sorted(guidances)}. Make them all with one guidance_scale."
        )
    return denoiser


def initial_network(denoiser: Denoiser, initialisation: Literal["weights", "snr_matching"]) -> Any:
    """Return the network that training starts from, in float32; the pipeline's network is not changed.

    Args:
        initialisation: `weights` copies the pipeline's network; for a flow, this is already that flow. `snr_matching`
            converts a diffusion U-Net to the equivalent flow, see `DiffusionVelocityUNet`.
    """
    if initialisation == "weights":
        return copy.deepcopy(denoiser.network).float()
    if denoiser.diffusion() is None:
        raise ValueError(
            f"initialisation='snr_matching' makes a diffusion model a flow, which {type(denoiser.pipeline).__name__} "
            f"with {type(denoiser.pipeline.scheduler).__name__} is already. Use initialisation='weights'."
        )
    return DiffusionVelocityUNet.from_unet(denoiser.network, denoiser.pipeline.scheduler).float()


def student_pipeline(denoiser: Denoiser, network: Any, steps: int = 1) -> Any:
    """Return the pipeline that samples a trained network, with all other components unchanged.

    It is a pipeline of this package where one exists. Stable Diffusion 3 and Flux keep their own, which already
    samples a flow and loads without this package; its scheduler is Euler without shift. A shift, fixed or by image
    size, spends more steps where the teacher's paths bend, and reflow leaves no such region. One step is the same
    under any shift. (The pipeline of Flux uses the grid 1, 1 - 1/N, ..., 1/N. That of Stable Diffusion 3 leaves it to
    the scheduler, whose last step begins at sigma = 0.001: of N steps all but one count, except for N = 1.)

    Args:
        steps: N of a student that was distilled to N steps. Its scheduler records N. For Stable Diffusion 3 it also
            ends the grid at 1/N instead of 0.001, so that N steps are those of the training; a single step is then
            not possible.
    """
    pipeline = denoiser.pipeline
    parts = {**pipeline.components, denoiser.component: network}
    if not isinstance(pipeline, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
        ends = isinstance(pipeline, StableDiffusion3Pipeline) and steps > 1
        grid: dict[str, Any] = {"shift_terminal": 1 / steps} if ends else {}
        scheduler = FlowMatchEulerDiscreteScheduler(denoiser.num_train_timesteps, shift=1.0, **grid)
        record_student_steps(scheduler, steps)
        return type(pipeline)(**{**parts, "scheduler": scheduler})
    parts["scheduler"] = RectifiedFlowEulerScheduler(denoiser.num_train_timesteps, denoiser.direction)
    record_student_steps(parts["scheduler"], steps)
    config = pipeline.config
    if isinstance(pipeline, StableDiffusionXLPipeline):
        zeros = config.get("force_zeros_for_empty_prompt", True)
        watermark = getattr(pipeline, "watermark", None) is not None
        return RectifiedFlowXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=watermark)
    return RectifiedFlowPipeline(**parts, requires_safety_checker=config.get("requires_safety_checker", True))
