"""rectified-diffusers interpolate: interpolate between images, as an animation or a contact sheet."""

from __future__ import annotations

import argparse
import math
import time
from os.path import expanduser
from pathlib import Path
from typing import Any

from rectified_diffusers.cli.shared import (
    CommandError,
    add_device,
    add_json,
    add_sampling,
    check_folder_is_writable,
    check_picture_file,
    check_sampling,
    contact_sheet,
    default_model,
    load_pipeline,
    print_result,
    set_steps,
)


def add_interpolate(commands: Any) -> argparse.ArgumentParser:
    text = "Animate the way from prompt to prompt and seed to seed."
    parser = commands.add_parser("interpolate", help=text, description=text)
    parser.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="What to draw; one is held while the seed changes"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        action="append",
        required=True,
        help=".gif, .mp4, or another picture for a contact sheet; may be given several times (required)",
    )
    parser.add_argument(
        "--model", type=expanduser, help="Pipeline folder or Hub id (default: the bundled one-step emoji model)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="INT", help="One for all, or one per prompt (default: 0)"
    )
    parser.add_argument(
        "--frames", type=int, default=15, metavar="INT", help="Pictures from one key to the next (default: 15)"
    )
    parser.add_argument("--loop", action="store_true", help="Go back from the last to the first, without a seam")
    parser.add_argument("--fps", type=float, default=15, metavar="NUMBER", help="Pictures per second (default: 15)")
    parser.add_argument("--columns", type=int, metavar="INT", help="Of the contact sheet (default: a square)")
    add_sampling(parser)
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run_interpolate, resumable=False)
    return parser


def run_interpolate(arguments: argparse.Namespace) -> None:
    """Generate the images once, and write them to each of the outputs."""
    _check(arguments)
    from rectified_diffusers.editing.animation import ANIMATIONS, check_animation, save_animation
    from rectified_diffusers.editing.interpolation import check_keys, interpolate

    check_keys(arguments.prompts, arguments.seeds)
    for output in arguments.output:
        if output.suffix.lower() in ANIMATIONS:
            check_animation(output)
        if output.suffix.lower() == ".mp4":  # the only one that is not an image file
            _check_file(output)
        else:
            check_picture_file(output)
    model = default_model() if arguments.model is None else arguments.model
    pipeline = load_pipeline(model, arguments.device, arguments.dtype)
    set_steps(arguments, pipeline)
    began = time.perf_counter()
    images = interpolate(
        pipeline,
        arguments.prompts,
        arguments.seeds,
        arguments.frames,
        loop=arguments.loop,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        negative_prompt=arguments.negative_prompt,
        height=arguments.height,
        width=arguments.width,
    )
    seconds = time.perf_counter() - began
    for output in arguments.output:
        if output.suffix.lower() in ANIMATIONS:
            save_animation(images, output, arguments.fps)
        else:
            contact_sheet(images, arguments.columns or math.ceil(math.sqrt(len(images)))).save(output)
        text = f"{output}: {len(images)} pictures in {seconds:.2f} s"
        print_result(arguments, text, output=output, pictures=len(images), seconds=seconds)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise CommandError(f"the output {str(path)!r} is a folder; give the name of a file")
    check_folder_is_writable(path.parent)


def _check(arguments: argparse.Namespace) -> None:
    check_sampling(arguments, counts=("frames", "columns"))
    if not 0 < arguments.fps <= 50:
        raise CommandError(f"--fps must be above 0 and at most 50, got {arguments.fps}")
