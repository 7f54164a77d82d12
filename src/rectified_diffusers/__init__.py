"""Rectified flow on diffusers: from a sentence to a picture in one step.

Public names are loaded on first use: importing this package imports neither torch nor diffusers. It does make our
classes known to diffusers, once that is imported (see `registration`; RECTIFIED_DIFFUSERS_REGISTER=0 turns it off).
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectified_diffusers.registration import register, register_unless_disabled

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from rectified_diffusers.data.config import TripletConfig
    from rectified_diffusers.data.triplets import TripletDataset, Triplets, generate_triplets, verify_triplets
    from rectified_diffusers.pipelines import (
        RectifiedFlowImg2ImgPipeline,
        RectifiedFlowInpaintPipeline,
        RectifiedFlowPipeline,
    )
    from rectified_diffusers.schedulers import RectifiedFlowEulerScheduler
    from rectified_diffusers.training.config import DistillConfig, ReflowConfig, TrainerConfig
    from rectified_diffusers.training.distill import DistillTrainer
    from rectified_diffusers.training.reflow import ReflowTrainer
    from rectified_diffusers.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "DistillConfig",
    "DistillTrainer",
    "ModelMixin",
    "RectifiedFlowEulerScheduler",
    "RectifiedFlowImg2ImgPipeline",
    "RectifiedFlowInpaintPipeline",
    "RectifiedFlowPipeline",
    "ReflowConfig",
    "ReflowTrainer",
    "SchedulerMixin",
    "Trainer",
    "TrainerConfig",
    "TripletConfig",
    "TripletDataset",
    "Triplets",
    "__version__",
    "bundled_checkpoint",
    "generate_triplets",
    "register",
    "verify_triplets",
]

_MODULES = {
    "DistillConfig": "rectified_diffusers.training.config",
    "DistillTrainer": "rectified_diffusers.training.distill",
    "RectifiedFlowEulerScheduler": "rectified_diffusers.schedulers",
    "RectifiedFlowImg2ImgPipeline": "rectified_diffusers.pipelines",
    "RectifiedFlowInpaintPipeline": "rectified_diffusers.pipelines",
    "RectifiedFlowPipeline": "rectified_diffusers.pipelines",
    "ReflowConfig": "rectified_diffusers.training.config",
    "ReflowTrainer": "rectified_diffusers.training.reflow",
    "Trainer": "rectified_diffusers.training.trainer",
    "TrainerConfig": "rectified_diffusers.training.config",
    "TripletConfig": "rectified_diffusers.data.config",
    "TripletDataset": "rectified_diffusers.data.triplets",
    "Triplets": "rectified_diffusers.data.triplets",
    "generate_triplets": "rectified_diffusers.data.triplets",
    "verify_triplets": "rectified_diffusers.data.triplets",
    # diffusers' own, because a saved pipeline names this package: the loader looks for a component's base class in it.
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}


def bundled_checkpoint() -> Path:
    """Give the folder of the one-step emoji model that comes with the package, for `from_pretrained`."""
    folder = Path(__file__).parent / "assets" / "emoji-one-step"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"The bundled checkpoint is not in {folder}. It is part of the wheel: reinstall rectified_diffusers, or "
            "make it with the commands of examples/emoji."
        )
    return folder


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_unless_disabled()
