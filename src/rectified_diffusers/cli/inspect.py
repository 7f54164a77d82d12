"""rectified-diffusers inspect: say whether a pipeline can be teacher and student, and what was found about it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from os.path import expanduser
from typing import TYPE_CHECKING, Any

from rectified_diffusers.cli.shared import CommandError, DeviceOptions, add_command, load_pipeline, print_result
from rectified_diffusers.options import option

if TYPE_CHECKING:
    from rectified_diffusers.models.inspection import Inspection


@dataclass(frozen=True, kw_only=True)
class InspectOptions(DeviceOptions):
    model: str = option(
        MISSING, "Folder or Hub id of any diffusers pipeline.", flags=["model"], type=expanduser, metavar="MODEL"
    )
    height: int | None = option(None, "In pixels.", shown="the pipeline's")
    width: int | None = option(None, "In pixels.", shown="the pipeline's")
    num_frames: int | None = option(None, "Of a video.", shown="the pipeline's")
    lora_rank: int = option(16, "Rank of the LoRA whose memory is counted.")

    def __post_init__(self) -> None:
        for name, value in {**self.size, "lora_rank": self.lora_rank}.items():
            if value < 1:
                raise CommandError(f"--{name.replace('_', '-')} must be at least 1, got {value}")

    @property
    def size(self) -> dict[str, int]:
        """Return the arguments of the pipeline's call that are set."""
        sizes = {"height": self.height, "width": self.width, "num_frames": self.num_frames}
        return {name: value for name, value in sizes.items() if value is not None}


def add_to(commands: Any) -> None:
    text = "Say whether a pipeline can be teacher and student, and what training it needs."
    add_command(commands, "inspect", run_inspect, InspectOptions, help=text)


def run_inspect(options: InspectOptions) -> None:
    """Load the pipeline, calibrate an adapter on it and print what it found."""
    pipeline = load_pipeline(options.model, options.device, options.dtype)
    from rectified_diffusers.models.inspection import inspect_pipeline
    from rectified_diffusers.training.config import TrainerConfig

    layers = TrainerConfig.__dataclass_fields__["lora_target_modules"].default
    found = inspect_pipeline(pipeline, options.size, options.lora_rank, layers)
    text = describe(options.model, found, options.lora_rank)
    print_result(options, text, model=options.model, **found.to_dict())


def describe(model: str, found: Inspection, lora_rank: int) -> str:
    """Return the inspection as a screen of text."""
    lines = {"model": f"{model} ({found.pipeline})", "teacher": found.teacher, "student": found.student}
    network, latents, time, guidance = found.network, found.latents, found.time, found.guidance
    if network and latents and time and guidance and found.self_test and found.memory:
        size = f"{network['parameters'] / 1e9:.3g} billion parameters, {network['dtype']}"
        lines["network"] = f"{network['component']}, {network['class']}, {size}"
        shape = " x ".join(str(axis) for axis in latents["shape"])
        rows = "several rows at once" if latents["rows_at_once"] else "one row at a time"
        form = "a list of rows" if latents["form"] == "rows" else "a tensor"
        lines["latents"] = f"{shape}, {form} as argument {latents['argument']}, {rows}"
        offset = f" + {time['offset']:g}" if time["offset"] else ""
        grid = ", timesteps by the pipeline's own grid" if time["table"] else ""
        rounded = ", rounded by the pipeline" if time["rounded"] else ""
        lines["time"] = f"{time['argument']} = {time['slope']:g} * timestep{offset}{grid}{rounded}"
        lines["prediction"] = str(found.prediction)
        default = guidance["default"]
        stated = "" if default is None else f", {guidance['argument']} is {default:g} by default"
        lines["guidance"] = f"{guidance['kind']}{stated}"
        euler = found.self_test["euler"]
        loop = "" if euler is None else f", Euler loop {euler:.0e}"
        lines["self-test"] = f"prediction {found.self_test['prediction']:.0e}{loop}, noise and decoding exact"
        lines |= _memory_lines(found, lora_rank)
    return "\n".join(f"{name:<14}{text}" for name, text in lines.items())


def _memory_lines(found: Inspection, lora_rank: int) -> dict[str, str]:
    memory = found.memory
    if memory is None:
        return {}

    def size(count: int | None) -> str:
        return "no layer to_q, to_k, to_v or to_out.0" if count is None else f"{count / 1e9:.3g} GB"

    return {
        "memory": "weights and optimizer of training, counted, without activations",
        "  full": size(memory.full),
        "  LoRA": f"{size(memory.lora)} (rank {lora_rank}, base in float32)",
        "  QLoRA int8": f"{size(memory.lora_int8)} (with --quantize int8)",
        "  QLoRA nf4": f"{size(memory.lora_nf4)} (with --quantize nf4)",
        "  encoders": f"{size(memory.text_encoders)} more for text encoders in float32",
        "  VAE": f"{size(memory.vae)} more in float32",
    }
