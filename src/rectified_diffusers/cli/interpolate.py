"""rectified-diffusers interpolate: interpolate between images, as an animation or a contact sheet."""

from __future__ import annotations

import math
import time
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from rectified_diffusers.cli.shared import (
    OUTPUT,
    CommandError,
    SamplingOptions,
    add_command,
    check_folder_is_writable,
    check_image_file,
    check_is_no_folder,
    contact_sheet,
    load_pipeline,
    print_result,
)
from rectified_diffusers.options import flag, option


@dataclass(frozen=True, kw_only=True)
class InterpolateOptions(SamplingOptions):
    outputs: tuple[Path, ...] = option(
        MISSING,
        ".gif, .mp4, or another image format for a contact sheet; may be given several times.",
        flags=OUTPUT,
        action="append",
        nargs=None,
    )
    seeds: tuple[int, ...] = option((0,), "One for all prompts, or one per prompt.", nargs="+")
    frames: int = option(15, "Images from one keyframe to the next.")
    loop: bool = flag("Return from the last keyframe to the first, for a seamless animation.")
    fps: float = option(15.0, "Images per second.", shown="15")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fps <= 50:
            raise CommandError(f"--fps must be above 0 and at most 50, got {self.fps}")


def add_to(commands: Any) -> None:
    text = "Animate the interpolation between prompts and seeds."
    add_command(commands, "interpolate", run_interpolate, InterpolateOptions, help=text)


def run_interpolate(options: InterpolateOptions) -> None:
    """Generate the images once, and write them to each of the outputs."""
    from rectified_diffusers.editing.animation import ANIMATIONS, check_animation, save_animation
    from rectified_diffusers.editing.interpolation import check_keys, interpolate

    check_keys(options.prompts, options.seeds)
    for output in options.outputs:
        if output.suffix.lower() in ANIMATIONS:
            check_animation(output)
        if output.suffix.lower() == ".mp4":  # the only one that is not an image file
            check_is_no_folder(output)
            check_folder_is_writable(output.parent)
        else:
            check_image_file(output)
    pipeline = load_pipeline(options.source, options.device, options.dtype)
    options = options.with_steps_of(pipeline)
    began = time.perf_counter()
    images = interpolate(
        pipeline,
        options.prompts,
        options.seeds,
        options.frames,
        loop=options.loop,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        negative_prompt=options.negative_prompt,
        height=options.height,
        width=options.width,
    )
    seconds = time.perf_counter() - began
    for output in options.outputs:
        if output.suffix.lower() in ANIMATIONS:
            save_animation(images, output, options.fps)
        else:
            contact_sheet(images, options.columns or math.ceil(math.sqrt(len(images)))).save(output)
        text = f"{output}: {len(images)} images in {seconds:.2f} s"
        print_result(options, text, output=output, pictures=len(images), seconds=seconds)
