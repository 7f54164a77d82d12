"""The options of the trainers: their checks, and that they cost no import of torch."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rectified_diffusers.training.config import (
    DistillConfig,
    DistributionMatchingConfig,
    ProgressiveConfig,
    ReflowConfig,
    TrainerConfig,
)
from rectified_diffusers.training.identity import config_to_json, recorded_options, require_same_run


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
    with pytest.raises(ValueError, match="loss must be one of 'l2', 'pseudo_huber', 'lpips', 'lpips_huber', got 'l1'"):
        DistillConfig(output_dir=Path("run"), loss="l1")  # pyright: ignore[reportArgumentType]


def test_validation_needs_prompts() -> None:
    with pytest.raises(ValueError, match="validation_prompts is empty"):
        TrainerConfig(output_dir=Path("run"), validate_every_steps=10)


def test_every_option_has_its_text() -> None:
    for config_class in (ReflowConfig, DistillConfig, ProgressiveConfig, DistributionMatchingConfig):
        for field in dataclasses.fields(config_class):
            assert not field.init or field.metadata["help"].endswith("."), field.name


def test_importing_the_options_does_not_import_torch() -> None:
    code = "import sys, rectified_diffusers.training.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("config_class", [ReflowConfig, DistillConfig])
@pytest.mark.parametrize("name", ["instaflow", "modern"])
def test_a_preset_sets_defaults_and_options_win(name: Any, config_class: Any) -> None:
    values = config_class.presets[name]
    config = config_class.preset(name, output_dir=Path("run"))
    assert {key: getattr(config, key) for key in values} == dict(values)
    assert config == config_class(output_dir=Path("run"), **values)
    other = config_class.preset(name, output_dir=Path("run"), loss="pseudo_huber", learning_rate=3e-5)
    assert (other.loss, other.learning_rate) == ("pseudo_huber", 3e-5)
    assert other.ema_decay == values["ema_decay"]


def test_presets_are_what_the_papers_say() -> None:
    """As docs/papers.md has it, with the sources."""
    reflow, distill = (config.preset("instaflow", output_dir=Path("run")) for config in (ReflowConfig, DistillConfig))
    assert (reflow.batch_size, reflow.max_steps, reflow.time_density, reflow.loss) == (1024, 25_000, "uniform", "l2")
    assert (distill.batch_size, distill.max_steps, distill.loss) == (1024, 21_500, "l2")
    for config in (reflow, distill):
        assert (config.warmup_steps, config.max_grad_norm, config.ema_decay) == (1000, 1.0, 0.9999)
    reflow, distill = (config.preset("modern", output_dir=Path("run")) for config in (ReflowConfig, DistillConfig))
    assert (reflow.time_density, reflow.loss, distill.loss) == ("logit_normal", "l2", "pseudo_huber")
    assert (reflow.initialisation, distill.initialisation) == ("snr_matching", "weights")


@pytest.mark.parametrize("kind", [ReflowConfig, DistillConfig, ProgressiveConfig, DistributionMatchingConfig])
def test_a_lora_of_a_network_that_no_one_has_is_refused(kind: Any, tmp_path: Path) -> None:
    """Its base would be the network that snr_matching makes, and the card names the model before that."""
    with pytest.raises(ValueError, match=r"lora_rank=4 would only fit the network that initialisation='snr_matching'"):
        kind(output_dir=tmp_path, lora_rank=4, initialisation="snr_matching")


@pytest.mark.parametrize(
    "options", [{"initialisation": "snr_matching"}, {"loss": "lpips_huber"}, {"lora_rank": 4}], ids=str
)
@pytest.mark.parametrize("interpolation", ["cosine", "variance_preserving"])
def test_what_holds_on_the_straight_path_only_is_refused_on_others(interpolation: Any, options: Any) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"interpolation='{interpolation}' cannot be combined with {name}={value!r}"):
        ReflowConfig(output_dir=Path("run"), interpolation=interpolation, **options)
    ReflowConfig(output_dir=Path("run"), **options)
    assert config_to_json(ReflowConfig(output_dir=Path("run")))["interpolation"] == "straight"


def test_an_unknown_preset_or_option_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a preset of ReflowConfig out of 'instaflow', 'modern', got 'old'"):
        ReflowConfig.preset("old", output_dir=Path("run"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="Expected a preset of ProgressiveConfig out of none, got 'modern'"):
        ProgressiveConfig.preset("modern", output_dir=Path("run"))
    with pytest.raises(TypeError, match="learning_rat"):
        ReflowConfig.preset("modern", output_dir=Path("run"), learning_rat=1.0)


def test_a_run_of_an_earlier_release_may_be_resumed() -> None:
    """Its checkpoints say nothing about options that came later, and their defaults change nothing."""
    config = ReflowConfig(output_dir=Path("run"))
    recorded = {**config_to_json(config), "trainer": "ReflowTrainer"}
    for name in ("lora_rank", "optimizer", "lora_target_modules", "interpolation"):
        del recorded[name]
    found = {**config_to_json(config), "trainer": "ReflowTrainer"}
    require_same_run(recorded_options(recorded, config), found, Path("run"))
    other = ReflowConfig(output_dir=Path("run"), lora_rank=4)
    with pytest.raises(ValueError, match="holds a run with lora_rank=None, got lora_rank=4"):
        require_same_run(recorded_options(recorded, other), {**found, **config_to_json(other)}, Path("run"))
    missing = {name: value for name, value in found.items() if name != "trainer"}
    with pytest.raises(ValueError, match="trainer='ReflowTrainer', got trainer=None"):
        require_same_run(recorded_options(recorded, config), missing, Path("run"))
