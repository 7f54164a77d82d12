"""The command line: rectified-diffusers generate | triplets | reflow | distill.

Each command is one call of a public function, and its options are the fields of that function's config. torch and
diffusers are imported by the commands that run, so that `--help` and mistakes in the arguments answer at once.

What the user can mend (a bad argument, a missing file or package, a value that a config refuses, a run that diverged)
ends in one line on stderr and exit code 2; `--debug` adds the traceback. Anything else is a bug and keeps it.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rectified_diffusers import __version__
from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.prompts import read_prompts
from rectified_diffusers.options import add_options, options_from
from rectified_diffusers.training.config import DistillConfig, ReflowConfig

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

PROG = "rectified-diffusers"
MAX_SEED = 2**63 - 1  # of torch.Generator.manual_seed


class CommandError(Exception):
    """A mistake in the arguments; its text is the line that the user reads."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 after an error of the user's, 130 after Ctrl-C."""
    arguments = argparse.Namespace(debug=False, resumable=False)
    try:
        arguments = build_parser().parse_args(argv)
        arguments.run(arguments)
    except (CommandError, ValueError, OSError, ImportError, FloatingPointError) as error:
        if arguments.debug:
            raise
        print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command to go on" if arguments.resumable else "\nstopped", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROG, description="Text-to-image in one step: draw pictures, and train models that can.")
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in (_add_generate, _add_triplets, _add_reflow, _add_distill):
        add(commands).add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


# ------------------------------------------------------------------------------------------------ generate


def _add_generate(commands: Any) -> argparse.ArgumentParser:
    text = "Draw pictures from prompts."
    parser = commands.add_parser("generate", help=text, description=text)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="What to draw; several make a contact sheet.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Picture file to write (required)")
    parser.add_argument("--model", help="Pipeline folder or Hub id (default: the bundled one-step emoji model)")
    parser.add_argument("--num-images", type=int, default=1, metavar="INT", help="Pictures per prompt (default: 1)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="INT", help="Picture i of every prompt has seed + i (default: 0)"
    )
    parser.add_argument("--steps", type=int, default=1, metavar="INT", help="Euler steps of the flow (default: 1)")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        metavar="NUMBER",
        help="Weight of the prompt; 1 is no guidance, as one-step models want it (default: 1)",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="What not to draw; needs a guidance scale above 1")
    parser.add_argument("--height", type=int, metavar="INT", help="In pixels (default: the model's)")
    parser.add_argument("--width", type=int, metavar="INT", help="In pixels (default: the model's)")
    parser.add_argument(
        "--columns",
        type=int,
        metavar="INT",
        help="Columns of the contact sheet (default: a row per prompt if each has several pictures, else a square)",
    )
    _add_device(parser)
    parser.set_defaults(run=run_generate, resumable=False)
    return parser


def run_generate(arguments: argparse.Namespace) -> None:
    """Draw `num_images` pictures of each prompt, one at a time, and write them to one file.

    One at a time, because a picture is then the same, bit for bit, whatever else the command draws; and memory does
    not grow with the number of pictures.
    """
    _check_generate(arguments)
    _check_picture_file(arguments.output)
    model = _bundled_checkpoint() if arguments.model is None else arguments.model
    pipeline = _load_pipeline(model, arguments.device, arguments.dtype)
    began = time.perf_counter()
    images = _draw(pipeline, arguments)
    seconds = time.perf_counter() - began
    per_row = arguments.num_images if len(arguments.prompts) > 1 and arguments.num_images > 1 else None
    columns = arguments.columns or per_row or math.ceil(math.sqrt(len(images)))
    picture = images[0] if len(images) == 1 else _contact_sheet(images, columns)
    picture.save(arguments.output)
    count = "1 picture" if len(images) == 1 else f"{len(images)} pictures"
    print(f"{arguments.output}: {count} in {seconds:.2f} s")


def _check_generate(arguments: argparse.Namespace) -> None:
    for prompt in arguments.prompts:
        if not prompt.strip():
            raise CommandError("a prompt is empty; say what to draw")
    for name in ("num_images", "steps", "height", "width", "columns"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise CommandError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if (arguments.height is None) != (arguments.width is None):  # diffusers would drop the one that is given
        raise CommandError("--height and --width go together; give both or neither")
    if not 0 <= arguments.seed <= MAX_SEED - arguments.num_images:
        raise CommandError(f"--seed must be between 0 and 2^63 - 1 less the number of pictures, got {arguments.seed}")
    if not 0 <= arguments.guidance_scale < math.inf:
        raise CommandError(f"--guidance-scale must be finite and not negative, got {arguments.guidance_scale}")
    if arguments.negative_prompt is not None and arguments.guidance_scale <= 1:
        raise CommandError("--negative-prompt has no effect without guidance; give --guidance-scale above 1")


def _check_picture_file(path: Path) -> None:
    """Find out before the work whether the picture can be written."""
    from PIL import Image

    if path.is_dir():
        raise CommandError(f"the output {str(path)!r} is a folder; give the name of a picture file")
    try:
        picture_format = Image.registered_extensions()[path.suffix.lower()]
        Image.new("RGB", (1, 1)).save(io.BytesIO(), format=picture_format)
    except (KeyError, OSError) as error:
        raise CommandError(
            f"cannot write a picture with the suffix {path.suffix!r} ({str(path)!r}); use .png, .jpg or .webp"
        ) from error
    if path.exists():
        with path.open("ab"):  # permission to write, without changing the file
            return
    _check_folder_is_writable(path.parent)


def _draw(pipeline: Any, arguments: argparse.Namespace) -> list[Image]:
    """Return the pictures, those of the first prompt first."""
    import torch
    from tqdm import tqdm

    jobs = [(prompt, index) for prompt in arguments.prompts for index in range(arguments.num_images)]
    pipeline.set_progress_bar_config(disable=len(jobs) > 1 or arguments.steps == 1)
    images = []
    for prompt, index in tqdm(jobs, unit="picture", disable=len(jobs) == 1):
        result = pipeline(
            prompt,
            negative_prompt=arguments.negative_prompt,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            height=arguments.height,
            width=arguments.width,
            # On the CPU: the same noise on every device.
            generator=torch.Generator().manual_seed(arguments.seed + index),
        )
        images.append(result.images[0])
    return images


def _contact_sheet(images: Sequence[Image], columns: int) -> Image:
    """Lay pictures of one size out in rows; the last row is filled up with white."""
    from diffusers.utils import make_image_grid
    from PIL import Image

    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    blank = Image.new("RGB", images[0].size, "white")
    return make_image_grid([*images, *[blank] * (rows * columns - len(images))], rows, columns)


# ------------------------------------------------------------------------------------------------ training


def _add_triplets(commands: Any) -> argparse.ArgumentParser:
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
    _add_device(parser)
    parser.set_defaults(run=run_triplets, resumable=True)
    return parser


def run_triplets(arguments: argparse.Namespace) -> None:
    config = options_from(arguments, TripletConfig)
    prompts = read_prompts(arguments.prompts)
    _check_output_dir(arguments.output_dir)
    teacher = _load_pipeline(arguments.teacher, arguments.device, arguments.dtype)
    from rectified_diffusers.data.triplets import generate_triplets

    dataset = generate_triplets(teacher, prompts, arguments.output_dir, config, progress=True)
    print(f"{arguments.output_dir}: {len(dataset)} triplets")


def _add_reflow(commands: Any) -> argparse.ArgumentParser:
    text = "Straighten the flow of a model on the triplets of its teacher: one round of reflow."
    return _add_training(commands, "reflow", text, ReflowConfig)


def _add_distill(commands: Any) -> argparse.ArgumentParser:
    text = "Distill a rectified flow into one step, on triplets that it drew itself."
    return _add_training(commands, "distill", text, DistillConfig)


def _add_training(commands: Any, name: str, text: str, config_class: type) -> argparse.ArgumentParser:
    epilog = f"On several processes: accelerate launch -m rectified_diffusers.cli {name} ..."
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog)
    parser.add_argument("--model", required=True, help="Pipeline folder or Hub id to start from (required)")
    parser.add_argument("--triplets", type=Path, required=True, help="Folder that `triplets` wrote (required)")
    add_options(parser, config_class)
    parser.set_defaults(run=run_training, resumable=True, config_class=config_class)
    return parser


def run_training(arguments: argparse.Namespace) -> None:
    config = options_from(arguments, arguments.config_class)
    if not arguments.triplets.is_dir():
        raise CommandError(f"no folder {str(arguments.triplets)!r}; make it with {PROG} triplets")
    _check_output_dir(config.output_dir)
    pipeline = _load_pipeline(arguments.model, "cpu", "float32")  # accelerate moves it to the device of its process
    from rectified_diffusers.data.triplets import TripletDataset
    from rectified_diffusers.training.distill import DistillTrainer
    from rectified_diffusers.training.reflow import ReflowTrainer

    trainer_class = {ReflowConfig: ReflowTrainer, DistillConfig: DistillTrainer}[arguments.config_class]
    try:
        trainer = trainer_class(pipeline, TripletDataset(arguments.triplets), config)
    except TypeError as error:  # a pipeline that the trainers do not know
        raise CommandError(str(error)) from error
    trainer.train()
    trainer.accelerator.print(f"{config.output_dir}: trained to step {config.max_steps}")


# ------------------------------------------------------------------------------------------------ shared


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps, or auto: the best there is (default: auto)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "float16", "bfloat16"],
        help="Precision; auto is float16 on CUDA and float32 elsewhere (default: auto)",
    )


def _check_output_dir(folder: Path) -> None:
    """Make the folder, and find out before the work whether it can be written to."""
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"the output {str(folder)!r} is a file; give the name of a folder")
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder_is_writable(folder)


def _check_folder_is_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise CommandError(f"the folder {str(folder)!r} of the output does not exist; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"cannot write to the folder {str(folder)!r}: {error.strerror}") from error


def _bundled_checkpoint() -> str:
    from rectified_diffusers import bundled_checkpoint

    return str(bundled_checkpoint())


def _load_pipeline(model: str, device: str, dtype: str) -> Any:
    """Load any diffusers pipeline, ours or not, from a folder or the Hub."""
    _check_model(model)
    resolved = _device(device)
    import diffusers

    from rectified_diffusers.registration import register

    register()
    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    dtype_argument = "dtype" if release >= (0, 40) else "torch_dtype"
    with _without_loading_bars():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(model, **{dtype_argument: _dtype(dtype, resolved)})
    return pipeline.to(resolved)


@contextmanager
def _without_loading_bars() -> Iterator[None]:
    """Hide the bars about a second of reading files; those of a download belong to huggingface_hub and stay."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in (diffusers_logging, transformers_logging):
            logging.enable_progress_bar()


def _check_model(model: str) -> None:
    """Tell a folder that is not there from a Hub id, before diffusers asks the Hub for either."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise CommandError(f"the folder {model!r} holds no model_index.json, so it is no saved pipeline")
        return
    # Of the form owner/name; but work/model, where a folder work is, means a folder.
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
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown, not compiled in, not there
        raise CommandError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


if __name__ == "__main__":
    sys.exit(main())
