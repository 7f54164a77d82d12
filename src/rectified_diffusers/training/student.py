"""The student of a training run: its initial network, and the pipeline that samples it."""

import copy
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor

from rectified_diffusers.checks import UnsupportedPipelineError, require_type
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.manifest import Manifest
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.calibration import CALL_ERRORS, PROMPTS
from rectified_diffusers.models.conditioning import map_leaves
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.models.latents import latent_channels
from rectified_diffusers.models.quantization import quantization_of
from rectified_diffusers.models.stock_call import stop_at
from rectified_diffusers.models.velocity_unet import DiffusionVelocityUNet
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler, record_student_steps
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.pipelines.stable_diffusion_xl import RectifiedFlowXLPipeline
from rectified_diffusers.training.guards import require_same_latents
from rectified_diffusers.training.sharding import borrow_weights


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


def initial_network(
    denoiser: Denoiser,
    initialisation: Literal["weights", "snr_matching"],
    shared: torch.device | None = None,
    sharded: bool = False,
) -> Any:
    """Return the network that training starts from, in float32; the weights of the pipeline's network are not changed.

    A network to be sharded has the memory of the pipeline's network, and its dtype, see `borrow_weights`.

    Args:
        shared: for a LoRA, the device on which weights are shared with the pipeline's network, if in float32 or
            quantized.
        initialisation: `weights` copies the pipeline's network; for a flow, this is already that flow. `snr_matching`
            converts a diffusion U-Net to the equivalent flow, see `DiffusionVelocityUNet`.
        sharded: whether the network will be sharded over the processes.
    """
    if initialisation == "weights":
        if sharded:
            network = borrow_weights(denoiser.network)
            return network if shared is None else network.float()  # a LoRA has the dtype of its base
        if shared is None:
            return copy.deepcopy(denoiser.network).float()
        return share_weights(denoiser.network.to(shared))  # moved with its buffers, which are not shared later
    if quantization_of(denoiser.network) is not None:
        raise ValueError(
            f"The {denoiser.component} is quantized, and initialisation='snr_matching' computes new weights from it. "
            f"Load the {type(denoiser.pipeline).__name__} without a quantization_config."
        )
    if denoiser.diffusion() is None:
        raise ValueError(
            f"initialisation='snr_matching' makes a diffusion model a flow, which {type(denoiser.pipeline).__name__} "
            f"with {type(denoiser.pipeline.scheduler).__name__} is already. Use initialisation='weights'."
        )
    if sharded:
        network = DiffusionVelocityUNet.sharing(denoiser.network, denoiser.pipeline.scheduler)
        return network if shared is None else network.float()
    return DiffusionVelocityUNet.from_unet(denoiser.network, denoiser.pipeline.scheduler).float()


def share_weights(network: Any) -> Any:
    """Return a copy of a network's modules with the same weights, for a LoRA; float32 copies of other dtypes.

    Quantized weights are shared as they are.

    The weights are frozen in both, because a parameter has one flag for all modules that hold it.
    """
    plain = quantization_of(network) is None
    if plain and any(weight.dtype != torch.float32 for weight in network.parameters() if weight.is_floating_point()):
        return copy.deepcopy(network).float().requires_grad_(False)
    weights = [*network.requires_grad_(False).parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(weight): weight for weight in weights})


def student_pipeline(denoiser: Denoiser, network: Any, scheduler: Any) -> Any:
    """Return the pipeline that samples a trained network, with all other components unchanged.

    It is a pipeline of this package for Stable Diffusion and SDXL. Others keep their own, which already samples a flow
    and loads without this package.

    Args:
        scheduler: as `student_scheduler` returns it; it is copied.
    """
    pipeline, scheduler = denoiser.pipeline, copy.deepcopy(scheduler)
    if isinstance(denoiser, PipelineDenoiser):
        student = copy.copy(pipeline)
        student.register_modules(**{denoiser.component: network, "scheduler": scheduler})
        return student
    parts = {**pipeline.components, denoiser.component: network, "scheduler": scheduler}
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


def student_scheduler(denoiser: Denoiser, steps: int) -> Any:
    """Return the scheduler of a student of N steps, which records N.

    It is ours for Stable Diffusion and SDXL. For others it is a stock scheduler with which N steps of the pipeline
    are the Euler steps of training, at t = 0, 1/N, ...: the pipeline's own without a shift, ending at 1/N if
    necessary, or `FlowMatchEulerDiscreteScheduler` in place of multistep solvers such as those of Sana and Wan. A
    shift, fixed or by image size, spends more steps where the teacher's paths bend, and reflow leaves no such region.
    One step is the same under any shift. (The pipeline of Flux uses the grid 1, 1 - 1/N, ..., 1/N. That of Stable
    Diffusion 3 leaves it to the scheduler, whose last step begins at sigma = 0.001: of N steps all but one count,
    except for N = 1. Ending at 1/N makes them N; a single step is then not possible.)

    Raises:
        UnsupportedPipelineError: the pipeline takes other steps with each of them.
    """
    if isinstance(denoiser, PipelineDenoiser):
        scheduler = _stock_scheduler(denoiser, steps)
    else:
        scheduler = RectifiedFlowEulerScheduler(denoiser.num_train_timesteps, denoiser.direction)
    record_student_steps(scheduler, steps)
    return scheduler


def _stock_scheduler(denoiser: PipelineDenoiser, steps: int) -> Any:
    own: Any = denoiser.pipeline.scheduler
    if denoiser.calibration.flow is not None and denoiser.calibration.flow.table is not None:
        first = copy.deepcopy(own)  # the shift is in its timesteps
    else:
        first = type(own).from_config(own.config, **{name: _SHIFTS[name] for name in _SHIFTS if name in own.config})
    for scheduler in (first, FlowMatchEulerDiscreteScheduler(num_train_timesteps=denoiser.num_train_timesteps)):
        if _takes_training_steps(denoiser, scheduler, steps):
            return scheduler
        if steps > 1 and "shift_terminal" in scheduler.config:
            ending = type(scheduler).from_config(scheduler.config, shift_terminal=1 / steps)
            if _takes_training_steps(denoiser, ending, steps):
                return ending
    if steps == 1:
        return first
    raise UnsupportedPipelineError(
        f"{type(denoiser.pipeline).__name__} does not take {steps} equal steps with any stock scheduler: its call "
        f"sets timesteps of its own. Set student_steps=1, got {steps}."
    )


def _takes_training_steps(denoiser: PipelineDenoiser, scheduler: Any, steps: int) -> bool:
    """Return whether the stock call takes N equal Euler steps, at the timesteps of training, with this scheduler.

    Random answers take the place of the network's.
    """
    calibration, flow = denoiser.calibration, denoiser.calibration.flow
    generator = torch.Generator().manual_seed(0)

    def sample(leaf: Any) -> Any:
        return torch.randn(leaf.shape, generator=generator).to(leaf) if isinstance(leaf, Tensor) else leaf

    def answer(network: Any, component: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if component != calibration.component:
            return network(*args, **kwargs)
        return map_leaves(calibration.answer.blank, sample)

    options, encoded = {**calibration.off, **denoiser.call.latents_only}, calibration.trace.encoded or None
    try:
        trace = denoiser.call.run(PROMPTS[:1], steps, options, on_network=answer, scheduler=scheduler, encoded=encoded)
    except CALL_ERRORS:
        return False
    return (
        flow is not None
        and len(trace.steps) == steps
        and all(
            abs(flow.timestep_of(step) - float(flow.timestep_at(torch.tensor([i / steps])))) < 1e-2
            and torch.allclose(
                step.sample.float() + flow.sign / steps * step.answer.float(),
                step.result.float(),
                atol=1e-4 + 32 * torch.finfo(step.result.dtype).eps,
            )
            for i, step in enumerate(trace.steps)
        )
    )
