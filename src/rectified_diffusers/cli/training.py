"""rectified-diffusers reflow, distill, progressive and dmd: run a trainer with its config as options."""

from __future__ import annotations

import argparse
from os.path import expanduser
from pathlib import Path
from typing import Any

from rectified_diffusers.cli.shared import (
    PROG,
    CommandError,
    add_json,
    check_output_dir,
    load_pipeline,
    print_result,
    without_bars_of_libraries,
)
from rectified_diffusers.options import add_options, options_from
from rectified_diffusers.training.config import (
    DistillConfig,
    DistributionMatchingConfig,
    ProgressiveConfig,
    ReflowConfig,
    TrainerConfig,
)


def add_reflow(commands: Any) -> argparse.ArgumentParser:
    text = "Straighten the flow of a model on the triplets of its teacher: one round of reflow."
    return _add_training(commands, "reflow", text, ReflowConfig)


def add_distill(commands: Any) -> argparse.ArgumentParser:
    text = "Distill a rectified flow into one step, or a few, on triplets that it drew itself."
    return _add_training(commands, "distill", text, DistillConfig)


def add_progressive(commands: Any) -> argparse.ArgumentParser:
    text = "Distill a flow by halving its steps again and again: the baseline that InstaFlow is compared with."
    return _add_training(commands, "progressive", text, ProgressiveConfig)


def add_dmd(commands: Any) -> argparse.ArgumentParser:
    text = (
        "Finish a model of one step, or a few, by distribution matching (DMD2): its pictures become like the "
        "teacher's as a whole, not each like the one that the teacher draws from the same noise."
    )
    parser = _add_training(commands, "dmd", text, DistributionMatchingConfig)
    parser.add_argument(
        "--teacher",
        type=expanduser,
        required=True,
        help="Pipeline folder or Hub id of a diffusion model, or of a flow that was not reflowed (required)",
    )
    parser.add_argument(
        "--real-triplets",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="Folder that `real-triplets` wrote, or several: with DMD2's discriminator, which compares the student's "
        "pictures with these (default: without)",
    )
    return parser


def _add_training(commands: Any, name: str, text: str, config_class: type[TrainerConfig]) -> argparse.ArgumentParser:
    epilog = f"On several processes: accelerate launch -m rectified_diffusers.cli {name} ..."
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog)
    parser.add_argument(
        "--model", type=expanduser, required=True, help="Pipeline folder or Hub id to start from (required)"
    )
    parser.add_argument(
        "--triplets",
        type=Path,
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="Folder that `triplets` or `real-triplets` wrote, or several: each counts by its triplets (required)",
    )
    if config_class.presets:
        parser.add_argument(
            "--preset",
            choices=list(config_class.presets),
            help="Other defaults, over which the options below win: instaflow has the paper's values, modern those "
            "of the later literature that won in our ablation (default: none)",
        )
    add_options(parser, config_class)
    add_json(parser)
    parser.set_defaults(run=run_training, resumable=True, config_class=config_class)
    return parser


def run_training(arguments: argparse.Namespace) -> None:
    config = options_from(_with_preset(arguments), arguments.config_class)
    real = getattr(arguments, "real_triplets", None) or []
    for command, folders in (("triplets", arguments.triplets), ("real-triplets", real)):
        for folder in folders:
            if not folder.is_dir():
                raise CommandError(f"no folder {str(folder)!r}; make it with {PROG} {command}")
    check_output_dir(config.output_dir)
    pipeline = load_pipeline(arguments.model, "cpu", "float32")  # accelerate moves it to the device of each process
    from rectified_diffusers.data.dataset import open_triplets
    from rectified_diffusers.training.distill import DistillTrainer
    from rectified_diffusers.training.dmd import DistributionMatchingTrainer
    from rectified_diffusers.training.progressive import ProgressiveTrainer
    from rectified_diffusers.training.reflow import ReflowTrainer

    trainers: dict[Any, Any] = {
        ReflowConfig: ReflowTrainer,
        DistillConfig: DistillTrainer,
        ProgressiveConfig: ProgressiveTrainer,
        DistributionMatchingConfig: DistributionMatchingTrainer,
    }
    own: dict[str, Any] = {}
    if "teacher" in arguments:
        own["teacher"] = load_pipeline(arguments.teacher, "cpu", "float32")
        own["real_data"] = open_triplets(real) if real else None
    try:
        trainer = trainers[arguments.config_class](pipeline, open_triplets(arguments.triplets), config, **own)
    except TypeError as error:  # a pipeline that the trainers do not support
        raise CommandError(str(error)) from error
    with without_bars_of_libraries():
        trainer.train()
    if trainer.accelerator.is_main_process:
        text = f"{config.output_dir}: trained to step {config.max_steps}"
        print_result(arguments, text, output_dir=config.output_dir, step=config.max_steps)


def _with_preset(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments, with the preset's values for options that were not given."""
    presets, name = arguments.config_class.presets, getattr(arguments, "preset", None)
    return argparse.Namespace(**{**(presets[name] if name else {}), **vars(arguments)})
