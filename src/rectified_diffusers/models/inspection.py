"""Inspect a pipeline: whether it can be teacher and student, what calibration found, and the memory of training it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.self_test import self_test

_TRAINED = 4 + 4 + 8 + 4  # bytes per weight in float32: the weight, its gradient, two moments of AdamW, its average
_BASE = 4  # a LoRA's base in float32, which teacher and pipeline share
_FROZEN = 2  # bfloat16
_NF4 = 0.5 + 4 / 64  # four bits, and a float32 scale for each block of 64


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs for weights and optimizer, by way of training; activations come on top.

    Attributes:
        frozen: VAE and text encoders, in bfloat16.
        lora: of the base in float32; None if no layer has one of the names.
        quantized_lora: of the base's linear layers in NF4; for comparison, the trainers take no quantized base.
    """

    full: int
    lora: int | None
    quantized_lora: int | None
    frozen: int


@dataclass(frozen=True)
class Inspection:
    """What a pipeline is for this package. `teacher` and `student` are "yes" or a reason why not."""

    pipeline: str
    teacher: str
    student: str
    network: dict[str, Any] | None = None
    latents: dict[str, Any] | None = None
    time: dict[str, Any] | None = None
    prediction: str | None = None
    guidance: dict[str, Any] | None = None
    self_test: dict[str, Any] | None = None
    memory: Memory | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_pipeline(
    pipeline: Any, options: Mapping[str, Any] | None = None, lora_rank: int = 16, lora_layers: Sequence[str] = ()
) -> Inspection:
    """Calibrate an adapter on a pipeline, test it, and describe it. This evaluates the network a few dozen times.

    Args:
        options: arguments of the pipeline's call, such as height and width.
        lora_layers: ends of the names of layers that get a LoRA.
    """
    kind = type(pipeline).__name__
    try:
        denoiser = PipelineDenoiser(pipeline, options=options)
        result = self_test(denoiser)
    except UnsupportedPipelineError as error:
        return Inspection(kind, f"no: {error}", f"no: {error}")
    calibration, guidance = denoiser.calibration, denoiser.guidance_found
    network, two_passes = denoiser.network, denoiser.guidance_found.two_passes
    scale = next(iter([*guidance.inputs, *([two_passes.argument] if two_passes else [])]), None)
    return Inspection(
        pipeline=kind,
        teacher="yes",
        student=_student(denoiser),
        network={
            "component": denoiser.component,
            "class": type(network).__name__,
            "parameters": sum(weight.numel() for weight in network.parameters()),
            "dtype": str(denoiser.dtype).removeprefix("torch."),
        },
        latents={
            "shape": list(denoiser.latent_shape),
            "argument": calibration.sample.name,
            "form": calibration.sample.form,
            "rows_at_once": denoiser.axes is not None,
        },
        time={
            "argument": calibration.time.name,
            "slope": calibration.time.slope,
            "offset": calibration.time.offset,
            "rounded": calibration.time.rounded,
            "table": calibration.flow is not None and calibration.flow.table is not None,
        },
        prediction=_prediction(denoiser),
        guidance={
            "kind": guidance.kind,
            "argument": scale,
            "default": denoiser.call.default(scale) if scale in denoiser.call.scales else None,
            "offset": two_passes.offset if two_passes else None,
        },
        self_test=asdict(result),
        memory=count_memory(pipeline, network, lora_rank, lora_layers),
    )


def _student(denoiser: PipelineDenoiser) -> str:
    if denoiser.is_flow:
        return "yes"
    if isinstance(denoiser.network, UNet2DConditionModel):
        return "yes, as a diffusion U-Net that initialisation='snr_matching' makes a flow"
    return "no: a diffusion transformer has no initialization as a flow here"


def _prediction(denoiser: PipelineDenoiser) -> str:
    diffusion = denoiser.diffusion()
    if diffusion is not None:
        return diffusion.prediction_type
    return "data - noise" if denoiser.direction == "data" else "noise - data"


def count_memory(pipeline: Any, network: nn.Module, lora_rank: int, lora_layers: Sequence[str]) -> Memory:
    """Count the bytes of training from the numbers of parameters."""
    linear = {name: part for name, part in network.named_modules() if isinstance(part, nn.Linear)}
    count = sum(weight.numel() for weight in network.parameters())
    quantized = sum(part.weight.numel() for part in linear.values())
    ends = tuple(f".{layer}" for layer in lora_layers)
    adapted = [part for name, part in linear.items() if f".{name}".endswith(ends)] if ends else []
    added = _TRAINED * lora_rank * sum(part.in_features + part.out_features for part in adapted)
    others = [part for part in pipeline.components.values() if isinstance(part, nn.Module) and part is not network]
    return Memory(
        full=_TRAINED * count,
        lora=_BASE * count + added if adapted else None,
        quantized_lora=round(_NF4 * quantized) + _FROZEN * (count - quantized) + added if adapted else None,
        frozen=_FROZEN * sum(weight.numel() for part in others for weight in part.parameters()),
    )
