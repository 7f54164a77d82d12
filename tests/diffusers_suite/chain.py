"""Everything that this package does with a flow pipeline, from triplets to a LoRA in the stock pipeline."""

import inspect
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from peft import PeftModel
from torch import nn

from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.generate import generate_triplets
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.calibration import PROMPTS
from rectified_diffusers.models.watching import images_of
from rectified_diffusers.training.config import DistillConfig, ReflowConfig, TrainerConfig
from rectified_diffusers.training.distill import DistillTrainer
from rectified_diffusers.training.lora import WEIGHTS, has_loader
from rectified_diffusers.training.reflow import ReflowTrainer

ATTENTION = TrainerConfig.__dataclass_fields__["lora_target_modules"].default
CHANGE, EQUAL = 5, 2  # levels of 255: mean change by training, largest difference of images that must be equal
RATES = (0.3, 3.0, 30.0)
RUN: dict[str, Any] = {"batch_size": 2, "warmup_steps": 0, "mixed_precision": "no", "ema_decay": 0.0}


class ChainError(Exception):
    """A link of the chain that does not hold; the message says which."""


@dataclass(frozen=True)
class Chain:
    """Results of the chain, in levels of 255.

    Attributes:
        change: mean difference of the trained image to the base's.
        folder: largest difference of the image of the finished folder, by the stock pipeline, to the trained image.
        lora: the same of the stock pipeline of the base with the LoRA file.
        loader: `load_lora_weights` of the pipeline, `load_lora_adapter` of the network, or peft.
    """

    change: float
    folder: float
    lora: float
    loader: str


def run_chain(pipeline: Any, options: dict[str, Any], rates: tuple[float, ...] = RATES) -> Chain:
    """Make triplets, reflow, distill to a LoRA, and generate with the stock pipeline what the student generates.

    Args:
        options: arguments of the pipeline's call.
        rates: learning rates of the LoRA, of which the first that changes the image enough counts.

    Raises:
        ChainError: the images are not equal, or training does not change them.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings: dict[str, Any] = {"num_inference_steps": 3, "batch_size": 2, "storage_dtype": "float32"}
        config = TripletConfig(num_triplets=4, call_options=json.dumps(options), **settings)
        dataset = generate_triplets(pipeline, list(PROMPTS), folder / "triplets", config, progress=False)
        ReflowTrainer(pipeline, dataset, ReflowConfig(output_dir=folder / "reflow", max_steps=2, **RUN)).train()
        load(pipeline, folder / "reflow")
        pipeline.save_pretrained(folder / "base")
        result = None
        for rate in rates:
            result = distill(pipeline, dataset, folder, rate)
            if result.change >= CHANGE:
                break
    if result is None or not result.change >= CHANGE:
        raise ChainError(f"training changes the image by {result.change if result else 0:.1f} levels only")
    for name in ("folder", "lora"):
        if not getattr(result, name) <= EQUAL:
            raise ChainError(f"the image of the {name} differs from the student's by {getattr(result, name):.0f}")
    return result


def distill(pipeline: Any, dataset: TripletDataset, folder: Path, rate: float) -> Chain:
    """Train a LoRA, and compare the stock pipeline's images with the student's.

    Args:
        folder: its subfolder `base` has the pipeline.
    """
    network = PipelineDenoiser(pipeline, options=dataset.manifest.call_options).network
    lora = {"lora_rank": 4, "lora_target_modules": lora_layers(network), "learning_rate": rate}
    output = folder / f"lora-{rate:g}"
    trainer = DistillTrainer(pipeline, dataset, DistillConfig(output_dir=output, max_steps=4, **RUN, **lora))
    arguments = trainer.denoiser.call_arguments(PROMPTS[0], 1)
    student = trainer.make_pipeline(trainer.train())
    component, stock = trainer.denoiser.component, load(pipeline, folder / "base")
    expected, base = make_image(student, arguments), make_image(stock, arguments)
    if has_loader(type(pipeline), component):
        stock.load_lora_weights(output, weight_name=WEIGHTS)
        loader = "load_lora_weights"
    elif not hasattr(getattr(stock, component), "load_lora_adapter"):
        setattr(stock, component, PeftModel.from_pretrained(getattr(stock, component), output))
        loader = "PeftModel.from_pretrained"
    else:
        getattr(stock, component).load_lora_adapter(output, prefix=component, weight_name=WEIGHTS)
        loader = "load_lora_adapter"
    images = make_image(load(pipeline, output), arguments), make_image(stock, arguments)
    whole, adapted = (float(np.abs(image - expected).max()) for image in images)
    return Chain(float(np.abs(expected - base).mean()), whole, adapted, loader)


def load(pipeline: Any, folder: Path) -> Any:
    """Load a saved pipeline by its own class. What reads the text, which training leaves alone, is passed."""
    text = ("tokenizer", "processor", "text_encoder", "prompt")
    parts = {name: part for name, part in pipeline.components.items() if name.startswith(text)}
    # A class that is not one of diffusers' does not find networks of its own module.
    own = {name: part for name, part in pipeline.components.items() if isinstance(part, ModelMixin)}
    own = {name: part for name, part in own.items() if not type(part).__module__.startswith("diffusers.")}
    parts |= {name: type(part).from_pretrained(folder / name) for name, part in own.items()}
    return type(pipeline).from_pretrained(folder, **parts)


def make_image(pipeline: Any, arguments: dict[str, Any]) -> np.ndarray:
    """Return an image, or the frames of a video, in levels of 255."""
    pipeline.set_progress_bar_config(disable=True)
    further = {"output_type": "np", "generator": torch.Generator().manual_seed(3)}
    known = inspect.signature(type(pipeline).__call__).parameters
    torch.manual_seed(3)
    made = images_of(pipeline(**{**arguments, **{name: part for name, part in further.items() if name in known}}))
    images = np.stack([np.asarray(image, dtype=np.float32) for image in made])
    return images if np.asarray(made[0]).dtype == np.uint8 else 255 * images


def lora_layers(network: nn.Module) -> tuple[str, ...]:
    """Return the attention layers that training adapts by default, where there are any, and the last linear layer."""
    linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    attention = [end for end in ATTENTION if any(f".{name}".endswith(f".{end}") for name in linear)]
    return (*attention, linear[-1])
