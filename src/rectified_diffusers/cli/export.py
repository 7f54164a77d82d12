"""rectified-diffusers export: a model for programs that do not know this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rectified_diffusers.cli.shared import CommandError, add_device, check_output_dir, load_pipeline


def add_export(commands: Any) -> argparse.ArgumentParser:
    text = "Save a model for programs that do not know this package."
    parser = commands.add_parser("export", help=text, description=text)
    parser.add_argument(
        "format",
        choices=["onnx", "diffusers"],
        help="onnx: text encoder, U-Net and VAE decoder as graphs for onnxruntime. diffusers: a stock pipeline with a "
        "stock flow scheduler, the velocity's sign folded into the U-Net",
    )
    parser.add_argument("--model", required=True, help="Pipeline folder or Hub id (required)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Folder to write (required)")
    parser.add_argument("--scheduler", choices=["unipc", "dpm_solver++"], help="Of format diffusers (default: unipc)")
    add_device(parser)
    parser.set_defaults(run=run_export, resumable=False)
    return parser


def run_export(arguments: argparse.Namespace) -> None:
    if arguments.format == "onnx" and arguments.scheduler is not None:
        raise CommandError("--scheduler is of the format diffusers; an ONNX export has no solver in it")
    check_output_dir(arguments.output)
    pipeline = load_pipeline(arguments.model, arguments.device, arguments.dtype)
    from rectified_diffusers.export import export_diffusers, export_onnx

    if arguments.format == "onnx":
        export_onnx(pipeline, arguments.output)
    else:
        export_diffusers(pipeline, arguments.output, arguments.scheduler or "unipc")
    print(f"{arguments.output}: exported as {arguments.format}")
