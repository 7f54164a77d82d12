"""Options of the trainers. They do not sit beside the trainers so that `--help` does not import torch."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from rectified_diffusers.options import option


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Options that every trainer has; defaults follow InstaFlow (arXiv:2309.06380)."""

    output_dir: Path = option(MISSING, "Folder of checkpoints, log and trained pipeline; a run in it is resumed.")
    max_steps: int = option(25_000, "Number of optimizer steps.")
    batch_size: int = option(64, "Triplets per optimizer step, all processes and micro-batches together.")
    micro_batch_size: int | None = option(
        None, "Triplets per forward pass of one process; the rest of the batch is accumulated. All at once if not set."
    )
    learning_rate: float = option(1e-6, "Learning rate of AdamW, after warm-up.")
    weight_decay: float = option(1e-2, "Weight decay of AdamW.")
    warmup_steps: int = option(1000, "Steps over which the learning rate rises linearly from 0.")
    lr_schedule: Literal["constant_with_warmup", "linear", "cosine"] = option(
        "constant_with_warmup", "What the learning rate does after warm-up; linear and cosine fall to 0 at max_steps."
    )
    max_grad_norm: float = option(1.0, "Gradients are scaled down to at most this norm.")
    ema_decay: float = option(0.9999, "Decay per step of the averaged weights, which are the ones kept, in [0, 1).")
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "bf16", "Precision of the U-Net's work; its weights are float32."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    seed: int = option(0, "Seed of everything drawn in training and in validation pictures.")
    save_every_steps: int = option(1000, "Steps between checkpoints; the last step always has one.")
    keep_checkpoints: int = option(2, "Number of newest checkpoints that are kept.")
    validate_every_steps: int = option(0, "Steps between validation pictures; 0 turns them off.")
    validation_prompts: tuple[str, ...] = option((), "Prompts of the validation pictures.")
    validation_guidance_scale: float = option(1.0, "Guidance scale of the validation pictures; 1 is no guidance.")
    log_every_steps: int = option(50, "Steps between lines of log.jsonl, each with the means since the last.")

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                known = get_args(hint)
                _require(self, name, getattr(self, name) in known, f"one of {', '.join(map(repr, known))}")
        for name in ("max_steps", "batch_size", "save_every_steps", "keep_checkpoints", "log_every_steps"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "validate_every_steps", "weight_decay"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "max_grad_norm"):
            _require(self, name, getattr(self, name) > 0, "greater than 0")
        micro = self.micro_batch_size
        _require(self, "micro_batch_size", micro is None or 1 <= micro <= self.batch_size, "in [1, batch_size]")
        _require(self, "ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        if self.validate_every_steps and not self.validation_prompts:
            raise ValueError("validate_every_steps is set but validation_prompts is empty: give at least one prompt.")


@dataclass(frozen=True, kw_only=True)
class ReflowConfig(TrainerConfig):
    """Options of `ReflowTrainer`; defaults are the paper's second reflow, but for its batch of 1024."""

    time_density: Literal["uniform", "logit_normal", "u_shaped"] = option("uniform", "Density of t in training.")
    loss: Literal["l2", "pseudo_huber"] = option("l2", "Distance between predicted and true velocity.")
    prompt_dropout: float = option(0.1, "Share of examples trained on the empty prompt, in [0, 1).")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "prompt_dropout", 0 <= self.prompt_dropout < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainerConfig):
    """Options of `DistillTrainer`; the paper does not state its learning rate of distillation."""

    loss: Literal["l2", "pseudo_huber", "lpips"] = option(
        "l2", "Distance between the one-step result and the data; lpips compares decoded pictures."
    )
    lpips_network: Literal["alex", "vgg"] = option("alex", "Backbone of the lpips loss.")
    lpips_weights: Path | None = option(
        None, "Safetensors file with the backbone's torchvision weights (features.*); downloaded if not set."
    )


def _require(config: TrainerConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {getattr(config, name)!r}.")
