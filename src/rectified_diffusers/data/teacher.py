"""A diffusers pipeline as the teacher of triplets: noise in, data out, and what there is to say about it."""

import copy
import hashlib
import inspect
import math
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from rectified_diffusers import __version__
from rectified_diffusers.data.config import StoredTripletConfig, TripletConfig
from rectified_diffusers.data.solvers import make_solver
from rectified_diffusers.models.denoiser import Conditioning, Denoiser
from rectified_diffusers.models.latents import latent_shape, pack, packs_latents, unpack

_PACKAGES = ("torch", "diffusers", "transformers", "safetensors")
_SAMPLED_VALUES = 1024  # of each tensor, in the fingerprint of a teacher


@dataclass(frozen=True)
class Teacher:
    """A text-to-image pipeline that is asked for data from noise; the user's own pipeline is left as it was.

    Make it with `Teacher.of`, or with `Teacher.adapt` for another solver. `pipeline` is a shallow copy: the models are
    shared, the scheduler and the settings of the progress bar are its own.
    """

    pipeline: Any
    denoiser: Any
    config: StoredTripletConfig
    latent_shape: tuple[int, int, int]

    @classmethod
    def of(cls, pipeline: Any, config: TripletConfig) -> "Teacher":
        """Adapt a pipeline to options: give it their solver, find out the shape of its latents."""
        _denoiser(pipeline)  # raises for what is no such pipeline
        shape = latent_shape(pipeline, config.height, config.width)
        return cls.adapt(pipeline, config, make_solver(pipeline.scheduler, config.solver), shape)

    @classmethod
    def adapt(
        cls, pipeline: Any, config: StoredTripletConfig, scheduler: Any, shape: tuple[int, int, int]
    ) -> "Teacher":
        """Make a teacher that has this scheduler and no progress bar."""
        denoiser = _denoiser(pipeline)
        for name, model in _models(pipeline).items():
            if model.training:
                raise ValueError(
                    f"The teacher's {name} is in training mode, where dropout makes its answers random; "
                    f"call pipeline.{name}.eval() first."
                )
        adapted = copy.copy(pipeline)
        adapted.scheduler = scheduler
        adapted.set_progress_bar_config(disable=True)
        return cls(adapted, denoiser, config, shape)

    def autocast(self) -> torch.autocast:
        """Give the context in which forward passes have the precision of the options."""
        dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.mixed_precision]
        return torch.autocast(self.denoiser.device.type, dtype, enabled=dtype is not None)

    def round(self, noise: Tensor) -> Tensor:
        """Round noise to the storage dtype so that the teacher's dtype, too, holds every value exactly.

        Rounding to the teacher's dtype first is what makes it so for any two of float16, bfloat16 and float32.
        """
        return noise.to(self.denoiser.dtype).to(getattr(torch, self.config.storage_dtype))

    @torch.no_grad()
    def __call__(self, prompts: list[str], noise: Tensor) -> Tensor:
        """Solve from noise, `(B, C, H, W)` with unit variance, to data as VAE-scaled latents in the storage dtype.

        Pipelines multiply the latents they are given by the scheduler's init_noise_sigma themselves. Latents out
        means that neither the VAE nor a safety checker runs. Flux' tokens are turned into latents here.
        """
        packed = packs_latents(self.pipeline)
        factor = self.pipeline.vae_scale_factor
        with self.autocast():
            data = self.pipeline(
                prompt=prompts,
                height=self.latent_shape[1] * factor,
                width=self.latent_shape[2] * factor,
                num_inference_steps=self.config.num_inference_steps,
                guidance_scale=self.config.guidance_scale,
                latents=(pack(noise) if packed else noise).to(self.denoiser.dtype),
                output_type="latent",
                return_dict=False,
            )[0]
        if packed:
            data = unpack(data, *noise.shape[-2:])
        if data.shape != noise.shape:
            raise ValueError(
                f"{type(self.pipeline).__name__} answered latents of shape {tuple(data.shape)} to noise of shape "
                f"{tuple(noise.shape)}; triplets need a pipeline whose latents are (B, C, H, W) throughout."
            )
        return data.to("cpu", noise.dtype)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Run the text encoders; give what a network is told of the prompts, in the storage dtype on the CPU."""
        encoded = Denoiser.of(self.pipeline).encode(prompts, self.pipeline._execution_device)
        return {name: part.to("cpu", getattr(torch, self.config.storage_dtype)) for name, part in encoded.items()}

    def settings(self) -> dict[str, Any]:
        """Say everything about the teacher and its solver that decides which data belongs to a noise."""
        vae = self.pipeline.vae.config
        return {
            "pipeline": type(self.pipeline).__name__,
            "teacher_dtype": str(self.denoiser.dtype).removeprefix("torch."),
            "mixed_precision": self.config.mixed_precision,
            "teacher_sha256": fingerprint(_models(self.pipeline)),
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
            "teacher": str(self.pipeline.name_or_path or "") or None,
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


def fingerprint(models: dict[str, nn.Module]) -> str:
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
