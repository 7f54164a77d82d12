"""Generate triplets from real images: the data is an image, the noise is the end of the teacher's flow run backward.

Reflow trains on images that the teacher generates, including their defects. Some pairs can use a real image instead,
as in 2-RF++ (arXiv:2405.20320) and conic reflow (arXiv:2510.25229). Such pairs keep the teacher's coupling; training
on randomly paired noise and images would destroy it.

Where the data is almost deterministic, an imperfect teacher generates slightly more variety than the data has. For
example, a plain background lies at the center of what the teacher generates there, so the backward flow ends closer
to 0 than noise does. The inversion therefore starts at an earlier time s, `RealTripletConfig.inversion_time`, from

    x_s = s * data + (1 - s) * new noise,

a point on the straight path where real data and the teacher's data hardly differ. The resulting noise is white to the
extent that the teacher is correct from s on. In any case the pairs are a coupling of noise and real data, which is all
that a rectified flow requires (arXiv:2209.03003). Data detail finer than (1 - s) / s is independent of the noise.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.checks import UnsupportedPipelineError, require_type
from rectified_diffusers.data.config import RealTripletConfig
from rectified_diffusers.data.dataset import TripletDataset, Triplets, require_white
from rectified_diffusers.data.generate import draw_noise, make_manifest, write_triplets
from rectified_diffusers.data.prompts import prompts_sha256
from rectified_diffusers.data.real_images import read_pictures
from rectified_diffusers.data.teacher import Teacher, fingerprint
from rectified_diffusers.flow.ode import heun
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.models.latents import encode_pixels, latent_shape
from rectified_diffusers.models.velocity import PipelineVelocity
from rectified_diffusers.pipelines.scheduler import require_straight


def generate_real_triplets(
    teacher: Any, pictures: str | Path, output_dir: str | Path, config: RealTripletConfig, progress: bool = True
) -> TripletDataset:
    """Invert real images to noise with a teacher and store the triplets in shards.

    The folder has the format of `generate_triplets`. Several processes and resumed runs work as they do there.
    `JoinedTriplets` combines both kinds of folders. The data is the mean of the VAE's latents.

    Args:
        teacher: a text-to-image pipeline of a family that `Denoiser.of` supports, diffusion or flow, on the device of
            this process. It is not modified.
        pictures: a folder of captioned images, see `read_pictures`. Images are read on demand.
    """
    require_type("config", config, RealTripletConfig, "Make one: RealTripletConfig(num_triplets=1000).")
    sizes: dict[str, Any] = dict.fromkeys(("height", "width"), config.size) if config.size else {}
    denoiser = Denoiser.of(teacher, config.guidance_scale, sizes)  # raises for unsupported pipelines
    if config.num_inference_steps and config.inversion_time < 1:
        require_straight(teacher.scheduler, f"inversion_time={config.inversion_time}")
    shape = latent_shape(teacher, config.size, config.size)
    if shape[1] != shape[2]:
        raise ValueError(f"Real images are cropped to squares, and the teacher's latents are {shape}; set size.")
    if denoiser.latent_shape != shape:
        raise UnsupportedPipelineError(
            f"Expected a teacher whose scheduler sees the latents of its VAE, {shape}, got {type(teacher).__name__}."
        )
    adapted = replace(Teacher.adapt(teacher, config, copy.deepcopy(teacher.scheduler), shape), denoiser=denoiser)
    real = read_pictures(pictures, shape[1] * teacher.vae_scale_factor, config.split)
    numbers = real.numbers(config.split)
    if not numbers:
        raise ValueError(
            f"There are no images of split {config.split!r} in {pictures}; set split to one of "
            f"{', '.join(map(repr, sorted(set(real.splits))))}."
        )
    random.Random(f"{config.seed}/real").shuffle(numbers)
    numbers = numbers[: config.num_triplets]
    captions = [real.captions[number] for number in numbers]

    def batches(shard: int, indices: range) -> Iterator[Triplets]:
        drawn = draw_noise(config.seed, shard, (config.triplets_per_shard, *shape))[: len(indices)]
        for start in range(0, len(indices), config.batch_size):
            batch = slice(start, start + config.batch_size)
            places = [index % len(numbers) for index in indices[batch]]
            own = [captions[place] for place in places]
            data = _latents(adapted, real.read([numbers[place] for place in places]))
            noise = _noise(adapted, config, own, data, drawn[batch])
            if shard == 0 and start == 0:
                remedy = "Lower inversion_time, or raise the steps."
                require_white(noise, f"The noise of {pictures}", remedy)
            yield Triplets(own, noise, data, adapted.encode(own) if config.store_text_embeddings else {})

    decided = {
        "solver": "Heun, backwards" if config.num_inference_steps else "none, new noise",
        "inversion_time": float(config.inversion_time),
        "pictures": real.identity,
        "split": config.split,
        "vae_sha256": fingerprint({"vae": teacher.vae}),
    }
    manifest = make_manifest(adapted, config, len(captions), prompts_sha256(captions), **decided)
    return write_triplets(output_dir, manifest, batches, progress)


@torch.no_grad()
def _latents(teacher: Teacher, pictures: Tensor) -> Tensor:
    """Encode images `(B, 3, H, W)` uint8 into data in the storage dtype. This rounded data is what is inverted."""
    data = teacher.round(encode_pixels(teacher.pipeline.vae, pictures.float() / 127.5 - 1)).cpu()
    if data.shape[1:] != teacher.latent_shape:
        raise ValueError(
            f"The latents of the images are {tuple(data.shape[1:])}, expected {teacher.latent_shape}: the images in "
            f"the folder have {tuple(pictures.shape[2:])} pixels. Set size to that, or make the images again."
        )
    return data


@torch.no_grad()
def _noise(
    teacher: Teacher, config: RealTripletConfig, prompts: Sequence[str], data: Tensor, new_noise: Tensor
) -> Tensor:
    """Integrate the flow backward from a mix of data and new noise to unit-variance noise.

    Returns:
        Noise `(B, C, H, W)` in the storage dtype; the new noise itself if `num_inference_steps` is 0.
    """
    if config.num_inference_steps == 0:
        return teacher.round(new_noise)
    velocity = PipelineVelocity.bind(teacher.denoiser or Denoiser.of(teacher.pipeline), prompts)
    begin = config.inversion_time
    if begin <= velocity.start:
        raise ValueError(
            f"inversion_time must be above {velocity.start:.3f}, where the teacher's noise schedule begins, got "
            f"{begin}."
        )
    state = (begin * data.float() + (1 - begin) * new_noise).to(teacher.network.device)
    with teacher.autocast():
        state = heun(velocity, state, config.num_inference_steps, begin, velocity.start)
    return teacher.round(velocity.noise_at_start(state)).cpu()
