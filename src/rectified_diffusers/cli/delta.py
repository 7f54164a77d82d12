"""rectified-diffusers delta: compute the weight difference between a fine-tune and its base, and apply it."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal

from rectified_diffusers.cli.shared import (
    OUTPUT,
    CommandError,
    CommandOptions,
    add_command,
    check_output_dir,
    check_weights_file,
    load_pipeline,
    print_result,
    without_bars_of_libraries,
)
from rectified_diffusers.options import option

WEIGHTS = "Hub id or folder of a pipeline or of its U-Net, or a .safetensors file"
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class MakeOptions(CommandOptions):
    fine_tune: str = option(MISSING, f"The fine-tuned model: {WEIGHTS}.", metavar="MODEL", type=expanduser)
    base: str = option(MISSING, f"The model that it was fine-tuned from: {WEIGHTS}.", metavar="MODEL", type=expanduser)
    output: Path = option(MISSING, "File to write, .safetensors.", flags=OUTPUT, metavar="FILE")
    dtype: Dtype = option("float32", "Precision of the file.")


@dataclass(frozen=True, kw_only=True)
class ApplyOptions(CommandOptions):
    model: str = option(
        MISSING, "Pipeline folder or Hub id of the model to which the deltas are added.", type=expanduser
    )
    deltas: tuple[str, ...] = option(
        MISSING,
        "File, folder or Hub id, with a scale if it is not 1; repeat the option to add several.",
        flags=["--delta"],
        action="append",
        nargs=None,
        metavar="DELTA[=SCALE]",
        type=expanduser,
    )
    variant: str | None = option(None, "Variant of the deltas that are folders or on the Hub: PeRFlow's is v0-1.")
    components_from: str | None = option(
        None,
        "Pipeline folder or Hub id of the fine-tune, whose VAE and text encoder replace the model's.",
        metavar="MODEL",
        type=expanduser,
    )
    output: Path = option(MISSING, "Folder for the new pipeline.", flags=OUTPUT, metavar="DIR")
    dtype: Dtype = option("float32", "Precision of the new pipeline.")


def add_to(commands: Any) -> None:
    text = "Transfer a fine-tune to another model, as a difference of weights."
    parser = commands.add_parser("delta", help=text, description=text)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="Show the traceback of an error."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    make = "Write the difference fine-tune - base of two U-Nets, without loading either completely."
    add_command(actions, "make", run_make, MakeOptions, help=make)
    apply = "Add weight deltas or LyCORIS files to a pipeline, and save it as a new pipeline."
    add_command(actions, "apply", run_apply, ApplyOptions, help=apply)


def run_make(options: MakeOptions) -> None:
    check_weights_file(options.output)
    from rectified_diffusers.weights.delta import compute_weight_delta

    delta = compute_weight_delta(options.fine_tune, options.base, options.output, dtype=options.dtype)
    fine_tune, base, count = delta.metadata["fine_tune"], delta.metadata["base"], len(delta.weights.shapes)
    text = f"{options.output}: {fine_tune} - {base}, {count} weights"
    print_result(options, text, output=options.output, fine_tune=fine_tune, base=base, weights=count)


def run_apply(options: ApplyOptions) -> None:
    named, output = [parse_delta(text) for text in options.deltas], options.output
    if (output / "model_index.json").exists():
        raise CommandError(f"the folder {str(output)!r} already holds a pipeline; give a new one")
    check_output_dir(output)
    from rectified_diffusers.loading.saving import save_pipeline
    from rectified_diffusers.weights.components import swap_components
    from rectified_diffusers.weights.delta import apply_weight_delta, load_weight_delta

    deltas = [load_weight_delta(name, variant=None if Path(name).is_file() else options.variant) for name, _ in named]
    pipeline = load_pipeline(options.model, "cpu", options.dtype)
    apply_weight_delta(pipeline, deltas, [scale for _, scale in named], keep_undo=False)
    if options.components_from is not None:
        swap_components(pipeline, options.components_from)
    with without_bars_of_libraries():
        save_pipeline(pipeline, output)
    text = f"{output}: {options.model} with {len(deltas)} delta{'s' if len(deltas) > 1 else ''}"
    print_result(options, text, output=output, model=options.model, deltas=len(deltas))


def parse_delta(text: str, what: str = "delta") -> tuple[str, float]:
    """Split DELTA=SCALE; the scale is 1 if it is missing or if the complete text names a file or folder."""
    name, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        return name, float(scale)
    except ValueError as error:
        raise CommandError(f"the scale of a {what} must be a number, got {scale!r} in {text!r}") from error
