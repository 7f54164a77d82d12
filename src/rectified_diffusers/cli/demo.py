"""rectified-diffusers demo: serve the model on a web page."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectified_diffusers.cli.delta import parse_delta
from rectified_diffusers.cli.shared import (
    CommandError,
    add_device,
    add_json,
    check_model,
    default_model,
    load_pipeline,
    print_result,
)
from rectified_diffusers.demo.requests import MAX_GUIDANCE, MAX_STEPS, PROMPTS, Order

if TYPE_CHECKING:
    from rectified_diffusers.demo.studio import Studio
    from rectified_diffusers.demo.worker import ComingStudio

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_demo(commands: Any) -> argparse.ArgumentParser:
    text = "Serve a web page that draws as you type."
    parser = commands.add_parser("demo", help=text, description=text, epilog="Ctrl-C ends it.")
    parser.add_argument(
        "--model", type=expanduser, help="Pipeline folder or Hub id (default: the bundled one-step emoji model)"
    )
    parser.add_argument(
        "--teacher",
        type=expanduser,
        metavar="MODEL",
        help="What it is compared with: the pipeline that it learnt from, or any other",
    )
    parser.add_argument("--teacher-steps", type=int, default=25, metavar="INT", help="Of the teacher (default: 25)")
    parser.add_argument(
        "--teacher-guidance-scale", type=float, default=5.0, metavar="NUMBER", help="Of the teacher (default: 5)"
    )
    parser.add_argument(
        "--style",
        type=expanduser,
        dest="styles",
        action="append",
        default=[],
        metavar="FILE[=SCALE]",
        help="LoRA or weight delta, .safetensors, and where its slider begins, 1 if not given; repeat it for more",
    )
    parser.add_argument(
        "--controlnet", type=expanduser, metavar="MODEL", help="ControlNet for edges, to draw along sketches"
    )
    parser.add_argument("--host", default="127.0.0.1", help="Address to serve at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, metavar="INT", help="To serve at (default: 7860)")
    parser.add_argument("--open", action="store_true", help="Open it in the browser")
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run_demo, resumable=False)
    return parser


def run_demo(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C, while another process loads the models and generates images."""
    styles = [_style(text) for text in arguments.styles]
    _check(arguments)
    model = default_model() if arguments.model is None else arguments.model
    check_model(model)
    if arguments.teacher is not None:
        check_model(arguments.teacher)
    if arguments.controlnet is not None:
        check_model(arguments.controlnet, "config.json", "ControlNet")
    from rectified_diffusers.demo.worker import StudioProcess

    with StudioProcess(partial(_studio, model, styles, arguments)) as drawing:
        from rectified_diffusers.demo.requests import comparison_with
        from rectified_diffusers.demo.worker import ComingStudio

        teacher = arguments.teacher is not None
        beside = comparison_with(teacher, arguments.teacher_steps, arguments.teacher_guidance_scale)
        studio = ComingStudio(Path(model).name, beside, drawing.studio, can_sketch=arguments.controlnet is not None)
        with _served(studio, styles, arguments):
            drawing.studio.result()
            drawing.wait()


@contextmanager
def _served(studio: ComingStudio, styles: list[tuple[Path, float]], arguments: argparse.Namespace) -> Iterator[None]:
    from rectified_diffusers.demo.page import build_page
    from rectified_diffusers.demo.server import launch

    page = build_page(studio, styles)
    address = launch(page, arguments.host, arguments.port, open_browser=arguments.open)
    try:
        print_result(arguments, f"{address}  (Ctrl-C ends it)", address=address)
        if arguments.host not in LOOPBACK:
            warning = "everyone who can reach this address can draw, and upload files of styles"
            print(warning, file=sys.stderr, flush=True)
        yield
    finally:
        page.close(verbose=False)  # its message would not be JSON


def _studio(model: str, styles: list[tuple[Path, float]], arguments: argparse.Namespace) -> Studio:
    """Load the models and generate once: errors show here, and the first visitor is spared the slow first run."""
    _be_quiet()
    pipeline = load_pipeline(model, arguments.device, arguments.dtype)
    from rectified_diffusers.demo.studio import Studio

    teacher = controlnet = None
    if arguments.teacher is not None:
        teacher = load_pipeline(arguments.teacher, arguments.device, arguments.dtype)
    if arguments.controlnet is not None:
        controlnet = _load_controlnet(arguments.controlnet, pipeline.dtype)
    studio = Studio(
        pipeline,
        teacher=teacher,
        teacher_steps=arguments.teacher_steps,
        teacher_guidance_scale=arguments.teacher_guidance_scale,
        controlnet=controlnet,
        own_name=Path(model).name,
    )
    studio.draw(Order(PROMPTS[0], styles=tuple(styles)))
    return studio


def _check(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise CommandError('the page needs gradio: pip install "rectified_diffusers[demo]"')
    if not 0 <= arguments.port <= 65535:
        raise CommandError(f"--port must be from 1 to 65535, or 0 for a free one, got {arguments.port}")
    if not 1 <= arguments.teacher_steps <= MAX_STEPS:
        raise CommandError(f"--teacher-steps must be from 1 to {MAX_STEPS}, got {arguments.teacher_steps}")
    if not 0 <= arguments.teacher_guidance_scale <= MAX_GUIDANCE:
        given = arguments.teacher_guidance_scale
        raise CommandError(f"--teacher-guidance-scale must be from 0 to {MAX_GUIDANCE:g}, got {given}")


def _style(text: str) -> tuple[Path, float]:
    name, scale = parse_delta(text, "style")
    if not Path(name).is_file():
        raise CommandError(f"no file {name!r} of a style")
    if Path(name).suffix != ".safetensors":
        raise CommandError(f"a style is a .safetensors file, got {name!r}; others can run code when they are opened")
    return Path(name).resolve(), scale


def _load_controlnet(name: str, dtype: Any) -> Any:
    from diffusers import ControlNetModel

    from rectified_diffusers.loading.errors import dtype_option, remedies

    with remedies(name):
        return ControlNetModel.from_pretrained(name, use_safetensors=True, **dtype_option(dtype))


def _be_quiet() -> None:
    """Hide what diffusers and transformers log for each image, such as a truncated prompt: the page shows it."""
    from diffusers.utils import logging as diffusers_logging
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
    tqdm.set_lock(threading.RLock())  # the default lock is shared between processes and warns if this one is killed
