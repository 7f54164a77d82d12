"""rectified-diffusers demo: serve the model on a web page."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectified_diffusers.cli.delta import parse_delta
from rectified_diffusers.cli.shared import (
    CommandError,
    ModelOptions,
    add_command,
    check_model,
    load_pipeline,
    print_result,
)
from rectified_diffusers.demo.requests import MAX_GUIDANCE, MAX_STEPS, PROMPTS, ImageRequest
from rectified_diffusers.options import flag, option

if TYPE_CHECKING:
    from rectified_diffusers.demo.studio import Studio
    from rectified_diffusers.demo.worker import LoadingStudio

WITHOUT_PASSWORD = "everyone who can reach this address can generate images and upload style files; see --auth"
WITHOUT_ENCRYPTION = "the password travels unencrypted, unless a server with HTTPS stands in front"


@dataclass(frozen=True, kw_only=True)
class DemoOptions(ModelOptions):
    teacher: str | None = option(
        None,
        "Model to compare with: the teacher of the model, or any other pipeline.",
        metavar="MODEL",
        type=expanduser,
    )
    teacher_steps: int = option(25, "Steps of the teacher.")
    teacher_guidance_scale: float = option(5.0, "Guidance scale of the teacher.")
    styles: tuple[str, ...] = option(
        (),
        "LoRA or weight delta, .safetensors, with the initial position of its slider if it is not 1; repeat the "
        "option for several.",
        flags=["--style"],
        action="append",
        nargs=None,
        metavar="FILE[=SCALE]",
        shown="none",
        type=expanduser,
    )
    controlnet: str | None = option(
        None, "ControlNet for edges, to generate images from sketches.", metavar="MODEL", type=expanduser
    )
    host: str = option("127.0.0.1", "Address to serve at; by default, only this machine can reach it.")
    port: int = option(7860, "Port to serve at.")
    allow_hosts: tuple[str, ...] = option(
        (),
        "Further name of the server that browsers may use, for example that of a reverse proxy; repeat the option for "
        "several.",
        flags=["--allow-host"],
        action="append",
        nargs=None,
        metavar="NAME",
        shown="none",
    )
    auth: str | None = option(
        None,
        "User name and password that visitors have to enter. Other users of this machine can read the command line: "
        "@FILE reads them from the first line of a file.",
        metavar="USER:PASSWORD",
    )
    open: bool = flag("Open the page in the browser.")

    def __post_init__(self) -> None:
        if importlib.util.find_spec("gradio") is None:
            raise CommandError('the page needs gradio: pip install "rectified_diffusers[demo]"')
        if not 0 <= self.port <= 65535:
            raise CommandError(f"--port must be from 1 to 65535, or 0 for a free one, got {self.port}")
        if not 1 <= self.teacher_steps <= MAX_STEPS:
            raise CommandError(f"--teacher-steps must be from 1 to {MAX_STEPS}, got {self.teacher_steps}")
        if not 0 <= self.teacher_guidance_scale <= MAX_GUIDANCE:
            given = self.teacher_guidance_scale
            raise CommandError(f"--teacher-guidance-scale must be from 0 to {MAX_GUIDANCE:g}, got {given}")


def add_to(commands: Any) -> None:
    text = "Serve a web page that generates images while you type."
    add_command(commands, "demo", run_demo, DemoOptions, help=text, epilog="Stop it with Ctrl-C.")


def run_demo(options: DemoOptions) -> None:
    """Serve the page until Ctrl-C, while another process loads the models and generates images."""
    styles = [_style(text) for text in options.styles]
    auth = None if options.auth is None else _credentials(options.auth)
    check_model(options.source)
    if options.teacher is not None:
        check_model(options.teacher)
    if options.controlnet is not None:
        check_model(options.controlnet, "config.json", "ControlNet")
    from rectified_diffusers.demo.requests import comparison_with
    from rectified_diffusers.demo.worker import LoadingStudio, StudioProcess

    with StudioProcess(partial(_load_studio, options, styles)) as process:
        comparison = comparison_with(
            options.teacher is not None, options.teacher_steps, options.teacher_guidance_scale
        )
        can_sketch = options.controlnet is not None
        studio = LoadingStudio(Path(options.source).name, comparison, process.studio, can_sketch=can_sketch)
        with _served(studio, styles, options, auth):
            process.studio.result()
            process.wait()


@contextmanager
def _served(
    studio: LoadingStudio, styles: list[tuple[Path, float]], options: DemoOptions, auth: tuple[str, str] | None
) -> Iterator[None]:
    from rectified_diffusers.demo.guard import LOOPBACK
    from rectified_diffusers.demo.page import build_page
    from rectified_diffusers.demo.server import launch, private_folder

    with private_folder():
        page = build_page(studio, styles)
        more = {"allowed_hosts": options.allow_hosts, "auth": auth}
        address = launch(page, options.host, options.port, open_browser=options.open, **more)
        try:
            print_result(options, f"{address}  (stop with Ctrl-C)", address=address)
            if options.host not in LOOPBACK:
                warning = WITHOUT_PASSWORD if auth is None else WITHOUT_ENCRYPTION
                print(f"warning: {warning}", file=sys.stderr, flush=True)
            yield
        finally:
            page.close(verbose=False)  # its message would not be JSON


def _load_studio(options: DemoOptions, styles: list[tuple[Path, float]]) -> Studio:
    """Load the models and generate once: errors show here, and the first visitor is spared the slow first run."""
    _be_quiet()
    pipeline = load_pipeline(options.source, options.device, options.dtype)
    from rectified_diffusers.demo.studio import Studio

    teacher = controlnet = None
    if options.teacher is not None:
        teacher = load_pipeline(options.teacher, options.device, options.dtype)
    if options.controlnet is not None:
        controlnet = _load_controlnet(options.controlnet, pipeline.dtype)
    studio = Studio(
        pipeline,
        teacher=teacher,
        teacher_steps=options.teacher_steps,
        teacher_guidance_scale=options.teacher_guidance_scale,
        controlnet=controlnet,
        own_name=Path(options.source).name,
    )
    studio.generate(ImageRequest(PROMPTS[0], styles=tuple(styles)))
    return studio


def _style(text: str) -> tuple[Path, float]:
    name, scale = parse_delta(text, "style")
    if not Path(name).is_file():
        raise CommandError(f"no style file {name!r}")
    if Path(name).suffix != ".safetensors":
        raise CommandError(f"a style is a .safetensors file, got {name!r}; others can run code when they are opened")
    return Path(name).resolve(), scale


def _credentials(text: str) -> tuple[str, str]:
    if text.startswith("@"):
        try:
            text = Path(text[1:]).expanduser().read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"--auth cannot read {text[1:]!r}: {error}") from error
    user, _, password = text.partition(":")
    if not user.strip() or not password:
        raise CommandError("--auth takes USER:PASSWORD, or @FILE with them in its first line")
    return user.strip(), password


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
