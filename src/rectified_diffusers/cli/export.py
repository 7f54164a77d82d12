"""rectified-diffusers export: convert a model for programs that do not know this package."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal

from rectified_diffusers.cli.shared import (
    OUTPUT,
    CommandError,
    DeviceOptions,
    add_command,
    check_output_dir,
    check_weights_file,
    load_pipeline,
    print_result,
    without_bars_of_libraries,
)
from rectified_diffusers.options import option


@dataclass(frozen=True, kw_only=True)
class ExportOptions(DeviceOptions):
    format: Literal["onnx", "diffusers", "comfyui", "ldm"] = option(
        MISSING,
        "onnx: text encoder, U-Net and VAE decoder as graphs for onnxruntime. diffusers: a stock pipeline with a "
        "stock flow scheduler, the velocity's sign folded into the U-Net. comfyui: the U-Net in one file of the "
        "original layout, the sign folded, for ComfyUI. ldm: the same with the original sign.",
        flags=["format"],
        metavar=None,
    )
    model: str = option(MISSING, "Pipeline folder or Hub id.", type=expanduser)
    output: Path = option(MISSING, "Folder to write; a .safetensors file for comfyui and ldm.", flags=OUTPUT)
    scheduler: Literal["unipc", "dpm_solver++"] | None = option(
        None, "Solver that a diffusers export names.", shown="unipc"
    )
    solver_order: int | None = option(
        None, "Order of that solver. 1 is the Euler method, as in our pipelines; 2 suits a curved flow.", shown="1"
    )

    def __post_init__(self) -> None:
        for flag, value in (("--scheduler", self.scheduler), ("--solver-order", self.solver_order)):
            if self.format != "diffusers" and value is not None:
                raise CommandError(f"{flag} is for the format diffusers; an export to {self.format} has no solver")


def add_to(commands: Any) -> None:
    text = "Save a model for programs that do not know this package."
    add_command(commands, "export", run_export, ExportOptions, help=text)


def run_export(options: ExportOptions) -> None:
    to, output = options.format, options.output
    if to in ("comfyui", "ldm"):
        check_weights_file(output)
    else:
        check_output_dir(output)
    pipeline = load_pipeline(options.model, options.device, options.dtype)
    from rectified_diffusers.export.onnx import export_onnx
    from rectified_diffusers.export.original_layout import export_unet
    from rectified_diffusers.export.stock import export_diffusers

    if to == "onnx":
        export_onnx(pipeline, output)
    elif to == "diffusers":
        with without_bars_of_libraries():
            order = 1 if options.solver_order is None else options.solver_order
            export_diffusers(pipeline, output, options.scheduler or "unipc", order)
    else:
        export_unet(pipeline, output, to)
    print_result(options, f"{output}: exported as {to}", output=output, format=to)
