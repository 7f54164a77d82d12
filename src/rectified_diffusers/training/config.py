"""Options of the trainers, in a separate module so that `--help` does not import torch."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from rectified_diffusers.options import check_options, option

Config = TypeVar("Config", bound="TrainerConfig")
PresetName = Literal["instaflow", "modern"]

_INSTAFLOW: dict[str, Any] = {
    "learning_rate": 1e-6,
    "warmup_steps": 1000,
    "max_grad_norm": 1.0,
    "ema_decay": 0.9999,
    "mixed_precision": "bf16",
}
"""Values shared by all of the paper's runs; docs/papers.md lists the source of each preset value."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Options common to all trainers; defaults follow InstaFlow (arXiv:2309.06380).

    Example:
        ```python
        config = ReflowConfig.preset("modern", output_dir=Path("flow"), max_steps=10_000)
        assert isinstance(config, TrainerConfig)
        trainer = ReflowTrainer(teacher, triplets, config)
        ```
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    output_dir: Path = option(MISSING, "Folder of checkpoints, log and trained pipeline; a run in it is resumed.")
    initialisation: Literal["weights", "snr_matching"] = option(
        "weights",
        "How a diffusion model becomes the first velocity model: weights uses its weights unchanged, as the paper "
        "does; snr_matching converts its predictions to the velocity at equal signal-to-noise ratio.",
    )
    max_steps: int = option(25_000, "Number of optimizer steps.")
    batch_size: int = option(64, "Triplets per optimizer step, all processes and micro-batches together.")
    micro_batch_size: int | None = option(
        None, "Triplets per forward pass of one process; the rest of the batch is accumulated. All at once if not set."
    )
    num_workers: int | None = option(
        None,
        "Processes that read triplets ahead of the step, for each process that trains; 0 reads within the step. Up to "
        "4 on a GPU and 0 on a CPU if not set.",
    )
    learning_rate: float = option(1e-6, "Learning rate of AdamW, after warm-up.")
    weight_decay: float = option(1e-2, "Weight decay of AdamW.")
    optimizer: Literal["adamw", "adamw8bit"] = option(
        "adamw", "adamw8bit keeps AdamW's two moments in 8 bits, a quarter of the memory; needs bitsandbytes."
    )
    warmup_steps: int = option(1000, "Steps over which the learning rate rises linearly from 0.")
    lr_schedule: Literal["constant_with_warmup", "linear", "cosine"] = option(
        "constant_with_warmup", "What the learning rate does after warm-up; linear and cosine fall to 0 at max_steps."
    )
    max_grad_norm: float = option(1.0, "Gradients are scaled down to at most this norm.")
    ema_decay: float = option(
        0.9999,
        "Decay per step of the averaged weights, which are the result, in [0, 1); the average starts from the "
        "initial weights, and its decay increases with the steps.",
    )
    lora_rank: int | None = option(
        None, "Train a LoRA of this rank instead of all weights; the base weights do not change."
    )
    lora_alpha: float | None = option(None, "Scale of the LoRA is lora_alpha / lora_rank; lora_rank if not set.")
    lora_target_modules: tuple[str, ...] = option(
        ("to_q", "to_k", "to_v", "to_out.0"), "Layers that get a LoRA, by the ends of their names; attention."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "bf16", "Precision of the forward and backward passes; the weights are float32."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    compile: bool = option(
        False,
        "Compile the trained networks with torch.compile: a slow first step, then faster ones; rounding differs.",
    )
    seed: int = option(0, "Seed of all random numbers of the training and the validation images.")
    save_every_steps: int = option(1000, "Steps between checkpoints; the last step always has one.")
    keep_checkpoints: int = option(2, "Number of newest checkpoints that are kept.")
    validate_every_steps: int = option(0, "Steps between validation images; 0 turns them off.")
    validation_prompts: tuple[str, ...] = option((), "Prompts of the validation images.")
    validation_guidance_scale: float = option(1.0, "Guidance scale of the validation images; 1 is no guidance.")
    log_every_steps: int = option(50, "Steps between lines of log.jsonl, each with the means since the last.")
    report_to: Literal["none", "tensorboard", "wandb"] = option(
        "none", "Tracker that also gets the log lines and the validation images."
    )
    push_to_hub: bool = option(False, "Upload the trained model, with its card, to hub_model_id.")
    hub_model_id: str | None = option(None, "Repository on the Hub to upload to, owner/name; created if missing.")
    straightness_paths: int = option(
        0, "Paths over which S(Z) of the trained model is measured for its card; 0 omits it."
    )
    lpips_network: Literal["alex", "vgg"] = option("alex", "Backbone of the losses lpips and lpips_huber.")
    lpips_weights: Path | None = option(
        None, "Safetensors file with the backbone's torchvision weights (features.*); downloaded if not set."
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("max_steps", "batch_size", "save_every_steps", "keep_checkpoints", "log_every_steps"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "validate_every_steps", "weight_decay", "straightness_paths"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "max_grad_norm"):
            _require(self, name, getattr(self, name) > 0, "greater than 0")
        micro = self.micro_batch_size
        _require(self, "micro_batch_size", micro is None or 1 <= micro <= self.batch_size, "in [1, batch_size]")
        _require(self, "num_workers", self.num_workers is None or self.num_workers >= 0, "at least 0")
        guidance = self.validation_guidance_scale
        _require(self, "validation_guidance_scale", 0 <= guidance < math.inf, "finite and not negative")
        _require(self, "ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        if self.validate_every_steps and not self.validation_prompts:
            raise ValueError("validate_every_steps is set but validation_prompts is empty: give at least one prompt.")
        rank, alpha = self.lora_rank, self.lora_alpha
        _require(self, "lora_rank", rank is None or rank >= 1, "at least 1")
        _require(self, "lora_alpha", alpha is None or 0 < alpha < math.inf, "greater than 0")
        if rank is not None and self.initialisation == "snr_matching":
            raise ValueError(
                f"A LoRA of lora_rank={rank} would only fit the network that initialisation='snr_matching' makes, not "
                "the model that it starts from. Train all weights, or use initialisation='weights'."
            )
        if rank is None and alpha is not None:
            raise ValueError(f"lora_alpha is set to {alpha} but lora_rank is not: give lora_rank to train a LoRA.")
        if rank is not None and not self.lora_target_modules:
            raise ValueError("lora_rank is set but lora_target_modules is empty: name at least one layer.")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub is set but hub_model_id is not: give owner/name of the repository.")

    @property
    def decodes_images(self) -> bool:
        """Whether a loss compares decoded images."""
        return any("lpips" in str(getattr(self, name, "")) for name in ("loss", "regression_loss"))

    @classmethod
    def preset(cls: type[Config], name: PresetName, **options: Any) -> Config:
        """Return a config with the values of a preset; explicit options override them.

        "instaflow" has the values of the paper. "modern" has the values of later papers that performed best in our
        ablation; its `initialisation` for reflow is refused if the model is already a flow. docs/papers.md lists the
        source of each value and the measurements.
        """
        if name not in cls.presets:
            known = ", ".join(map(repr, cls.presets)) or "none"
            raise ValueError(f"Expected a preset of {cls.__name__} out of {known}, got {name!r}.")
        return cls(**{**cls.presets[name], **options})


@dataclass(frozen=True, kw_only=True)
class ReflowConfig(TrainerConfig):
    """Options of `ReflowTrainer`; defaults are those of the paper's second reflow, except for its batch of 1024.

    Example:
        ```python
        config = ReflowConfig(output_dir=Path("lora-flow"), max_steps=1000, learning_rate=1e-4, lora_rank=4)
        trainer = ReflowTrainer(teacher, triplets, config)
        ```
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "instaflow": {**_INSTAFLOW, "batch_size": 1024, "max_steps": 25_000, "time_density": "uniform", "loss": "l2"},
        "modern": {**_INSTAFLOW, "initialisation": "snr_matching", "time_density": "logit_normal", "loss": "l2"},
    }

    time_density: Literal["uniform", "logit_normal", "u_shaped"] = option("uniform", "Density of t in training.")
    loss: Literal["l2", "pseudo_huber", "lpips_huber"] = option(
        "l2", "Distance between predicted and true velocity; lpips_huber also compares decoded images."
    )
    prompt_dropout: float = option(0.1, "Share of examples trained on the empty prompt, in [0, 1).")
    interpolation: Literal["straight", "variance_preserving", "cosine"] = option(
        "straight",
        "Path between noise and data whose velocity is trained: straight, as in rectified flow; variance_preserving, "
        "along the noise schedule of the diffusion model, as in DDIM; cosine, with weights sin and cos of pi t / 2.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "prompt_dropout", 0 <= self.prompt_dropout < 1, "in [0, 1)")
        conflicts = {
            "initialisation='snr_matching', which starts from the velocity of the straight path": (
                self.initialisation == "snr_matching"
            ),
            "loss='lpips_huber', which estimates the data as on the straight path": self.loss == "lpips_huber",
            f"lora_rank={self.lora_rank}, because a LoRA file does not record the path": self.lora_rank is not None,
        }
        for conflict, found in conflicts.items():
            if found and self.interpolation != "straight":
                raise ValueError(
                    f"interpolation={self.interpolation!r} cannot be combined with {conflict}. Change one of the two."
                )


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainerConfig):
    """Options of `DistillTrainer`; the paper does not state its learning rate for distillation.

    Example:
        ```python
        config = DistillConfig(output_dir=Path("one-step"), loss="pseudo_huber", max_steps=21_500)
        trainer = DistillTrainer(pipeline, triplets, config)
        ```
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "instaflow": {**_INSTAFLOW, "batch_size": 1024, "max_steps": 21_500, "loss": "l2"},
        "modern": {**_INSTAFLOW, "loss": "pseudo_huber"},
    }

    loss: Literal["l2", "pseudo_huber", "lpips", "lpips_huber"] = option(
        "l2", "Distance between the one-step result and the data; lpips and lpips_huber compare decoded images."
    )
    plain_unet: bool = option(
        False,
        "Continue from a DiffusionVelocityUNet, which snr_matching creates, with a plain U-Net that is nearly equal "
        "at t = 0 and that every program for Stable Diffusion can load. For teachers that predict v or the sample.",
    )
    student_steps: int = option(
        1, "Euler steps of the student, the default of its pipeline; it is trained only at their times."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "student_steps", self.student_steps >= 1, "at least 1")
        if self.plain_unet and self.student_steps > 1:
            raise ValueError(
                f"plain_unet keeps the predictions at t = 0 only, and student_steps={self.student_steps} need those "
                "of later times too. Leave out one of the two."
            )
        if self.plain_unet and self.lora_rank is not None:
            raise ValueError(
                f"plain_unet changes the weights under the LoRA of lora_rank={self.lora_rank}, which would fit no "
                "model. Train all weights, or the DiffusionVelocityUNet as it is."
            )


@dataclass(frozen=True, kw_only=True)
class ProgressiveConfig(TrainerConfig):
    """Options of `ProgressiveTrainer` (arXiv:2202.00512); the rounds determine the number of optimizer steps.

    Example:
        ```python
        config = ProgressiveConfig(output_dir=Path("two-steps"), teacher_steps=16, student_steps=2)
        trainer = ProgressiveTrainer(pipeline, triplets, config)
        ```
    """

    teacher_steps: int = option(32, "Euler steps of the first teacher; a student's are half of its teacher's.")
    student_steps: int = option(1, "Euler steps of the last student; teacher_steps halved once or more.")
    steps_per_round: int = option(10_000, "Number of optimizer steps of each round, which halves the steps once.")
    teacher_guidance_scale: float = option(
        1.0,
        "Guidance scale of the first teacher, as its pipeline takes it, which is distilled into the students; 1 is "
        "no guidance.",
    )
    pairs: Literal["independent", "coupled"] = option(
        "independent",
        "Noise to mix with the data: new noise, for a teacher that was trained this way, or that of the triplets, for "
        "a reflowed one.",
    )
    loss: Literal["l2", "pseudo_huber", "lpips", "lpips_huber"] = option(
        "l2", "Distance between one step of the student and two of its teacher; lpips compares decoded images."
    )
    prompt_dropout: float = option(0.1, "Share of examples trained on the empty prompt, in [0, 1).")
    lr_schedule: Literal["constant_with_warmup", "linear", "cosine"] = option(
        "linear", "What the learning rate does after warm-up; linear and cosine fall to 0 at the end of each round."
    )
    warmup_steps: int = option(0, "Steps of each round over which the learning rate rises linearly from 0.")
    max_steps: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("student_steps", "steps_per_round"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        halvings = self.teacher_steps / self.student_steps
        if halvings < 2 or not math.log2(halvings).is_integer():
            raise ValueError(
                f"teacher_steps must be student_steps times 2, 4, 8, ..., got teacher_steps={self.teacher_steps} and "
                f"student_steps={self.student_steps}."
            )
        object.__setattr__(self, "max_steps", self.rounds * self.steps_per_round)
        super().__post_init__()
        _require(self, "prompt_dropout", 0 <= self.prompt_dropout < 1, "in [0, 1)")
        _require(
            self, "teacher_guidance_scale", 0 <= self.teacher_guidance_scale < math.inf, "finite and not negative"
        )

    @property
    def rounds(self) -> int:
        """Number of times that the steps are halved."""
        return round(math.log2(self.teacher_steps / self.student_steps))


@dataclass(frozen=True, kw_only=True)
class DistributionMatchingConfig(TrainerConfig):
    """Options of `DistributionMatchingTrainer`; defaults are those of DMD2 on SD 1.5, except for its batch of 2048.

    Source: arXiv:2405.14867. The authors' script for SD 1.5 does 10 updates of the fake velocity; the paper finds 5
    sufficient.

    Example:
        ```python
        one_step = RectifiedFlowPipeline.from_pretrained("XCLiu/instaflow_0_9B_from_sd_1_5")
        config = DistributionMatchingConfig(output_dir=Path("sharp"), max_steps=1000, fake_updates=10)
        trainer = DistributionMatchingTrainer(one_step, triplets, config, teacher)
        ```
    """

    student_steps: int = option(
        1,
        "Euler steps of the student, the default of its pipeline; each update trains it at one of their times, "
        "sampled at random, on the state that its own steps lead to.",
    )
    teacher_guidance_scale: float | None = option(
        None,
        "Guidance scale of the teacher, as its pipeline takes it, which is distilled into the student; 1 is no "
        "guidance.",
        shown="1.75; that of the triplets for a network that takes guidance as an input; 1 for a pipeline without it",
    )
    fake_updates: int = option(
        5, "Updates of the fake velocity, that of the student's own images, for each update of the student."
    )
    first_fake_updates: int = option(
        0, "Further updates of the fake velocity before all others, at its full learning rate."
    )
    fake_learning_rate: float | None = option(
        None, "Learning rate of the fake velocity, after warm-up; learning_rate if not set."
    )
    min_t: float = option(0.02, "Least time at which teacher and fake velocity are compared, in (0, max_t).")
    max_t: float = option(0.98, "Greatest time at which teacher and fake velocity are compared, in (min_t, 1).")
    regression_weight: float = option(
        0.0, "Weight of the distance to the triplets' data, which DMD has and DMD2 does not; 0 turns it off."
    )
    regression_loss: Literal["l2", "pseudo_huber", "lpips", "lpips_huber"] = option(
        "l2", "Distance to the triplets' data, if it has a weight; lpips and lpips_huber compare decoded images."
    )
    adversarial_weight: float = option(
        1e-3, "Weight of the adversarial loss in the student's loss; only with real triplets."
    )
    discriminator_weight: float = option(
        1e-2, "Weight of the discriminator's loss in that of the fake velocity; only with real triplets."
    )
    learning_rate: float = option(1e-5, "Learning rate of AdamW, after warm-up.")
    warmup_steps: int = option(500, "Steps over which the learning rate rises linearly from 0.")
    max_grad_norm: float = option(10.0, "Gradients are scaled down to at most this norm.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "student_steps", self.student_steps >= 1, "at least 1")
        _require(self, "fake_updates", self.fake_updates >= 1, "at least 1")
        _require(self, "first_fake_updates", self.first_fake_updates >= 0, "at least 0")
        rate = self.fake_learning_rate
        _require(self, "fake_learning_rate", rate is None or 0 < rate < math.inf, "greater than 0")
        _require(self, "min_t", 0 < self.min_t < 1, "in (0, 1)")
        _require(self, "max_t", self.min_t < self.max_t < 1, f"between min_t={self.min_t} and 1")
        weights = ("regression_weight", "adversarial_weight", "discriminator_weight")
        for name in ("teacher_guidance_scale", *weights):
            value = getattr(self, name)
            _require(self, name, value is None or 0 <= value < math.inf, "finite and not negative")


def _require(config: TrainerConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {getattr(config, name)!r}.")
