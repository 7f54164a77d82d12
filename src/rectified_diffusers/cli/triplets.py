"""rectified-diffusers triplets: what reflow and distillation train on."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rectified_diffusers.cli.shared import add_device, add_json, check_output_dir, load_pipeline, print_result
from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.prompts import open_prompts
from rectified_diffusers.options import add_options, options_from


def add_triplets(commands: Any) -> argparse.ArgumentParser:
    text = "Let a teacher draw the (prompt, noise, data) triplets that reflow and distill train on."
    epilog = "On several processes: accelerate launch -m rectified_diffusers.cli triplets ..."
    parser = commands.add_parser("triplets", help=text, description=text, epilog=epilog)
    parser.add_argument("--teacher", required=True, help="Pipeline folder or Hub id of the teacher (required)")
    parser.add_argument(
        "--prompts",
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
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="Folder for the shards; whole ones are kept (required)"
    )
    add_options(parser, TripletConfig)
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run_triplets, resumable=True)
    return parser


def run_triplets(arguments: argparse.Namespace) -> None:
    config = options_from(arguments, TripletConfig)
    prompts = open_prompts(arguments.prompts, arguments.prompt_column, arguments.prompt_split)
    check_output_dir(arguments.output_dir)
    device = arguments.device
    if "WORLD_SIZE" in os.environ:  # a process of accelerate launch, which has a device of its own
        from rectified_diffusers.data.processes import join_processes

        device = str(join_processes().device) if device == "auto" else device
    teacher = load_pipeline(arguments.teacher, device, arguments.dtype)
    from rectified_diffusers.data.processes import join_processes
    from rectified_diffusers.data.triplets import generate_triplets

    dataset = generate_triplets(teacher, prompts, arguments.output_dir, config, progress=True)
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
    from rectified_diffusers.data.triplets import verify_triplets

    dataset = verify_triplets(arguments.folder, progress=True)
    text = f"{arguments.folder}: {len(dataset)} triplets, all sound"
    print_result(arguments, text, folder=arguments.folder, triplets=len(dataset))
