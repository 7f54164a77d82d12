"""Generate a pipeline's images from noise that depends only on a seed, and store them on disk as they are produced."""

import copy
import hashlib
import inspect
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.data.solvers import make_solver
from rectified_diffusers.files import write_atomically
from rectified_diffusers.models.denoiser import is_diffusion
from rectified_diffusers.seeds import generator_of

CHUNK = 64  # images per file, the most that an interrupted run loses
_TIMED = 5


def for_evaluation(pipeline: Any) -> Any:
    """Return a copy of a pipeline for evaluation that shares its models, without progress bar and safety checker.

    A diffusion pipeline gets DPM-Solver++, the solver used for triplets. A safety checker would insert black images,
    which affect distribution distances disproportionately.
    """
    adapted = copy.copy(pipeline)
    if is_diffusion(pipeline.scheduler):
        adapted.scheduler = make_solver(pipeline.scheduler, "dpm_solver++")
    if getattr(pipeline, "safety_checker", None) is not None:
        adapted.safety_checker = None
    adapted.set_progress_bar_config(disable=True)
    return adapted


def require_images(pipeline: Any) -> None:
    """Raise for a pipeline that generates videos, or whose call lacks an argument that `Sampler` passes."""
    kind, parameters = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    if "num_frames" in parameters:
        raise UnsupportedPipelineError(f"evaluate compares images, and {kind} generates videos.")
    needed = ("prompt", "num_inference_steps", "guidance_scale", "generator", "output_type")
    missing = [name for name in needed if name not in parameters]
    if missing:
        raise UnsupportedPipelineError(
            f"evaluate passes {missing[0]} to a pipeline, which the call of {kind} does not take."
        )


def pipeline_digest(pipeline: Any) -> str:
    """Return a digest of a pipeline's class, scheduler and weights. Equal digests imply equal images."""
    digest = hashlib.blake2b(type(pipeline).__name__.encode(), digest_size=16)
    scheduler = {name: str(value) for name, value in pipeline.scheduler.config.items()}
    digest.update(json.dumps([type(pipeline.scheduler).__name__, scheduler], sort_keys=True).encode())
    for part, model in sorted(pipeline.components.items()):
        if isinstance(model, nn.Module):
            for name, tensor in sorted(model.state_dict().items()):
                digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                if not tensor.is_meta:  # moved there by offloading
                    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Sampler:
    """A pipeline with its generation settings."""

    pipeline: Any
    steps: int
    guidance_scale: float
    batch_size: int = 16

    def sample(self, prompts: Sequence[str], seeds: Sequence[str]) -> Tensor:
        """Generate one image per prompt and seed, `(N, 3, H, W)` uint8 on the CPU."""
        parts = []
        for first in range(0, len(prompts), self.batch_size):
            batch = slice(first, first + self.batch_size)
            images = self.pipeline(
                list(prompts[batch]),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                generator=[generator_of(seed) for seed in seeds[batch]],
                output_type="pt",
            ).images
            parts.append((images.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8))
        return torch.cat(parts).contiguous()

    def seconds_per_image(self, prompts: Sequence[str]) -> float:
        """Return the median time in seconds of a single image from prompt to pixels, after one warm-up image."""
        times = []
        for i in range(_TIMED + 1):
            begin = time.perf_counter()
            self.sample([prompts[i % len(prompts)]], [str(i)])
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])


class Gallery:
    """Images in chunks, and their features, cached on disk: missing files are generated and stored.

    Args:
        folder: folder for these images only. Its name should be a digest of everything that they depend on.
        make: returns images `(last - first, 3, H, W)` uint8 for the indices from `first` to `last`, exclusive.
        keep: whether to store the images; if False, only their features are stored.
    """

    def __init__(
        self, folder: Path, count: int, make: Callable[[int, int], Tensor], *, label: str = "", keep: bool = True
    ) -> None:
        self.folder, self.count, self.make, self.label, self.keep = folder, count, make, label, keep

    def pictures(self, first: int) -> Tensor:
        """Return the chunk that starts with image `first`."""
        last = min(first + CHUNK, self.count)
        if not self.keep:
            return self.make(first, last)
        path = self.folder / f"{first:06}.safetensors"
        return cached(path, lambda: {"images": self.make(first, last)})["images"]

    def see(self, name: str, features: Callable[[Tensor], Tensor], progress: bool = False) -> Tensor:
        """Return the features `(N, D)` of all images.

        Args:
            name: name of the features, used in file names.
        """
        paths = {first: self.folder / f"{first:06}.{name}.safetensors" for first in range(0, self.count, CHUNK)}
        missing = [first for first, path in paths.items() if not path.exists()]
        hidden = not (progress and missing)
        with tqdm(total=self.count, desc=self.label, unit="image", leave=False, disable=hidden) as bar:
            bar.update(self.count - sum(min(CHUNK, self.count - first) for first in missing))
            for first in missing:
                seen = [features(batch).cpu() for batch in self.pictures(first).split(32)]
                tensors = {"features": torch.cat(seen).contiguous()}
                cached(paths[first], lambda tensors=tensors: tensors)
                bar.update(len(tensors["features"]))
        return torch.cat([load_file(path)["features"] for path in paths.values()])


def cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file, which is written atomically with `make` if it does not exist."""
    if not path.exists():
        write_atomically(path, lambda partial: save_file(make(), partial))
    return load_file(path)
