"""rectified-diffusers delta: compute the weight difference between a fine-tune and its base, and apply it."""

from __future__ import annotations

import argparse
from os.path import expanduser
from pathlib import Path
from typing import Any

from rectified_diffusers.cli.shared import (
    CommandError,
    add_json,
    check_folder_is_writable,
    check_output_dir,
    load_pipeline,
    print_result,
    without_bars_of_libraries,
)

MODELS = "Hub id or folder of a pipeline or of its U-Net, or a .safetensors file"
DTYPES = ["float32", "float16", "bfloat16"]


def add_delta(commands: Any) -> argparse.ArgumentParser:
    text = "Take the style of a fine-tune over into another model, as a difference of weights."
    parser = commands.add_parser("delta", help=text, description=text)
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    for add in (_add_make, _add_apply):
        # SUPPRESS: do not overwrite the value of --debug from `delta` itself, which has the same option.
        add(actions).add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="Show the traceback of an error."
        )
    return parser


def _add_make(actions: Any) -> argparse.ArgumentParser:
    text = "Write the difference fine-tune - base of two U-Nets; neither is loaded as a whole."
    parser = actions.add_parser("make", help=text, description=text)
    parser.add_argument("--fine-tune", type=expanduser, required=True, metavar="MODEL", help=f"{MODELS} (required)")
    parser.add_argument(
        "--base", type=expanduser, required=True, metavar="MODEL", help="What it was made from, likewise (required)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="File to write, .safetensors (required)"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="Of the file (default: float32)")
    add_json(parser)
    parser.set_defaults(run=run_make, resumable=False)
    return parser


def _add_apply(actions: Any) -> argparse.ArgumentParser:
    text = "Add differences or LyCORIS files to a pipeline, and save it as a new pipeline."
    parser = actions.add_parser("apply", help=text, description=text)
    parser.add_argument(
        "--model", type=expanduser, required=True, help="Pipeline folder or Hub id that they are added to (required)"
    )
    parser.add_argument(
        "--delta",
        type=expanduser,
        dest="deltas",
        action="append",
        required=True,
        metavar="DELTA[=SCALE]",
        help="File, folder or Hub id, and by how much, 1 if not given; repeat it for a sum (required)",
    )
    parser.add_argument("--variant", help="Variant of the deltas that are folders or on the Hub: PeRFlow's is v0-1")
    parser.add_argument(
        "--components-from",
        type=expanduser,
        metavar="MODEL",
        help="Pipeline folder or Hub id of the fine-tune, whose VAE and text encoder take the place of the model's",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="Folder for the new pipeline (required)"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="Of the new pipeline (default: float32)")
    add_json(parser)
    parser.set_defaults(run=run_apply, resumable=False)
    return parser


def run_make(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    if output.suffix != ".safetensors" or output.is_dir():
        raise CommandError(f"the output {str(output)!r} must be a file that ends in .safetensors")
    check_folder_is_writable(output.parent)
    from rectified_diffusers.weights.delta import compute_weight_delta

    delta = compute_weight_delta(arguments.fine_tune, arguments.base, output, dtype=arguments.dtype)
    fine_tune, base, count = delta.metadata["fine_tune"], delta.metadata["base"], len(delta.weights.shapes)
    text = f"{output}: {fine_tune} - {base}, {count} weights"
    print_result(arguments, text, output=output, fine_tune=fine_tune, base=base, weights=count)


def run_apply(arguments: argparse.Namespace) -> None:
    named = [parse_delta(text) for text in arguments.deltas]
    if (arguments.output / "model_index.json").exists():
        raise CommandError(f"the folder {str(arguments.output)!r} holds a pipeline already; give a new one")
    check_output_dir(arguments.output)
    from rectified_diffusers.loading.saving import save_pipeline
    from rectified_diffusers.weights.components import swap_components
    from rectified_diffusers.weights.delta import apply_weight_delta, load_weight_delta

    deltas = [
        load_weight_delta(name, variant=None if Path(name).is_file() else arguments.variant) for name, _ in named
    ]
    pipeline = load_pipeline(arguments.model, "cpu", arguments.dtype)
    apply_weight_delta(pipeline, deltas, [scale for _, scale in named], keep_undo=False)
    if arguments.components_from is not None:
        swap_components(pipeline, arguments.components_from)
    with without_bars_of_libraries():
        save_pipeline(pipeline, arguments.output)
    text = f"{arguments.output}: {arguments.model} with {len(deltas)} delta{'s' if len(deltas) > 1 else ''}"
    print_result(arguments, text, output=arguments.output, model=arguments.model, deltas=len(deltas))


def parse_delta(text: str, what: str = "delta") -> tuple[str, float]:
    """Split DELTA=SCALE; the scale is 1 if it is missing or if the complete text names a file or folder."""
    name, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        return name, float(scale)
    except ValueError as error:
        raise CommandError(f"the scale of a {what} must be a number, got {scale!r} in {text!r}") from error
