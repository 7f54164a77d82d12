"""What makes two runs the same: the options and the starting model that a checkpoint records."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rectified_diffusers.training.config import ProgressiveConfig, TrainerConfig

STARTING_MODEL = "starting_model"
"""Entry of the record: digests of the parts of the starting model."""
QUANTIZATION = "quantization"
"""Entry of the record of a LoRA on a quantized base."""
FREE_OPTIONS = frozenset(
    {
        "output_dir",
        "max_steps",
        "micro_batch_size",
        "num_workers",
        "gradient_checkpointing",
        "compile",
        "lpips_weights",
        "save_every_steps",
        "keep_checkpoints",
        "validate_every_steps",
        "validation_prompts",
        "validation_guidance_scale",
        "log_every_steps",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "straightness_paths",
    }
)
"""Options that may change when a run is resumed: they affect neither the loss nor the trajectory of the weights."""


def config_to_json(config: TrainerConfig) -> dict[str, Any]:
    """Return the options that a checkpoint records: all except those for the machine and for monitoring the run."""
    options = {name: value for name, value in asdict(config).items() if name not in FREE_OPTIONS}
    if isinstance(config, ProgressiveConfig):
        del options["student_steps"]  # the number of rounds, which is as free as max_steps
    elif config.lr_schedule != "constant_with_warmup":
        options["max_steps"] = config.max_steps  # linear and cosine schedules reach 0 there
    return json.loads(json.dumps(options))


def recorded_options(run: Mapping[str, Any], config: TrainerConfig) -> dict[str, Any]:
    """Return a recorded run with default values for missing options, such as those of a run by an earlier release."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    known = {name: value for name, value in defaults.items() if name in config_to_json(config)}
    return {**json.loads(json.dumps(known, default=str)), **run}


def require_same_run(expected: Mapping[str, Any], found: Mapping[str, Any], output_dir: Path) -> None:
    """Raise a `ValueError` that names the first entry in which a run differs from the run to resume."""
    for name in [*expected, *(name for name in found if name not in expected)]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{output_dir} holds a run with {name}={expected.get(name)!r}, got {name}={found.get(name)!r}. "
                "Give the same value to resume that run, or another output_dir to start a new one."
            )


def require_same_model(expected: Mapping[str, str], found: Mapping[str, str], output_dir: Path) -> None:
    """Raise a `ValueError` that names the part in which the starting model differs from that of the run to resume."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{output_dir} holds a run that started from a model with another {name}. Give that model to resume "
                "the run, or another output_dir to start a new one."
            )


def require_resumable(run: Mapping[str, Any], identity: Mapping[str, Any], config: TrainerConfig) -> None:
    """Raise a `ValueError` that names the difference unless a recorded run can be resumed as the run of `identity`."""
    recorded, output_dir = recorded_options(run, config), Path(config.output_dir)
    started = recorded.setdefault(STARTING_MODEL, identity[STARTING_MODEL])  # runs of preview releases lack it
    before, now = ({QUANTIZATION: run.get(QUANTIZATION)} for run in (recorded, identity))
    require_same_run(before, now, output_dir)  # before the weights, which differ with it
    require_same_model(started, identity[STARTING_MODEL], output_dir)
    require_same_run(recorded, identity, output_dir)
