"""A diffusers pipeline as the teacher of triplets: noise in, data out, and what there is to say about it."""

import copy
import hashlib
import inspect
import math
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

from rectified_diffusers import __version__
from rectified_diffusers.data.config import TripletConfig

_PACKAGES = ("torch", "diffusers", "transformers", "safetensors")
# Samplers that add noise of their own on the way. `sde` variants of other classes are told by their config.
_STOCHASTIC = (
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
_SAMPLED_VALUES = 1024  # of each tensor, in the fingerprint of a teacher


@dataclass(frozen=True)
class Teacher:
    """A text-to-image pipeline that is asked for data from noise; the user's own pipeline is left as it was.

    Make it with `Teacher.of`. `pipeline` is a shallow copy: the models are shared, the scheduler and the settings of
    the progress bar are its own.
    """

    pipeline: Any
    denoiser: Any
    config: TripletConfig
    latent_shape: tuple[int, int, int]

    @classmethod
    def of(cls, pipeline: Any, config: TripletConfig) -> "Teacher":
        """Adapt a pipeline: give it the solver, silence its progress bar, find out the shape of its latents."""
        denoiser = _denoiser(pipeline)
        for name, model in _models(pipeline).items():
            if model.training:
                raise ValueError(
                    f"The teacher's {name} is in training mode, where dropout makes its answers random; "
                    f"call pipeline.{name}.eval() first."
                )
        adapted = copy.copy(pipeline)
        adapted.scheduler = _make_solver(pipeline.scheduler, config.solver)
        adapted.set_progress_bar_config(disable=True)
        return cls(adapted, denoiser, config, _latent_shape(pipeline, denoiser, config))

    def round(self, noise: Tensor) -> Tensor:
        """Round noise to the storage dtype so that the teacher's dtype, too, holds every value exactly.

        Rounding to the teacher's dtype first is what makes it so for any two of float16, bfloat16 and float32.
        """
        return noise.to(self.denoiser.dtype).to(getattr(torch, self.config.storage_dtype))

    @torch.no_grad()
    def __call__(self, prompts: list[str], noise: Tensor) -> Tensor:
        """Solve from noise, `(B, C, H, W)` with unit variance, to data as VAE-scaled latents in the storage dtype.

        Pipelines multiply the latents they are given by the scheduler's init_noise_sigma themselves. Latents out
        means that neither the VAE nor a safety checker runs.
        """
        factor, precision = self.pipeline.vae_scale_factor, self.config.mixed_precision
        dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        with torch.autocast(self.denoiser.device.type, dtype, enabled=dtype is not None):
            data = self.pipeline(
                prompt=prompts,
                height=self.latent_shape[1] * factor,
                width=self.latent_shape[2] * factor,
                num_inference_steps=self.config.num_inference_steps,
                guidance_scale=self.config.guidance_scale,
                latents=noise.to(self.denoiser.dtype),
                output_type="latent",
                return_dict=False,
            )[0]
        if data.shape != noise.shape:
            raise ValueError(
                f"{type(self.pipeline).__name__} answered latents of shape {tuple(data.shape)} to noise of shape "
                f"{tuple(noise.shape)}; triplets need a pipeline whose latents are (B, C, H, W) throughout."
            )
        return data.to("cpu", noise.dtype)

    def settings(self) -> dict[str, Any]:
        """Say everything about the teacher and its solver that decides which data belongs to a noise."""
        vae = self.pipeline.vae.config
        return {
            "pipeline": type(self.pipeline).__name__,
            "teacher_dtype": str(self.denoiser.dtype).removeprefix("torch."),
            "mixed_precision": self.config.mixed_precision,
            "teacher_sha256": _fingerprint(_models(self.pipeline)),
            "solver": type(self.pipeline.scheduler).__name__,
            "solver_config": _plain_config(self.pipeline.scheduler),
            "num_inference_steps": self.config.num_inference_steps,
            "guidance_scale": float(self.config.guidance_scale),
            "latent_shape": list(self.latent_shape),
            "vae_scaling_factor": vae.scaling_factor,
            "vae_shift_factor": getattr(vae, "shift_factor", None),
        }

    def provenance(self) -> dict[str, Any]:
        """Say what helps a person to find the teacher again; the same teacher may have it otherwise tomorrow."""
        origin = str(self.denoiser.config.get("_name_or_path", ""))
        revision = re.search(r"snapshots[/\\]([0-9a-f]{40})", origin)  # the cache of the Hub has it in its paths
        return {
            "teacher": self.pipeline.name_or_path or None,
            "revision": revision[1] if revision else None,
            "versions": {"rectified_diffusers": __version__, **{package: version(package) for package in _PACKAGES}},
        }


def _denoiser(pipeline: Any) -> Any:
    """Return the network that is asked at every step."""
    for name in ("unet", "transformer"):
        if getattr(pipeline, name, None) is not None and getattr(pipeline, "vae", None) is not None:
            return getattr(pipeline, name)
    raise TypeError(
        f"A teacher must be a diffusers text-to-image pipeline with a vae and a unet or transformer, "
        f"got {type(pipeline).__name__}."
    )


def _models(pipeline: Any) -> dict[str, nn.Module]:
    """Return the networks that take part in making latents from a prompt."""
    components = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: part for name, part in components.items() if name not in ("vae", "safety_checker", "image_encoder")}


def _latent_shape(pipeline: Any, denoiser: Any, config: TripletConfig) -> tuple[int, int, int]:
    """Return channels, height and width of the latents that the config asks for."""
    own = denoiser.config.get("sample_size")
    own_height, own_width = own if isinstance(own, (list, tuple)) else (own, own)
    sizes = []
    for name, pixels, default in (("height", config.height, own_height), ("width", config.width, own_width)):
        if pixels is None and default is None:
            raise ValueError(f"{type(denoiser).__name__} does not say its sample_size; set {name} in the config.")
        if pixels is not None and pixels % pipeline.vae_scale_factor:
            raise ValueError(f"{name} must be a multiple of {pipeline.vae_scale_factor} for this VAE, got {pixels}.")
        sizes.append(default if pixels is None else pixels // pipeline.vae_scale_factor)
    return denoiser.config.in_channels, sizes[0], sizes[1]


def _make_solver(scheduler: Any, solver: Literal["auto", "dpm_solver++", "teacher"]) -> Any:
    """Make the scheduler that solves the teacher's ODE; the teacher's own is copied, never touched."""
    config = scheduler.config
    name = type(scheduler).__name__
    flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas", False)
    diffusion = "beta_schedule" in config and not flow
    if solver == "dpm_solver++" and not diffusion:
        raise ValueError(
            f"solver 'dpm_solver++' is for diffusion teachers, and the teacher's {name} is a flow's; "
            "use solver 'teacher' or 'auto'."
        )
    if diffusion and solver != "teacher":
        return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
    sde = str(config.get("algorithm_type")).startswith("sde") or config.get("stochastic_sampling", False)
    if name in _STOCHASTIC or sde:
        raise ValueError(
            f"{name} adds noise on the way, so that its data does not follow from the noise it started from; "
            "use solver 'dpm_solver++', or give the teacher a scheduler that solves the ODE."
        )
    return copy.deepcopy(scheduler)


def _plain_config(scheduler: Any) -> dict[str, Any]:
    """Return the scheduler's options as JSON values; keys that it merely carries for other classes are left out."""
    names = inspect.signature(type(scheduler).__init__).parameters.keys() & scheduler.config.keys()
    return {name: _plain(scheduler.config[name]) for name in sorted(names)}


def _plain(value: Any) -> Any:
    """Turn arrays into lists and infinities, which JSON lacks, into words."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _fingerprint(models: dict[str, nn.Module]) -> str:
    """Return a SHA-256 of the networks: every tensor's name, shape and dtype, and values at even distances.

    A teacher that was tuned, merged or loaded otherwise differs in it; a folder's name would not show that. Tensors
    that offloading put on the meta device add their name, shape and dtype alone.
    """
    digest = hashlib.sha256()
    for part, model in sorted(models.items()):
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            if not tensor.is_meta:
                values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLED_VALUES)]
                digest.update(values.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
