"""rectified-diffusers generate: generate images from prompts."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectified_diffusers.cli.shared import (
    CommandError,
    add_device,
    add_json,
    add_sampling,
    check_picture_file,
    check_sampling,
    contact_sheet,
    default_model,
    load_pipeline,
    print_result,
    set_steps,
)

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SEED = 2**63 - 1  # limit of torch.Generator.manual_seed
REFINER = "stabilityai/stable-diffusion-xl-refiner-1.0"
REFINE_STRENGTH, REFINE_STEPS = 0.3, 50  # defaults of diffusers: 15 steps are run
FAST_BATCH = 8  # images per batch with --fast
UPSCALING = 2  # from InstaFlow's 512 pixels to the refiner's 1024


def add_generate(commands: Any) -> argparse.ArgumentParser:
    text = "Draw pictures from prompts."
    parser = commands.add_parser("generate", help=text, description=text)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="What to draw; several make a contact sheet.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Picture file to write (required)")
    parser.add_argument(
        "--model", type=expanduser, help="Pipeline folder or Hub id (default: the bundled one-step emoji model)"
    )
    parser.add_argument("--num-images", type=int, default=1, metavar="INT", help="Pictures per prompt (default: 1)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="INT", help="Picture i of every prompt has seed + i (default: 0)"
    )
    add_sampling(parser)
    parser.add_argument(
        "--columns",
        type=int,
        metavar="INT",
        help="Columns of the contact sheet (default: a row per prompt if each has several pictures, else a square)",
    )
    _add_fast(parser)
    _add_refine(parser)
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run_generate, resumable=False)
    return parser


def _add_fast(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fast",
        action="store_true",
        help=f"16-bit numbers where the hardware has them, up to {FAST_BATCH} pictures at once, and more; pictures "
        "differ by a few levels of 255",
    )
    parser.add_argument(
        "--tiny-decoder",
        type=expanduser,
        metavar="MODEL",
        help="With --fast: an AutoencoderTiny in place of the VAE, folder or Hub id (madebyollin/taesd for Stable "
        "Diffusion 1.5)",
    )


def _add_refine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--refine",
        type=expanduser,
        nargs="?",
        const=REFINER,
        metavar="MODEL",
        help=f"Enlarge each picture {UPSCALING} times and refine it with an SDXL refiner, a pipeline folder or Hub id "
        f"({REFINER} if none is named); write it after the prompts",
    )
    parser.add_argument(
        "--refine-strength",
        type=float,
        metavar="NUMBER",
        help=f"Share of the refiner's steps that is run, more changes more (default: {REFINE_STRENGTH})",
    )
    parser.add_argument(
        "--refine-steps", type=int, metavar="INT", help=f"Steps of the refiner at strength 1 (default: {REFINE_STEPS})"
    )


def run_generate(arguments: argparse.Namespace) -> None:
    """Generate `num_images` images for each prompt, one at a time unless `fast`, and write them to one file.

    An image generated alone is bit-identical regardless of what else the command generates, and memory does not grow
    with the number of images.
    """
    _check_generate(arguments)
    _check_refine(arguments)
    check_picture_file(arguments.output)
    model = default_model() if arguments.model is None else arguments.model
    pipeline = load_pipeline(model, arguments.device, arguments.dtype)
    set_steps(arguments, pipeline)
    if arguments.fast:
        _make_fast(pipeline, arguments)
    refiner = None if arguments.refine is None else _load_refiner(arguments)
    began = time.perf_counter()
    images = _draw(pipeline, refiner, arguments)
    seconds = time.perf_counter() - began
    per_row = arguments.num_images if len(arguments.prompts) > 1 and arguments.num_images > 1 else None
    columns = arguments.columns or per_row or math.ceil(math.sqrt(len(images)))
    picture = images[0] if len(images) == 1 else contact_sheet(images, columns)
    picture.save(arguments.output)
    count = "1 picture" if len(images) == 1 else f"{len(images)} pictures"
    text = f"{arguments.output}: {count} in {seconds:.2f} s"
    print_result(arguments, text, output=arguments.output, pictures=len(images), seconds=seconds)


def _check_generate(arguments: argparse.Namespace) -> None:
    check_sampling(arguments, counts=("num_images", "columns"))
    if (arguments.height is None) != (arguments.width is None):  # diffusers would ignore the given one
        raise CommandError("--height and --width go together; give both or neither")
    if arguments.tiny_decoder is not None and not arguments.fast:
        raise CommandError("--tiny-decoder has no effect without --fast")
    if not 0 <= arguments.seed <= MAX_SEED - arguments.num_images:
        raise CommandError(f"--seed must be between 0 and 2^63 - 1 less the number of pictures, got {arguments.seed}")


def _check_refine(arguments: argparse.Namespace) -> None:
    given = [name for name in ("refine_strength", "refine_steps") if getattr(arguments, name) is not None]
    if arguments.refine is None and given:
        raise CommandError(f"--{given[0].replace('_', '-')} has no effect without --refine")
    strength, steps = _refine_settings(arguments)
    if not 0 < strength <= 1:
        raise CommandError(f"--refine-strength must be above 0 and at most 1, got {strength}")
    if int(steps * strength) < 1:  # as diffusers computes it, which fails on zero steps
        raise CommandError(
            f"--refine-strength {strength} of --refine-steps {steps} is less than one step; raise either"
        )


def _refine_settings(arguments: argparse.Namespace) -> tuple[float, int]:
    """Return the strength and steps of the refiner, with the defaults filled in."""
    strength, steps = arguments.refine_strength, arguments.refine_steps
    return REFINE_STRENGTH if strength is None else strength, REFINE_STEPS if steps is None else steps


def _make_fast(pipeline: Any, arguments: argparse.Namespace) -> None:
    """Optimize the pipeline; keep a requested dtype, and compile nothing for a handful of images."""
    from rectified_diffusers.speed.optimize import optimize

    dtype: Any = "auto" if arguments.dtype == "auto" else None
    try:
        optimize(pipeline, dtype=dtype, compile=False, decoder=arguments.tiny_decoder)
    except TypeError as error:  # a model with a different architecture
        raise CommandError(str(error)) from error
    pipeline.vae.enable_slicing()  # decoding several images at once takes memory and gains nothing


def _load_refiner(arguments: argparse.Namespace) -> Any:
    refiner = load_pipeline(arguments.refine, arguments.device, arguments.dtype)
    from diffusers import StableDiffusionXLImg2ImgPipeline

    if not isinstance(refiner, StableDiffusionXLImg2ImgPipeline):
        raise CommandError(
            f"--refine needs a StableDiffusionXLImg2ImgPipeline such as {REFINER}, "
            f"but {arguments.refine!r} is a {type(refiner).__name__}"
        )
    return refiner


def _refine(refiner: Any, image: Image, prompt: str, seed: int, arguments: argparse.Namespace) -> Image:
    """Enlarge an image and run the last part of the refiner's diffusion on it."""
    import torch
    from PIL.Image import Resampling

    strength, steps = _refine_settings(arguments)
    result = refiner(
        prompt,
        image=image.resize((UPSCALING * image.width, UPSCALING * image.height), Resampling.LANCZOS),
        negative_prompt=arguments.negative_prompt,
        strength=strength,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
    )
    return result.images[0]


def _draw(pipeline: Any, refiner: Any, arguments: argparse.Namespace) -> list[Image]:
    """Return the generated images, those of the first prompt first."""
    from tqdm import tqdm

    jobs = [(prompt, arguments.seed + index) for prompt in arguments.prompts for index in range(arguments.num_images)]
    size = FAST_BATCH if arguments.fast else 1
    pipeline.set_progress_bar_config(disable=len(jobs) > 1 or arguments.steps == 1)
    if refiner is not None:
        refiner.set_progress_bar_config(disable=len(jobs) > 1)
    images = []
    with tqdm(total=len(jobs), unit="picture", disable=len(jobs) == 1) as bar:
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            for (prompt, seed), image in zip(batch, _draw_batch(pipeline, batch, arguments), strict=True):
                images.append(image if refiner is None else _refine(refiner, image, prompt, seed, arguments))
                bar.update()
    return images


def _draw_batch(pipeline: Any, batch: Sequence[tuple[str, int]], arguments: argparse.Namespace) -> list[Image]:
    """Generate one image for each prompt and seed."""
    import torch

    prompts = [prompt for prompt, _ in batch]
    negative = arguments.negative_prompt
    # On the CPU: the same noise on every device.
    generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
    return pipeline(
        prompts if len(batch) > 1 else prompts[0],
        negative_prompt=negative if negative is None or len(batch) == 1 else [negative] * len(batch),
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        height=arguments.height,
        width=arguments.width,
        generator=generators if len(batch) > 1 else generators[0],
    ).images
