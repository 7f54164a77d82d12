"""Use a diffusers pipeline as the teacher of triplets: map noise to data, and record its settings and provenance."""

import copy
import hashlib
import inspect
import json
import math
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from rectified_diffusers import __version__
from rectified_diffusers.data.config import StoredTripletConfig, TripletConfig
from rectified_diffusers.data.solvers import make_solver
from rectified_diffusers.models.conditioning import PromptConditioning
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.models.latents import latent_shape, network_of
from rectified_diffusers.models.quantization import stored_tensors

_PACKAGES = ("torch", "diffusers", "transformers", "safetensors")
_SAMPLED_VALUES = 1024  # values of each tensor in the fingerprint of a teacher
_PROBE = "A photo of 17 red-haired foxes, it's snowing in Zürich! #fox (4k) 雪 \U0001f98a"  # for tokenizers


@dataclass(frozen=True)
class Teacher:
    """A text-to-image pipeline that generates data from noise. The user's own pipeline is not modified.

    Create it with `Teacher.of`, or with `Teacher.adapt` for another solver. `pipeline` is a shallow copy: it shares
    the models and has its own scheduler and progress-bar settings.
    """

    pipeline: Any
    network: Any
    config: StoredTripletConfig
    latent_shape: tuple[int, ...]
    denoiser: Denoiser | None = None

    @classmethod
    def of(cls, pipeline: Any, config: TripletConfig) -> "Teacher":
        """Return a teacher with the solver and the latent shape that the options specify."""
        if not isinstance(pipeline, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
            from rectified_diffusers.data.stock_teacher import StockTeacher

            return StockTeacher.of(pipeline, config)
        if config.call_options:
            raise ValueError(f"{type(pipeline).__name__} takes no call_options, got {config.call_options!r}.")
        shape = latent_shape(pipeline, config.height, config.width)
        return cls.adapt(pipeline, config, make_solver(pipeline.scheduler, config.solver), shape)

    @classmethod
    def adapt(cls, pipeline: Any, config: StoredTripletConfig, scheduler: Any, shape: tuple[int, ...]) -> "Teacher":
        """Return a teacher with this scheduler and without a progress bar."""
        require_evaluation(pipeline)
        adapted = copy.copy(pipeline)
        adapted.scheduler = scheduler
        adapted.set_progress_bar_config(disable=True)
        return cls(adapted, network_of(pipeline), config, shape)

    @property
    def guidance_scale(self) -> float:
        """Return the guidance scale in use, as the pipeline's call takes it; the default is that of its call."""
        if self.config.guidance_scale is not None:
            return float(self.config.guidance_scale)
        return float(inspect.signature(type(self.pipeline).__call__).parameters["guidance_scale"].default)

    def autocast(self) -> torch.autocast:
        """Return the context manager that runs forward passes in the precision of the options."""
        return autocast(self.network.device, self.config.mixed_precision)

    def round(self, noise: Tensor) -> Tensor:
        """Round noise to the storage dtype so that the teacher's dtype can also represent every value exactly.

        Rounding to the teacher's dtype first ensures this for any pair of float16, bfloat16 and float32.
        """
        return noise.to(self.network.dtype).to(getattr(torch, self.config.storage_dtype))

    @torch.no_grad()
    def __call__(self, prompts: list[str], noise: Tensor) -> Tensor:
        """Solve the ODE from unit-variance noise `(B, C, H, W)` to data: VAE-scaled latents in the storage dtype.

        The pipeline itself multiplies the latents passed to it by the scheduler's init_noise_sigma. Because the output
        is latents, neither the VAE nor a safety checker runs.
        """
        factor = self.pipeline.vae_scale_factor
        with self.autocast():
            data = self.pipeline(
                prompt=prompts,
                height=self.latent_shape[1] * factor,
                width=self.latent_shape[2] * factor,
                num_inference_steps=self.config.num_inference_steps,
                guidance_scale=self.guidance_scale,
                latents=noise.to(self.network.dtype),
                output_type="latent",
                return_dict=False,
            )[0]
        if data.shape != noise.shape:
            raise ValueError(
                f"{type(self.pipeline).__name__} returned latents of shape {tuple(data.shape)} for noise of shape "
                f"{tuple(noise.shape)}. Triplets need a pipeline whose latents are (B, C, H, W) throughout."
            )
        return data.to("cpu", noise.dtype)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Run the text encoders and return the network's conditioning as rows, in the storage dtype on the CPU."""
        denoiser = self.denoiser or Denoiser.of(self.pipeline)
        encoded = denoiser.encode(prompts, self.pipeline._execution_device)
        rows = encoded.stack() if isinstance(encoded, PromptConditioning) else encoded
        return {name: part.to("cpu", getattr(torch, self.config.storage_dtype)) for name, part in rows.items()}

    def settings(self) -> dict[str, Any]:
        """Return all settings of the teacher and its solver that determine the data for a given noise."""
        vae = getattr(getattr(self.pipeline, "vae", None), "config", {})
        return {
            "pipeline": type(self.pipeline).__name__,
            "teacher_dtype": str(self.network.dtype).removeprefix("torch."),
            "mixed_precision": self.config.mixed_precision,
            "teacher_sha256": fingerprint(_models(self.pipeline)),
            "solver": type(self.pipeline.scheduler).__name__,
            "solver_config": _plain_config(self.pipeline.scheduler),
            "num_inference_steps": self.config.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "latent_shape": list(self.latent_shape),
            "vae_scaling_factor": vae.get("scaling_factor"),
            "vae_shift_factor": vae.get("shift_factor"),
        }

    def provenance(self) -> dict[str, Any]:
        """Return information that helps a user find the teacher again. It may change for the same teacher."""
        origin = str(self.network.config.get("_name_or_path", ""))
        revision = re.search(r"snapshots[/\\]([0-9a-f]{40})", origin)  # paths in the Hub's cache contain it
        return {
            "teacher": str(self.pipeline.name_or_path or "") or None,
            "revision": revision[1] if revision else None,
            "versions": {"rectified_diffusers": __version__, **{package: version(package) for package in _PACKAGES}},
        }


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """Return the context manager for forward passes in a precision: "no", "bf16" or "fp16"."""
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def require_evaluation(pipeline: Any) -> None:
    """Raise ValueError if a network of the teacher is in training mode."""
    for name, model in _models(pipeline).items():
        if model.training:
            raise ValueError(
                f"The teacher's {name} is in training mode, where dropout makes its outputs random; "
                f"call pipeline.{name}.eval() first."
            )


def _models(pipeline: Any) -> dict[str, nn.Module]:
    """Return the networks used to generate latents from a prompt."""
    unused = ("vae", "safety_checker", "image_encoder")
    return {name: part for name, part in _all_models(pipeline).items() if name not in unused}


def _plain_config(scheduler: Any) -> dict[str, Any]:
    """Return the scheduler's own options as JSON values, without keys that it only carries for other classes."""
    names = inspect.signature(type(scheduler).__init__).parameters.keys() & scheduler.config.keys()
    return {name: _plain(scheduler.config[name]) for name in sorted(names)}


def _plain(value: Any) -> Any:
    """Return a JSON value: arrays become lists; infinities and NaN, which JSON lacks, become strings."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(models: dict[str, nn.Module], every_value: bool = False) -> str:
    """Return a SHA-256 of the networks: name, shape and dtype of every tensor, and values at even intervals.

    It differs for a teacher that was fine-tuned, merged or loaded differently, which a folder name would not show.
    Tensors that offloading moved to the meta device contribute only name, shape and dtype.
    """
    digest = hashlib.sha256()
    for part, model in sorted(models.items()):
        tensors = (stored for item in model.state_dict().items() for stored in stored_tensors(*item))
        for name, tensor in sorted(tensors):
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            if not tensor.is_meta:
                values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLED_VALUES)]
                digest.update(values.to("cpu", torch.float32).numpy().tobytes())
                if every_value:
                    digest.update(str(_bit_sum(tensor.detach())).encode())
    return digest.hexdigest()


def fingerprints(pipeline: Any) -> dict[str, str]:
    """Return a digest of each part of a pipeline: of all weights, of the tokenizers, of the noise schedule.

    Unlike in `fingerprint`, every value counts, through the sum of the bit patterns of a tensor. Paths, versions of
    libraries and the device do not count.
    """
    digests = {name: fingerprint({name: part}, every_value=True) for name, part in _all_models(pipeline).items()}
    scheduler = pipeline.scheduler
    schedule = [
        scheduler.config.get(name) for name in ("prediction_type", "velocity_direction", "num_train_timesteps")
    ]
    alphas = getattr(scheduler, "alphas_cumprod", None)
    digests["scheduler"] = _digest([*schedule, None if alphas is None else [f"{value:.6g}" for value in alphas]])
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            digests[name] = _digest([sorted(part.get_vocab().items()), part(_PROBE, verbose=False).input_ids])
    return {name: digest[:16] for name, digest in sorted(digests.items())}


def _all_models(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _bit_sum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bit patterns as integers, which any single changed value changes."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.contiguous().view(integer).sum(dtype=torch.int64))
