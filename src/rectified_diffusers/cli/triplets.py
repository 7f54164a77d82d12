"""rectified-diffusers triplets, real-triplets and verify: training data for reflow and distillation."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sized
from os.path import expanduser
from pathlib import Path
from typing import Any

from rectified_diffusers.cli.shared import (
    CommandError,
    add_device,
    add_json,
    check_output_dir,
    load_pipeline,
    print_result,
)
from rectified_diffusers.data.config import RealTripletConfig, TripletConfig
from rectified_diffusers.data.prompts import open_prompts
from rectified_diffusers.options import add_options, options_from


def add_triplets(commands: Any) -> argparse.ArgumentParser:
    text = "Let a teacher draw the (prompt, noise, data) triplets that reflow and distill train on."
    parser = _add_command(commands, "triplets", text)
    parser.add_argument(
        "--prompts",
        type=expanduser,
        required=True,
        help=".txt with one prompt a line, .jsonl, .parquet or a folder of it, a folder that datasets saved, or the "
        "Hub id of a data set (required)",
    )
    parser.add_argument(
        "--prompt-column",
        default="prompt",
        metavar="NAME",
        help="Key or column of the prompts in .jsonl, .parquet and data sets (default: prompt)",
    )
    parser.add_argument(
        "--prompt-split", default="train", metavar="NAME", help="Split of a data set with several (default: train)"
    )
    _add_options(parser, TripletConfig)
    parser.set_defaults(run=run_triplets, resumable=True)
    return parser


def add_real_triplets(commands: Any) -> argparse.ArgumentParser:
    text = (
        "Find the noise of real pictures by running a teacher's flow backwards: more triplets for reflow and distill."
    )
    parser = _add_command(commands, "real-triplets", text)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="Folder of real pictures: files with a metadata.jsonl of file_name and text (required)",
    )
    _add_options(parser, RealTripletConfig)
    parser.set_defaults(run=run_real_triplets, resumable=True)
    return parser


def _add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    epilog = f"On several processes: accelerate launch -m rectified_diffusers.cli {name} ..."
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog)
    parser.add_argument(
        "--teacher", type=expanduser, required=True, help="Pipeline folder or Hub id of the teacher (required)"
    )
    return parser


def _add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="Folder for the shards; whole ones are kept (required)"
    )
    add_options(parser, config_class)
    add_device(parser)
    add_json(parser)


def run_triplets(arguments: argparse.Namespace) -> None:
    config = options_from(arguments, TripletConfig)
    prompts = open_prompts(arguments.prompts, arguments.prompt_column, arguments.prompt_split)
    teacher = _load_teacher(arguments)
    from rectified_diffusers.data.generate import generate_triplets

    _report(arguments, generate_triplets(teacher, prompts, arguments.output_dir, config, progress=True))


def run_real_triplets(arguments: argparse.Namespace) -> None:
    config = options_from(arguments, RealTripletConfig)
    if not arguments.data.is_dir():
        raise CommandError(f"no folder {str(arguments.data)!r}; give one of pictures with a metadata.jsonl")
    teacher = _load_teacher(arguments)
    from rectified_diffusers.data.generate_real import generate_real_triplets

    _report(arguments, generate_real_triplets(teacher, arguments.data, arguments.output_dir, config, progress=True))


def _load_teacher(arguments: argparse.Namespace) -> Any:
    """Check the output folder and load the teacher to the device of this process."""
    check_output_dir(arguments.output_dir)
    device = arguments.device
    if "WORLD_SIZE" in os.environ:  # a process of accelerate launch, which has its own device
        from rectified_diffusers.distributed import join_processes

        device = str(join_processes().device) if device == "auto" else device
    return load_pipeline(arguments.teacher, device, arguments.dtype)


def _report(arguments: argparse.Namespace, dataset: Sized) -> None:
    from rectified_diffusers.distributed import join_processes

    if join_processes().is_main_process:
        text = f"{arguments.output_dir}: {len(dataset)} triplets"
        print_result(arguments, text, output_dir=arguments.output_dir, triplets=len(dataset))


def add_verify(commands: Any) -> argparse.ArgumentParser:
    text = "Read a folder of triplets and compare every shard with its checksum."
    parser = commands.add_parser("verify", help=text, description=text)
    parser.add_argument("folder", type=Path, help="Folder that `triplets` wrote")
    add_json(parser)
    parser.set_defaults(run=run_verify)
    return parser


def run_verify(arguments: argparse.Namespace) -> None:
    from rectified_diffusers.data.dataset import verify_triplets

    dataset = verify_triplets(arguments.folder, progress=True)
    text = f"{arguments.folder}: {len(dataset)} triplets, all sound"
    print_result(arguments, text, folder=arguments.folder, triplets=len(dataset))
