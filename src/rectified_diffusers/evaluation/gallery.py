"""Pictures of a pipeline from noise that depends on nothing but a seed, kept on the disk as they come."""

import copy
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from rectified_diffusers.seeds import generator_of

CHUNK = 64  # pictures in a file, and what a killed run loses at most
_TIMED = 5


def for_evaluation(pipeline: Any) -> Any:
    """Copy a pipeline, sharing its models, to be evaluated: its own progress bar hidden, no safety checker.

    A diffusion pipeline gets DPM-Solver++, the solver of the triplets. A safety checker would put black pictures among
    the others, which distances of distributions punish out of proportion.
    """
    adapted = copy.copy(pipeline)
    config = pipeline.scheduler.config
    if "beta_schedule" in config and config.get("prediction_type") != "flow_prediction":
        adapted.scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
    if getattr(pipeline, "safety_checker", None) is not None:
        adapted.safety_checker = None
    adapted.set_progress_bar_config(disable=True)
    return adapted


def fingerprint(pipeline: Any) -> str:
    """Digest all weights of a pipeline, its scheduler and its class: equal ones draw equal pictures."""
    digest = hashlib.blake2b(type(pipeline).__name__.encode(), digest_size=16)
    scheduler = {name: str(value) for name, value in pipeline.scheduler.config.items()}
    digest.update(json.dumps([type(pipeline.scheduler).__name__, scheduler], sort_keys=True).encode())
    for part, model in sorted(pipeline.components.items()):
        if isinstance(model, nn.Module):
            for name, tensor in sorted(model.state_dict().items()):
                digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                if not tensor.is_meta:  # put away by offloading
                    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Drawer:
    """A pipeline with the settings that it draws with."""

    pipeline: Any
    steps: int
    guidance_scale: float
    batch_size: int = 16

    def draw(self, prompts: Sequence[str], seeds: Sequence[str]) -> Tensor:
        """Draw one picture per prompt and seed, `(N, 3, H, W)` uint8 on the CPU."""
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
        return torch.cat(parts)

    def seconds_per_image(self, prompts: Sequence[str]) -> float:
        """Median time of a single picture from prompt to pixels, after one to warm up."""
        times = []
        for i in range(_TIMED + 1):
            begin = time.perf_counter()
            self.draw([prompts[i % len(prompts)]], [str(i)])
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])


class Gallery:
    """Pictures in chunks, and their features: what is on the disk is read, what is not is made and put there.

    Args:
        folder: of these pictures alone; its name should digest all that they depend on.
        make: pictures `(last - first, 3, H, W)` uint8 of numbers first to last.
        keep: whether pictures are put on the disk, or their features only.
    """

    def __init__(
        self, folder: Path, count: int, make: Callable[[int, int], Tensor], *, label: str = "", keep: bool = True
    ) -> None:
        self.folder, self.count, self.make, self.label, self.keep = folder, count, make, label, keep

    def pictures(self, first: int) -> Tensor:
        """Give the chunk that begins with picture `first`."""
        last = min(first + CHUNK, self.count)
        if not self.keep:
            return self.make(first, last)
        path = self.folder / f"{first:06}.safetensors"
        return cached(path, lambda: {"images": self.make(first, last)})["images"]

    def see(self, name: str, features: Callable[[Tensor], Tensor], progress: bool = False) -> Tensor:
        """Give the features `(N, D)` of all pictures.

        Args:
            name: of the features, in the names of the files.
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
    """Give the tensors in a safetensors file, which is made if it is not there; it is there whole or not at all."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            save_file(make(), partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return load_file(path)


def digest_of(value: Any) -> str:
    """Digest anything that JSON can say, for the name of a folder."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
