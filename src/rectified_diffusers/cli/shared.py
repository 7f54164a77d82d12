"""Code shared by the commands: errors, and the loading and checking of models, folders and images.

torch and diffusers are imported inside the functions, because `--help` must not wait for them.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from rectified_diffusers.options import add_options, expanded_path, flag, option, options_from

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from typing_extensions import Self

PROG = "rectified-diffusers"
ON_PROCESSES = "On several processes: accelerate launch -m rectified_diffusers.cli COMMAND ..."
OUTPUT = ("-o", "--output")
_LOGGERS = (
    "transformers.utils.import_utils",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "torch.utils._pytree",
)
_NO_ADVICE = (
    "requires torchvision",
    "Unable to import `torchao` Tensor objects",
    "for integer quantization, but only bfloat16 is supported",
    "register_constant() on Enum subclasses",
)


class CommandError(Exception):
    """An error in the arguments; its text is the line that the user sees."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage message, and whose paths may begin with `~`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", Path, expanded_path)

    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


def check_image_file(path: Path) -> None:
    """Check, before any work, that the image can be written."""
    from PIL import Image

    check_is_no_folder(path)
    try:
        image_format = Image.registered_extensions()[path.suffix.lower()]
        Image.new("RGB", (1, 1)).save(io.BytesIO(), format=image_format)
    except (KeyError, OSError) as error:
        raise CommandError(
            f"cannot write an image with the suffix {path.suffix!r} ({str(path)!r}); use .png, .jpg or .webp"
        ) from error
    if path.exists():
        with path.open("ab"):  # checks write permission without changing the file
            return
    check_folder_is_writable(path.parent)


def check_is_no_folder(path: Path) -> None:
    if path.is_dir():
        raise CommandError(f"the output {str(path)!r} is a folder; give the name of a file")


def check_weights_file(path: Path) -> None:
    """Check, before any work, that the file can be written."""
    if path.suffix != ".safetensors" or path.is_dir():
        raise CommandError(f"the output {str(path)!r} must be a file whose name ends in .safetensors")
    check_folder_is_writable(path.parent)


def contact_sheet(images: Sequence[Image], columns: int) -> Image:
    """Return a sheet with rows of images of one size; the last row is padded with white."""
    from diffusers.utils import make_image_grid
    from PIL import Image

    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    blank = Image.new("RGB", images[0].size, "white")
    return make_image_grid([*images, *[blank] * (rows * columns - len(images))], rows, columns)


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """The options of every command. Checks of a command's options are in `__post_init__`, before any work."""

    json: bool = flag("Print each result as a line of JSON.")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(CommandOptions):
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto, the fastest that is available.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option(
        "auto", "Precision; auto is float16 on CUDA and float32 elsewhere."
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(DeviceOptions):
    model: str | None = option(
        None, "Pipeline folder or Hub id.", shown="the bundled one-step emoji model", type=expanduser
    )

    @property
    def source(self) -> str:
        """Return the folder or Hub id of the model."""
        from rectified_diffusers import bundled_checkpoint

        return str(bundled_checkpoint()) if self.model is None else self.model


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(ModelOptions):
    """Options of the commands that generate images from prompts."""

    prompts: tuple[str, ...] = option(
        MISSING,
        "What the images show; several prompts make a contact sheet.",
        flags=["prompts"],
        nargs="+",
        metavar="PROMPT",
    )
    steps: int | None = option(
        None, "Euler steps of the flow.", shown="1, or the steps that the model was distilled to"
    )
    guidance_scale: float = option(1.0, "Weight of the prompt; 1, for one-step models, is no guidance.")
    negative_prompt: str | None = option(
        None, "What the images must not show; needs a guidance scale above 1.", type=str
    )
    height: int | None = option(None, "In pixels.", shown="the model's")
    width: int | None = option(None, "In pixels.", shown="the model's")
    columns: int | None = option(None, "Columns of the contact sheet.", shown="a square sheet")

    def __post_init__(self) -> None:
        if not all(prompt.strip() for prompt in self.prompts):
            raise CommandError("a prompt is empty; describe an image")
        for name in ("steps", "height", "width", "columns", "num_images", "frames"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise CommandError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not 0 <= self.guidance_scale < math.inf:
            raise CommandError(f"--guidance-scale must be finite and not negative, got {self.guidance_scale}")
        if self.negative_prompt is not None and self.guidance_scale <= 1:
            raise CommandError("--negative-prompt has no effect without guidance; give --guidance-scale above 1")

    def with_steps_of(self, pipeline: Any) -> Self:
        """Return the options with a number of steps: that of the model, if none is given."""
        from rectified_diffusers.pipelines.scheduler import student_steps

        return self if self.steps is not None else replace(self, steps=student_steps(pipeline.scheduler))


def add_command(
    commands: Any,
    name: str,
    run: Callable[..., None],
    *options: type,
    help: str,
    epilog: str | None = None,
    resumable: bool = False,
) -> None:
    """Add a command whose arguments are the fields of dataclasses, of which `run` gets an instance each.

    Args:
        commands: the subparsers of the program.
        resumable: whether to run the same command again continues a run that was stopped.
    """
    parser = commands.add_parser(name, help=help, description=help, epilog=epilog)
    for config_class in options:
        add_options(parser, config_class)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="Show the traceback of an error."
    )
    parser.set_defaults(run=run, options=options, resumable=resumable)


def options_of(arguments: argparse.Namespace) -> list[Any]:
    """Return the dataclasses of a command with the parsed arguments; a preset's values take the place of defaults."""
    preset, presets = getattr(arguments, "preset", None), getattr(arguments.options[-1], "presets", {})
    values = argparse.Namespace(**{**(presets[preset] if preset else {}), **vars(arguments)})
    return [options_from(values, config_class) for config_class in arguments.options]


def print_result(options: CommandOptions, text: str, **facts: Any) -> None:
    """Print the result of a command: a line for people, or with --json the same as an object for programs.

    Args:
        facts: content of the line, by stable names: programs read them. Paths are written as text.
    """
    print(json.dumps(facts, default=str, ensure_ascii=False) if options.json else text, flush=True)


def check_output_dir(folder: Path) -> None:
    """Check, before any work, that a folder is writable or can be created. Nothing is created yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise CommandError(f"the output {str(existing)!r} is a file; give the name of a folder")
    check_folder_is_writable(existing)


def check_folder_is_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise CommandError(f"the folder {str(folder)!r} of the output does not exist; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"cannot write to the folder {str(folder)!r}: {error.strerror}") from error


def load_pipeline(model: str, device: str, dtype: str, quantized: tuple[Any, Any] | None = None) -> Any:
    """Load any diffusers pipeline, from this package or not, from a folder or the Hub.

    Args:
        quantized: quantization of its networks, and the precision of their computations: "no", "bf16" or "fp16".
    """
    check_model(model)
    announce(f"loading {model}")
    resolved = _device(device)
    for logger in _LOGGERS:
        logging.getLogger(logger).addFilter(_is_no_advice)
    from diffusers import DiffusionPipeline

    from rectified_diffusers.loading.errors import dtype_option, remedies
    from rectified_diffusers.loading.safety import refuse_foreign_code, require_components
    from rectified_diffusers.pipelines.registration import register

    register()
    refuse_foreign_code(model)
    require_components(model)
    with without_bars_of_libraries(), remedies(model):
        arguments: dict[str, Any] = dtype_option(_dtype(dtype, resolved))
        if quantized is not None:
            from rectified_diffusers.models.quantization import quantized_loading

            arguments["quantization_config"] = quantized_loading(model, *quantized)
        pipeline = DiffusionPipeline.from_pretrained(model, use_safetensors=True, **arguments)
    return pipeline.to(resolved)


def announce(phase: str) -> None:
    """Print the phase that begins, at a terminal: importing and loading models takes up to half a minute."""
    if sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{PROG}: {phase} ...", file=sys.stderr, flush=True)


def _is_no_advice(record: logging.LogRecord) -> bool:
    """Return whether a log record is worth a line.

    It is not if transformers advises to install torchvision, which no model needs; if diffusers does not know classes
    that newer releases of torchao lack; or if it asks for bfloat16, which no integer quantization needs.
    """
    return not any(part in record.getMessage() for part in _NO_ADVICE)


@contextmanager
def without_bars_of_libraries() -> Iterator[None]:
    """Hide progress bars for about a second of file reading or writing; huggingface_hub's download bars stay."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in (diffusers_logging, transformers_logging):
            library.enable_progress_bar()


def check_model(model: str, index: str = "model_index.json", kind: str = "pipeline") -> None:
    """Distinguish a missing folder from a Hub id, before diffusers looks up either on the Hub.

    Args:
        index: file that every folder of this kind has.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / index).is_file():
            raise CommandError(f"the folder {model!r} holds no {index}, so it is no saved {kind}")
        return
    # A Hub id has the form owner/name, but work/model means a folder if the folder work exists.
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not folder.parent.is_dir()
    if not is_hub_id:
        raise CommandError(f"no folder {model!r}, and it is no Hub id, which is owner/name")


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown, not compiled in or absent
        raise CommandError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    return getattr(torch, name)
