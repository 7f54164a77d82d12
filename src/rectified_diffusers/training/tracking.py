"""Trackers supported by accelerate, tensorboard and wandb: they also get the log lines and validation images."""

import dataclasses
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from rectified_diffusers.training.config import TrainerConfig

PROJECT = "rectified-diffusers"
FOLDER = "trackers"


def tracker_arguments(config: TrainerConfig) -> dict[str, Any]:
    """Return the tracker arguments of an `Accelerator`; raise if the package is missing, which accelerate ignores."""
    if config.report_to == "none":
        return {}
    if find_spec(config.report_to) is None:
        raise ImportError(
            f'report_to="{config.report_to}" needs the package {config.report_to}: pip install {config.report_to}. '
            "Without it, log.jsonl and the folder validation hold the same."
        )
    return {"log_with": config.report_to, "project_dir": str(Path(config.output_dir) / FOLDER)}


def start_trackers(accelerator: Accelerator, config: TrainerConfig, step: int) -> None:
    """Start the tracker after `step`; a resumed run continues as the same run, with no step counted twice.

    tensorboard hides what an earlier process wrote about later steps. wandb keeps it and ignores the repeated steps;
    its run is identified by a name stored in `output_dir/trackers`.
    """
    if config.report_to == "none":
        return
    start: dict[str, Any] = {"tensorboard": {"purge_step": step + 1}}
    if config.report_to == "wandb" and accelerator.is_main_process:
        folder = Path(config.output_dir) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / "wandb-run"
        if not name.exists():
            name.write_text(secrets.token_hex(8))
        start = {"wandb": {"id": name.read_text(), "resume": "allow", "dir": str(folder)}}
    accelerator.init_trackers(PROJECT, config=None if step else _options(config), init_kwargs=start)


def report_image(accelerator: Accelerator, path: Path, step: int) -> None:
    """Send a grid of validation images to the tracker."""
    if not accelerator.trackers:
        return
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3), uint8
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"validation": pixels}, step=step, **layout)


def _options(config: TrainerConfig) -> dict[str, Any]:
    """Return the options in the types that trackers accept: numbers and strings, with tuples as strings."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    plain = (bool, int, float, str)
    return {name: value if isinstance(value, plain) else str(value) for name, value in options.items()}
