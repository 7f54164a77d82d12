"""rectified-diffusers reflow, distill, progressive and dmd: run a trainer with its config as options."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal

from rectified_diffusers.cli.shared import (
    ON_PROCESSES,
    PROG,
    CommandError,
    CommandOptions,
    add_command,
    check_output_dir,
    load_pipeline,
    print_result,
    without_bars_of_libraries,
)
from rectified_diffusers.options import option
from rectified_diffusers.training.config import (
    DistillConfig,
    DistributionMatchingConfig,
    PresetName,
    ProgressiveConfig,
    ReflowConfig,
)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(CommandOptions):
    model: str = option(MISSING, "Pipeline folder or Hub id to start from.", type=expanduser)
    quantize: Literal["int8", "nf4"] | None = option(
        None,
        "Quantize the frozen base of a LoRA, for less memory: int8 (torchao) or, on a GPU, nf4 (bitsandbytes). The "
        "result is only the LoRA.",
    )
    triplets: tuple[Path, ...] = option(
        MISSING,
        "Folder that `triplets` or `real-triplets` wrote, or several, each weighted by its number of triplets.",
        nargs="+",
        metavar="FOLDER",
    )


@dataclass(frozen=True, kw_only=True)
class PresetOptions(TrainingOptions):
    preset: PresetName | None = option(
        None,
        "Other defaults, which the options below override: instaflow has the paper's values, modern has values of "
        "later papers that performed best in our ablation.",
    )


@dataclass(frozen=True, kw_only=True)
class DmdOptions(TrainingOptions):
    teacher: str = option(
        MISSING, "Pipeline folder or Hub id of a diffusion model, or of a flow without reflow.", type=expanduser
    )
    real_triplets: tuple[Path, ...] = option(
        (),
        "Folder that `real-triplets` wrote, or several: adds DMD2's discriminator, which compares the student's "
        "images with these.",
        nargs="+",
        metavar="FOLDER",
        shown="no discriminator",
    )


def add_to(commands: Any) -> None:
    for name, options, config_class, text in (
        (
            "reflow",
            PresetOptions,
            ReflowConfig,
            "Straighten the flow of a model on the triplets of its teacher: one round of reflow.",
        ),
        (
            "distill",
            PresetOptions,
            DistillConfig,
            "Distill a rectified flow into one step, or a few, on triplets that it generated.",
        ),
        (
            "progressive",
            TrainingOptions,
            ProgressiveConfig,
            "Distill a flow by repeatedly halving its steps: the baseline that InstaFlow is compared with.",
        ),
        (
            "dmd",
            DmdOptions,
            DistributionMatchingConfig,
            "Fine-tune a model of one step, or a few, by distribution matching (DMD2): the distribution of its images "
            "approaches the teacher's, without matching the teacher's image for each noise sample.",
        ),
    ):
        add_command(
            commands, name, run_training, options, config_class, help=text, epilog=ON_PROCESSES, resumable=True
        )


def run_training(options: Any, config: Any) -> None:
    real = getattr(options, "real_triplets", ())
    for command, folders in (("triplets", options.triplets), ("real-triplets", real)):
        for folder in folders:
            if not folder.is_dir():
                raise CommandError(f"no folder {str(folder)!r}; make it with {PROG} {command}")
    if options.quantize is not None and config.lora_rank is None:
        raise CommandError("--quantize is for the base of a LoRA; give --lora-rank, or leave out --quantize")
    check_output_dir(config.output_dir)
    # In float32, on the CPU: accelerate moves it to the device of each process.
    quantized = None if options.quantize is None else (options.quantize, config.mixed_precision)
    load = partial(load_pipeline, device="cpu", dtype="float32", quantized=quantized)
    pipeline = load(options.model)
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
    if isinstance(options, DmdOptions):
        is_own = options.teacher == options.model  # is loaded once
        own["teacher"] = pipeline if is_own else load(options.teacher)
        own["real_data"] = open_triplets(real) if real else None
    trainer = trainers[type(config)](pipeline, open_triplets(options.triplets), config, **own)
    with without_bars_of_libraries():
        trainer.train()
    if trainer.accelerator.is_main_process:
        text = f"{config.output_dir}: trained to step {config.max_steps}"
        print_result(options, text, output_dir=config.output_dir, step=config.max_steps)
