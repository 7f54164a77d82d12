"""The student of a training run: its initial network, and the pipeline that samples it."""

import copy
from typing import Any, Literal

import torch
from diffusers import StableDiffusionXLPipeline

from rectified_diffusers.checks import require_type
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.manifest import Manifest
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.calibration import CALL_ERRORS, PROMPTS
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.models.latents import latent_channels
from rectified_diffusers.models.stock_call import stop_at
from rectified_diffusers.models.velocity_unet import DiffusionVelocityUNet
from rectified_diffusers.models.watching import UnsupportedPipelineError
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
    manifest = dataset.manifest
    denoiser = Denoiser.of(pipeline, manifest.guidance_scale, _options_for(pipeline, manifest))
    if isinstance(denoiser, PipelineDenoiser):
        _require_student(denoiser, manifest)
    else:
        shape, channels = tuple(dataset.rows([0]).data.shape), latent_channels(pipeline)
        if shape[1] != channels:
            raise ValueError(
                f"The {denoiser.component} takes {channels} channels, the triplets have {shape[1]} (shape {shape}). "
                "Make the triplets with a teacher that shares the VAE of this pipeline."
            )
    require_same_latents(getattr(pipeline, "vae", None), manifest)
    guidances = {part.guidance_scale for part in manifest.parts}
    if len(guidances) > 1 and denoiser.takes_guidance:
        raise ValueError(
            f"The {denoiser.component} takes guidance as an input, and the folders of triplets were made with several "
            f"guidances: {sorted(guidances)}. Make them all with one guidance_scale."
        )
    return denoiser


def _options_for(pipeline: Any, manifest: Manifest) -> dict[str, Any]:
    """Return the arguments of the pipeline's call for the image size of the triplets."""
    factor = getattr(pipeline, "vae_scale_factor", None)
    if "call_options" in manifest.settings or factor is None or len(manifest.latent_shape) != 3:
        return manifest.call_options
    _, height, width = manifest.latent_shape
    return {"height": height * factor, "width": width * factor}


def _require_student(denoiser: PipelineDenoiser, manifest: Manifest) -> None:
    """Raise if a pipeline is no flow, or has latents of another shape than the triplets."""
    kind = type(denoiser.pipeline).__name__
    if not denoiser.is_flow:
        raise UnsupportedPipelineError(
            f"{kind} cannot be trained: it is a diffusion model, and only the U-Nets of Stable Diffusion and SDXL can "
            "be made a flow."
        )
    if denoiser.latent_shape != manifest.latent_shape:
        raise ValueError(
            f"The latents of {kind} have shape {denoiser.latent_shape}, those of the triplets {manifest.latent_shape} "
            f"(format {manifest.settings.get('format')}). Make the triplets with this release, and with a teacher of "
            "this pipeline's layout and image size."
        )
    denoiser.prepare()


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

    It is a pipeline of this package for Stable Diffusion and SDXL. Others keep their own, which already samples a flow
    and loads without this package; its scheduler has no shift. A shift, fixed or by image size, spends more steps
    where the teacher's paths bend, and reflow leaves no such region. One step is the same under any shift. (The
    pipeline of Flux uses the grid 1, 1 - 1/N, ..., 1/N. That of Stable Diffusion 3 leaves it to the scheduler, whose
    last step begins at sigma = 0.001: of N steps all but one count, except for N = 1.)

    Args:
        steps: N of a student that was distilled to N steps. Its scheduler records N. For pipelines such as Stable
            Diffusion 3 it also ends the grid at 1/N instead of 0.001, so that N steps are those of the training; a
            single step is then not possible.
    """
    pipeline = denoiser.pipeline
    if isinstance(denoiser, PipelineDenoiser):
        student = copy.copy(pipeline)
        scheduler = _without_shift(denoiser, steps)
        record_student_steps(scheduler, steps)
        student.register_modules(**{denoiser.component: network, "scheduler": scheduler})
        return student
    parts = {**pipeline.components, denoiser.component: network}
    parts["scheduler"] = RectifiedFlowEulerScheduler(denoiser.num_train_timesteps, denoiser.direction)
    record_student_steps(parts["scheduler"], steps)
    config = pipeline.config
    if isinstance(pipeline, StableDiffusionXLPipeline):
        zeros = config.get("force_zeros_for_empty_prompt", True)
        watermark = getattr(pipeline, "watermark", None) is not None
        return RectifiedFlowXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=watermark)
    return RectifiedFlowPipeline(**parts, requires_safety_checker=config.get("requires_safety_checker", True))


_SPACINGS = "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting"
_SHIFTS = {"shift": 1.0, "flow_shift": 1.0, "shift_terminal": None, **dict.fromkeys(_SPACINGS, False)}


def require_steps(denoiser: Denoiser, steps: int) -> None:
    """Raise if the stock pipeline cannot take the steps of a student: Mochi, for example, takes at least two."""
    if not isinstance(denoiser, PipelineDenoiser):
        return
    try:
        denoiser.call.run(PROMPTS[:1], steps, denoiser.calibration.off, on_network=stop_at(denoiser.component))
    except torch.OutOfMemoryError:
        raise
    except CALL_ERRORS as error:
        raise UnsupportedPipelineError(
            f"{type(denoiser.pipeline).__name__} cannot generate in {steps} steps: its call fails with "
            f"{type(error).__name__}: {error}. Choose another student_steps."
        ) from error


def _without_shift(denoiser: PipelineDenoiser, steps: int) -> Any:
    """Return a copy of the pipeline's scheduler without shift; with it, where the shift is in its timesteps."""
    scheduler, flow = denoiser.pipeline.scheduler, denoiser.calibration.flow
    if flow is None or flow.table is not None:
        return copy.deepcopy(scheduler)
    euler = {"solver_order": 1, "disable_corrector": list(range(steps))}  # of a multistep solver
    plain_grid = {**_SHIFTS, **(euler if steps > 1 else {})}
    changes = {name: value for name, value in plain_grid.items() if name in scheduler.config}
    plain = type(scheduler).from_config(scheduler.config, **changes)
    if steps == 1 or "shift_terminal" not in scheduler.config:
        return plain
    call, off = denoiser.call, denoiser.calibration.off
    grid = call.run(PROMPTS[:1], steps, off, on_network=stop_at(denoiser.component), scheduler=plain).scheduler.sigmas
    if abs(float(grid[steps - 1]) - 1 / steps) < 1e-3:
        return plain
    return type(scheduler).from_config(scheduler.config, **{**changes, "shift_terminal": 1 / steps})
