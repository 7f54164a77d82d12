"""rectified-diffusers export: convert a model for programs that do not know this package."""

from __future__ import annotations

import argparse
from os.path import expanduser
from pathlib import Path
from typing import Any

from rectified_diffusers.cli.shared import (
    CommandError,
    add_device,
    add_json,
    check_folder_is_writable,
    check_output_dir,
    load_pipeline,
    print_result,
    without_bars_of_libraries,
)


def add_export(commands: Any) -> argparse.ArgumentParser:
    text = "Save a model for programs that do not know this package."
    parser = commands.add_parser("export", help=text, description=text)
    parser.add_argument(
        "format",
        choices=["onnx", "diffusers", "comfyui", "ldm"],
        help="onnx: text encoder, U-Net and VAE decoder as graphs for onnxruntime. diffusers: a stock pipeline with a "
        "stock flow scheduler, the velocity's sign folded into the U-Net. comfyui: the U-Net in one file of the "
        "original layout, the sign folded, for ComfyUI. ldm: the same as it is",
    )
    parser.add_argument("--model", type=expanduser, required=True, help="Pipeline folder or Hub id (required)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="Folder to write; a .safetensors file for comfyui and ldm (required)",
    )
    parser.add_argument("--scheduler", choices=["unipc", "dpm_solver++"], help="Of format diffusers (default: unipc)")
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run_export, resumable=False)
    return parser


def run_export(arguments: argparse.Namespace) -> None:
    to, is_file = arguments.format, arguments.format in ("comfyui", "ldm")
    if to != "diffusers" and arguments.scheduler is not None:
        raise CommandError(f"--scheduler is of the format diffusers; an export to {to} has no solver in it")
    if is_file:
        _check_weights_file(arguments.output)
    else:
        check_output_dir(arguments.output)
    pipeline = load_pipeline(arguments.model, arguments.device, arguments.dtype)
    from rectified_diffusers.export.onnx import export_onnx
    from rectified_diffusers.export.original_layout import export_unet
    from rectified_diffusers.export.stock import export_diffusers

    if is_file:
        export_unet(pipeline, arguments.output, arguments.format)
    elif to == "onnx":
        export_onnx(pipeline, arguments.output)
    else:
        with without_bars_of_libraries():
            export_diffusers(pipeline, arguments.output, arguments.scheduler or "unipc")
    print_result(arguments, f"{arguments.output}: exported as {to}", output=arguments.output, format=to)


def _check_weights_file(path: Path) -> None:
    """Check, before any work, that the file can be written."""
    if path.suffix != ".safetensors" or path.is_dir():
        raise CommandError(f"the output {str(path)!r} must be a file whose name ends in .safetensors")
    check_folder_is_writable(path.parent)
