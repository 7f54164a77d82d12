"""The options of the trainers: their checks, and that they cost no import of torch."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rectified_diffusers.training.config import DistillConfig, ReflowConfig, TrainerConfig


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_steps", 0),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("micro_batch_size", 65),
        ("learning_rate", 0.0),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("lr_schedule", "constant"),
        ("max_grad_norm", 0.0),
        ("ema_decay", 1.0),
        ("mixed_precision", "fp8"),
        ("save_every_steps", 0),
        ("keep_checkpoints", 0),
        ("validate_every_steps", -1),
        ("log_every_steps", 0),
    ],
)
def test_bad_value_names_the_option_and_the_value(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be .*, got {value!r}"):
        TrainerConfig(**{"output_dir": Path("run"), option: value})


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_prompt_dropout_is_a_share(value: float) -> None:
    with pytest.raises(ValueError, match=r"prompt_dropout must be in \[0, 1\)"):
        ReflowConfig(output_dir=Path("run"), prompt_dropout=value)


def test_unknown_choices_list_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="time_density must be one of 'uniform', 'logit_normal', 'u_shaped', got 'cos'"
    ):
        ReflowConfig(output_dir=Path("run"), time_density="cos")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="loss must be one of 'l2', 'pseudo_huber', 'lpips', got 'l1'"):
        DistillConfig(output_dir=Path("run"), loss="l1")  # pyright: ignore[reportArgumentType]


def test_validation_needs_prompts() -> None:
    with pytest.raises(ValueError, match="validation_prompts is empty"):
        TrainerConfig(output_dir=Path("run"), validate_every_steps=10)


def test_every_option_has_its_text() -> None:
    for config_class in (ReflowConfig, DistillConfig):
        for field in dataclasses.fields(config_class):
            assert field.metadata["help"].endswith("."), field.name


def test_importing_the_options_does_not_import_torch() -> None:
    code = "import sys, rectified_diffusers.training.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
