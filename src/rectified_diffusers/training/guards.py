"""Checks for mistakes that ruin a training run and are cheaper to detect before its first step."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from rectified_diffusers.checks import require_type
from rectified_diffusers.data.dataset import Triplets
from rectified_diffusers.data.manifest import Manifest
from rectified_diffusers.models.conditioning import named_tensors
from rectified_diffusers.models.denoiser import Conditioning, Denoiser
from rectified_diffusers.models.quantization import is_base_of_lora, quantization_of
from rectified_diffusers.speed.optimize import is_optimized
from rectified_diffusers.training.checkpoint_reading import checkpoint_path, checkpoint_steps
from rectified_diffusers.training.config import TrainerConfig

ROWS = 8
_OPPOSITE = -0.5
_ROUNDING = 0.1  # rounding error of text encoders in half precision


def require_config(trainer: type, config: Any) -> None:
    """Raise if the options are those of another trainer; `Trainer[ReflowConfig]` declares the expected type."""
    named = [kind for base in getattr(trainer, "__orig_bases__", ()) for kind in get_args(base)]
    expected = next((kind for kind in named if isinstance(kind, type)), TrainerConfig)
    require_type("config", config, expected, f"{trainer.__name__} has options of its own.")


def not_a_flow(trainer: str, pipeline: Any) -> ValueError:
    """Return the error for a pipeline that predicts no velocity."""
    return ValueError(
        f"{trainer} needs a pipeline that predicts a velocity, got {type(pipeline).__name__} with "
        f"{type(pipeline.scheduler).__name__}. Set initialisation='snr_matching', or reflow it first."
    )


def require_divisible(batch_size: int, processes: int) -> None:
    """Raise unless all processes get equal parts of a batch."""
    if batch_size % processes:
        raise ValueError(
            f"batch_size must be a multiple of the {processes} processes, got {batch_size}. Choose another batch size "
            "or number of processes."
        )


def require_steps_left(step: int, config: TrainerConfig) -> None:
    """Raise if a run has completed more steps than the config requests."""
    if step > config.max_steps:
        raise ValueError(
            f"{config.output_dir} holds a run of {step} steps, got max_steps={config.max_steps}. Raise max_steps to "
            "go on, or give another output_dir."
        )


def require_own_weights(pipeline: Any) -> None:
    """Raise if a pipeline is optimized: training would start from its rounded weights."""
    if is_optimized(pipeline):
        raise ValueError(
            f"Training needs the pipeline's own weights, got an optimized {type(pipeline).__name__}. "
            "Call restore() on the result of optimize first."
        )


def require_trainable(denoiser: Denoiser, config: TrainerConfig, sharded: bool) -> str | None:
    """Return the quantization of a pipeline's network; raise unless it is None or that of the base of a LoRA."""
    found, component = quantization_of(denoiser.network), denoiser.component
    if found is None:
        return None
    if config.lora_rank is None:
        raise ValueError(
            f"The {component} is quantized ({found}), expected weights in floating point. Set lora_rank to train a "
            "LoRA on it, or load the pipeline without a quantization_config."
        )
    if not is_base_of_lora(found):
        raise ValueError(
            f"The {component} is quantized ({found}), expected int8 of torchao, nf4 of bitsandbytes or weights in "
            "floating point. Load the pipeline with one of these."
        )
    if sharded:
        raise ValueError(
            f"The {component} is quantized ({found}), and quantized weights are not sharded. Launch without FSDP, or "
            "load the pipeline without a quantization_config."
        )
    return found


def require_checkpointing(network: Any) -> None:
    """Raise if a network cannot recompute its activations."""
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"{type(network).__name__} does not support gradient checkpointing. Leave out gradient_checkpointing."
        )


def require_same_latents(vae: Any, manifest: Manifest) -> None:
    """Raise if the triplets' latents are scaled for a VAE other than the pipeline's."""
    config = getattr(vae, "config", {})
    for name, made in manifest.vae_scaling.items():
        here = config.get(name)
        if made != (here or 0.0):
            raise ValueError(
                f"The triplets were made with a VAE of {name} {made}, the pipeline's has {here}: it would "
                "decode them to other images. Train a pipeline with the teacher's VAE, or make the triplets again "
                "with a teacher that has this one."
            )


def require_pairs(manifest: Manifest) -> None:
    """Raise if the noise and data of some triplets are unrelated."""
    if not all(part.is_coupled for part in manifest.parts):
        raise ValueError(
            "This training fits the data of each noise, and there are triplets whose images have new noise, of "
            "real-triplets with num_inference_steps=0. Make them again with more steps, or give them to dmd as its "
            "real triplets."
        )


def require_same_text(student: Conditioning, teacher: Conditioning) -> None:
    """Raise if two pipelines encode the same prompts differently, that is, if their text encoders differ."""
    both = named_tensors(student), named_tensors(teacher)
    for name in sorted(both[0].keys() | both[1].keys()):
        own, other = (each[name].float().cpu() if name in each else torch.empty(0) for each in both)
        if own.shape != other.shape or (own - other).norm() > _ROUNDING * own.norm():
            raise ValueError(
                f"The teacher's text encoders are not the student's: of the same prompts, {name} is "
                f"{tuple(other.shape)} and {tuple(own.shape)} or has other values. Give a teacher with the text "
                "encoders of the pipeline."
            )


@torch.no_grad()
def require_direction(predict_velocity: Callable[[Tensor, Tensor, list[str]], Tensor], batch: Triplets) -> None:
    """Raise if the velocity at t = 0 points away from the data, as that of a flow with the opposite sign does.

    At the start of training, a velocity model predicts about E[data] - noise there. Its cosine with data - noise is
    about 1 / sqrt(1 + var(data)): 0.7 for latents of unit variance. The opposite sign gives the negative of this
    value, and so does a network that predicts the noise. An untrained network gives a value around 0.

    Args:
        predict_velocity: v(x_t, t, prompts) of a network that is assumed to be a flow.
        batch: triplets on the network's device.
    """
    predicted = predict_velocity(batch.noise, torch.zeros(len(batch), device=batch.noise.device), batch.prompts)
    velocity = batch.data - batch.noise
    cosine = torch.cosine_similarity(predicted.flatten(), velocity.flatten(), dim=0).item()
    if cosine < _OPPOSITE:
        raise ValueError(
            "The velocity of the model points away from the data: expected a cosine with data - noise above "
            f"0, got {cosine:.2f}. For a model that predicts noise - data, set "
            "RectifiedFlowEulerScheduler(velocity_direction='noise'). Load a diffusion model with its own scheduler."
        )


def require_finite(step: int, loss: float, grad_norm: float, scaler: Any, settle: Callable[[], Path]) -> None:
    """Raise if the loss or gradient of a step is not finite, before it changes the weights.

    Args:
        scaler: gradient scaler of fp16; None in other precisions. fp16 overflows at first by design: the step is
            skipped and the scale halved, until there is no scale left.
        settle: returns the folder of the run's checkpoints, for the error message, when none is being written.
    """
    overflow = scaler is not None and scaler.get_scale() > 1
    if math.isfinite(loss) and (math.isfinite(grad_norm) or overflow):
        return
    checkpoints = settle()
    steps = checkpoint_steps(checkpoints)
    last = checkpoint_path(checkpoints, steps[-1]) if steps else "none yet"
    raise FloatingPointError(
        f"Step {step} has loss {loss} and gradient norm {grad_norm}; the weights were not changed by it. "
        f"Last good checkpoint: {last}. Lower learning_rate, raise warmup_steps or use mixed_precision='no', and "
        "check the triplets; a changed option needs another output_dir."
    )
