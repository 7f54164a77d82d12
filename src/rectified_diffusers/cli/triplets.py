"""rectified-diffusers triplets: what reflow and distillation train on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rectified_diffusers.cli.shared import add_device, check_output_dir, load_pipeline
from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.prompts import read_prompts
from rectified_diffusers.options import add_options, options_from


def add_triplets(commands: Any) -> argparse.ArgumentParser:
    text = "Let a teacher draw the (prompt, noise, data) triplets that reflow and distill train on."
    parser = commands.add_parser("triplets", help=text, description=text)
    parser.add_argument("--teacher", required=True, help="Pipeline folder or Hub id of the teacher (required)")
    parser.add_argument(
        "--prompts", type=Path, required=True, help=".txt with one prompt a line, or .jsonl (required)"
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="Folder for the shards; whole ones are kept (required)"
    )
    add_options(parser, TripletConfig)
    add_device(parser)
    parser.set_defaults(run=run_triplets, resumable=True)
    return parser


def run_triplets(arguments: argparse.Namespace) -> None:
    config = options_from(arguments, TripletConfig)
    prompts = read_prompts(arguments.prompts)
    check_output_dir(arguments.output_dir)
    teacher = load_pipeline(arguments.teacher, arguments.device, arguments.dtype)
    from rectified_diffusers.data.triplets import generate_triplets

    dataset = generate_triplets(teacher, prompts, arguments.output_dir, config, progress=True)
    print(f"{arguments.output_dir}: {len(dataset)} triplets")
