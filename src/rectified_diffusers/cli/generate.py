"""rectified-diffusers generate: generate images from prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectified_diffusers.cli.shared import (
    OUTPUT,
    CommandError,
    SamplingOptions,
    add_command,
    check_image_file,
    contact_sheet,
    load_pipeline,
    print_result,
)
from rectified_diffusers.options import flag, option

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SEED = 2**63 - 1  # limit of torch.Generator.manual_seed
REFINER = "stabilityai/stable-diffusion-xl-refiner-1.0"
REFINE_STRENGTH, REFINE_STEPS = 0.3, 50  # defaults of diffusers: 15 steps are run
FAST_BATCH = 8  # images per batch with --fast
UPSCALING = 2  # from InstaFlow's 512 pixels to the refiner's 1024


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions):
    output: Path = option(MISSING, "Image file to write.", flags=OUTPUT)
    num_images: int = option(1, "Images per prompt.")
    seed: int = option(0, "Image i of every prompt has seed + i.")
    fast: bool = flag(
        f"16-bit numbers where the hardware has them, up to {FAST_BATCH} images at once, and more; pixels differ by a "
        "few levels of 255."
    )
    tiny_decoder: str | None = option(
        None,
        "With --fast: an AutoencoderTiny in place of the VAE, folder or Hub id (madebyollin/taesd for Stable "
        "Diffusion 1.5).",
        metavar="MODEL",
        type=expanduser,
    )
    refine: str | None = option(
        None,
        f"Enlarge each image {UPSCALING} times and refine it with an SDXL refiner, a pipeline folder or Hub id "
        f"({REFINER} if none is named); write it after the prompts.",
        nargs="?",
        const=REFINER,
        metavar="MODEL",
        type=expanduser,
    )
    refine_strength: float | None = option(
        None, "Share of the refiner's steps that is run; more steps change more.", shown=str(REFINE_STRENGTH)
    )
    refine_steps: int | None = option(None, "Steps of the refiner at strength 1.", shown=str(REFINE_STEPS))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.height is None) != (self.width is None):  # diffusers would ignore the given one
            raise CommandError("--height and --width go together; give both or neither")
        if self.tiny_decoder is not None and not self.fast:
            raise CommandError("--tiny-decoder has no effect without --fast")
        if not 0 <= self.seed <= MAX_SEED - self.num_images:
            raise CommandError(f"--seed must be between 0 and 2^63 - 1 less the number of images, got {self.seed}")
        given = [name for name in ("refine_strength", "refine_steps") if getattr(self, name) is not None]
        if self.refine is None and given:
            raise CommandError(f"--{given[0].replace('_', '-')} has no effect without --refine")
        strength, steps = self.refiner_settings
        if not 0 < strength <= 1:
            raise CommandError(f"--refine-strength must be above 0 and at most 1, got {strength}")
        if int(steps * strength) < 1:  # as diffusers computes it, which fails on zero steps
            raise CommandError(f"--refine-strength {strength} of --refine-steps {steps} is less than one step")

    @property
    def refiner_settings(self) -> tuple[float, int]:
        """Return the strength and steps of the refiner, with the defaults filled in."""
        strength, steps = self.refine_strength, self.refine_steps
        return REFINE_STRENGTH if strength is None else strength, REFINE_STEPS if steps is None else steps


def add_to(commands: Any) -> None:
    add_command(commands, "generate", run_generate, GenerateOptions, help="Generate images from prompts.")


def run_generate(options: GenerateOptions) -> None:
    """Generate `num_images` images for each prompt, one at a time unless `fast`, and write them to one file.

    An image generated alone is bit-identical regardless of what else the command generates, and memory does not grow
    with the number of images.
    """
    check_image_file(options.output)
    pipeline = load_pipeline(options.source, options.device, options.dtype)
    options = options.with_steps_of(pipeline)
    if options.fast:
        _make_fast(pipeline, options)
    refiner = None if options.refine is None else _load_refiner(options)
    began = time.perf_counter()
    images = _generate(pipeline, refiner, options)
    seconds = time.perf_counter() - began
    per_row = options.num_images if len(options.prompts) > 1 and options.num_images > 1 else None
    columns = options.columns or per_row or math.ceil(math.sqrt(len(images)))
    sheet = images[0] if len(images) == 1 else contact_sheet(images, columns)
    sheet.save(options.output)
    count = "1 image" if len(images) == 1 else f"{len(images)} images"
    text = f"{options.output}: {count} in {seconds:.2f} s"
    print_result(options, text, output=options.output, pictures=len(images), seconds=seconds)


def _make_fast(pipeline: Any, options: GenerateOptions) -> None:
    """Optimize the pipeline; keep a requested dtype, and compile nothing for a handful of images."""
    from rectified_diffusers.speed.optimize import optimize

    dtype: Any = "auto" if options.dtype == "auto" else None
    optimize(pipeline, dtype=dtype, compile=False, decoder=options.tiny_decoder)
    pipeline.vae.enable_slicing()  # decoding several images at once takes memory and gains nothing


def _load_refiner(options: GenerateOptions) -> Any:
    refiner = load_pipeline(str(options.refine), options.device, options.dtype)
    from diffusers import StableDiffusionXLImg2ImgPipeline

    if not isinstance(refiner, StableDiffusionXLImg2ImgPipeline):
        kind = type(refiner).__name__
        raise CommandError(f"--refine needs an SDXL refiner such as {REFINER}, got a {kind} ({options.refine})")
    return refiner


def _refine(refiner: Any, image: Image, prompt: str, seed: int, options: GenerateOptions) -> Image:
    """Enlarge an image and run the last part of the refiner's diffusion on it."""
    import torch
    from PIL.Image import Resampling

    strength, steps = options.refiner_settings
    result = refiner(
        prompt,
        image=image.resize((UPSCALING * image.width, UPSCALING * image.height), Resampling.LANCZOS),
        negative_prompt=options.negative_prompt,
        strength=strength,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
    )
    return result.images[0]


def _generate(pipeline: Any, refiner: Any, options: GenerateOptions) -> list[Image]:
    """Return the generated images, those of the first prompt first."""
    from tqdm import tqdm

    jobs = [(prompt, options.seed + index) for prompt in options.prompts for index in range(options.num_images)]
    size = FAST_BATCH if options.fast else 1
    pipeline.set_progress_bar_config(disable=len(jobs) > 1 or options.steps == 1)
    if refiner is not None:
        refiner.set_progress_bar_config(disable=len(jobs) > 1)
    images = []
    with tqdm(total=len(jobs), unit="image", disable=len(jobs) == 1) as bar:
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            for (prompt, seed), image in zip(batch, _generate_batch(pipeline, batch, options), strict=True):
                images.append(image if refiner is None else _refine(refiner, image, prompt, seed, options))
                bar.update()
    return images


def _generate_batch(pipeline: Any, batch: Sequence[tuple[str, int]], options: GenerateOptions) -> list[Image]:
    """Generate one image for each prompt and seed."""
    import torch

    prompts = [prompt for prompt, _ in batch]
    negative = options.negative_prompt
    # On the CPU: the same noise on every device.
    generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
    return pipeline(
        prompts if len(batch) > 1 else prompts[0],
        negative_prompt=negative if negative is None or len(batch) == 1 else [negative] * len(batch),
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        height=options.height,
        width=options.width,
        generator=generators if len(batch) > 1 else generators[0],
    ).images
