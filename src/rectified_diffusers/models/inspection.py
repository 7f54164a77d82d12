"""Inspect a pipeline: whether it can be teacher and student, what calibration found, and the memory of training it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.self_test import self_test

TRAINED = 4 + 4 + 8 + 4
"""Bytes per trained weight, in float32: the weight, its gradient, two moments of AdamW, its average."""
FROZEN = 4
"""Bytes per frozen weight that is not quantized: the commands load float32."""
QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes per quantized weight; of nf4 with a float32 scale for each block of 64."""
_PER_OUTPUT = {"int8": 4 + 1, "nf4": 0}  # torchao's float32 scale and int8 zero point of each output


@dataclass(frozen=True)
class Memory:
    """Bytes that reflow and distillation need, by way of training; activations come on top.

    Weights count in the dtypes in which the commands train: `TRAINED` bytes for each trained weight, `FROZEN` for each
    frozen one, `QUANTIZED` for each weight of a quantized linear layer.

    Attributes:
        full: of the network, if all its weights are trained.
        lora: of the base and the LoRA; None if no layer has one of the names. The base is shared with the pipeline.
        lora_int8, lora_nf4: the same with a quantized base.
        text_encoders, vae: of these components, in addition; other networks of the pipeline count as text encoders.
    """

    full: int
    lora: int | None
    lora_int8: int | None
    lora_nf4: int | None
    text_encoders: int
    vae: int


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
    """Count the bytes of training from the numbers of parameters, see `Memory`."""
    linear = {name: part for name, part in network.named_modules() if isinstance(part, nn.Linear)}
    ends = tuple(f".{layer}" for layer in lora_layers)
    adapted = [part for name, part in linear.items() if f".{name}".endswith(ends)] if ends else []
    lora = TRAINED * lora_rank * sum(part.in_features + part.out_features for part in adapted)
    kept = getattr(network, "_keep_in_fp32_modules", None) or ()  # which diffusers does not quantize
    quantized = [part for name, part in linear.items() if not any(f"{each}." in f"{name}." for each in kept)]
    weights = sum(part.in_features * part.out_features for part in quantized)
    outputs = sum(part.out_features for part in quantized)
    count = _count(network)
    frozen = {
        kind: round(size * weights) + _PER_OUTPUT[kind] * outputs + FROZEN * (count - weights)
        for kind, size in QUANTIZED.items()
    }
    others = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    sizes = {name: FROZEN * _count(part) for name, part in others.items() if part is not network}
    vae = sum(size for name, size in sizes.items() if hasattr(others[name], "decode"))
    return Memory(
        full=TRAINED * count,
        lora=FROZEN * count + lora if adapted else None,
        lora_int8=frozen["int8"] + lora if adapted else None,
        lora_nf4=frozen["nf4"] + lora if adapted else None,
        text_encoders=sum(sizes.values()) - vae,
        vae=vae,
    )


def _count(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())
