"""rectified-diffusers triplets, real-triplets and verify: training data for reflow and distillation."""

from __future__ import annotations

import os
from collections.abc import Sized
from dataclasses import MISSING, dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

from rectified_diffusers.cli.shared import (
    ON_PROCESSES,
    CommandError,
    CommandOptions,
    DeviceOptions,
    add_command,
    check_output_dir,
    load_pipeline,
    print_result,
)
from rectified_diffusers.data.config import RealTripletConfig, TripletConfig
from rectified_diffusers.data.prompts import open_prompts
from rectified_diffusers.options import option


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(DeviceOptions):
    teacher: str = option(MISSING, "Pipeline folder or Hub id of the teacher.", type=expanduser)
    output_dir: Path = option(MISSING, "Folder for the shards; complete ones in it are kept.")


@dataclass(frozen=True, kw_only=True)
class TripletOptions(TeacherOptions):
    prompts: str = option(
        MISSING,
        ".txt with one prompt per line, .jsonl, .parquet or a folder of it, a folder saved by the library datasets, "
        "or the Hub id of a data set.",
        type=expanduser,
    )
    prompt_column: str = option(
        "prompt", "Key or column of the prompts in .jsonl, .parquet and data sets.", metavar="NAME"
    )
    prompt_split: str = option("train", "Split of a data set with several.", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class RealTripletOptions(TeacherOptions):
    data: Path = option(MISSING, "Folder of real images: files with a metadata.jsonl of file_name and text.")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(CommandOptions):
    folder: Path = option(MISSING, "Folder that `triplets` wrote.", flags=["folder"])


def add_to(commands: Any) -> None:
    settings: dict[str, Any] = {"epilog": ON_PROCESSES, "resumable": True}
    text = "Generate the (prompt, noise, data) triplets of a teacher that reflow and distill train on."
    add_command(commands, "triplets", run_triplets, TripletOptions, TripletConfig, help=text, **settings)
    text = "Invert real images to noise by running a teacher's flow backward: more triplets for reflow and distill."
    classes = RealTripletOptions, RealTripletConfig
    add_command(commands, "real-triplets", run_real_triplets, *classes, help=text, **settings)
    text = "Read a folder of triplets and compare every shard with its checksum."
    add_command(commands, "verify", run_verify, VerifyOptions, help=text)


def run_triplets(options: TripletOptions, config: TripletConfig) -> None:
    prompts = open_prompts(options.prompts, options.prompt_column, options.prompt_split)
    teacher = _load_teacher(options)
    from rectified_diffusers.data.generate import generate_triplets

    _report(options, generate_triplets(teacher, prompts, options.output_dir, config, progress=True))


def run_real_triplets(options: RealTripletOptions, config: RealTripletConfig) -> None:
    if not options.data.is_dir():
        raise CommandError(f"no folder {str(options.data)!r}; give a folder of images with a metadata.jsonl")
    teacher = _load_teacher(options)
    from rectified_diffusers.data.generate_real import generate_real_triplets

    _report(options, generate_real_triplets(teacher, options.data, options.output_dir, config, progress=True))


def _load_teacher(options: TeacherOptions) -> Any:
    """Check the output folder and load the teacher to the device of this process."""
    check_output_dir(options.output_dir)
    device = options.device
    if "WORLD_SIZE" in os.environ:  # a process of accelerate launch, which has its own device
        from rectified_diffusers.distributed import join_processes

        device = str(join_processes().device) if device == "auto" else device
    return load_pipeline(options.teacher, device, options.dtype)


def _report(options: TeacherOptions, dataset: Sized) -> None:
    from rectified_diffusers.distributed import join_processes

    if join_processes().is_main_process:
        text = f"{options.output_dir}: {len(dataset)} triplets"
        print_result(options, text, output_dir=options.output_dir, triplets=len(dataset))


def run_verify(options: VerifyOptions) -> None:
    from rectified_diffusers.data.dataset import verify_triplets

    dataset = verify_triplets(options.folder, progress=True)
    text = f"{options.folder}: {len(dataset)} triplets, all intact"
    print_result(options, text, folder=options.folder, triplets=len(dataset))
