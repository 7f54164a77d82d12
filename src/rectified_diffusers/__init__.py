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

    from rectified_diffusers.animation import interpolate, slerp
    from rectified_diffusers.animation_files import save_animation
    from rectified_diffusers.data.config import RealTripletConfig, TripletConfig
    from rectified_diffusers.data.joined import JoinedTriplets
    from rectified_diffusers.data.prompts import open_prompts, read_prompts
    from rectified_diffusers.data.triplets import TripletDataset, Triplets, generate_triplets, verify_triplets
    from rectified_diffusers.evaluation.config import EvaluationConfig
    from rectified_diffusers.evaluation.evaluate import evaluate
    from rectified_diffusers.evaluation.pictures import read_pictures
    from rectified_diffusers.evaluation.plots import write_plots
    from rectified_diffusers.evaluation.report import Evaluation
    from rectified_diffusers.export import export_diffusers, export_onnx, export_unet
    from rectified_diffusers.inversion import edit, invert, round_trip_error
    from rectified_diffusers.models import StackedUNet
    from rectified_diffusers.pipelines import (
        RectifiedFlowAdapterPipeline,
        RectifiedFlowControlNetImg2ImgPipeline,
        RectifiedFlowControlNetInpaintPipeline,
        RectifiedFlowControlNetPipeline,
        RectifiedFlowImg2ImgPipeline,
        RectifiedFlowInpaintPipeline,
        RectifiedFlowPipeline,
    )
    from rectified_diffusers.pipelines_xl import (
        RectifiedFlowXLControlNetImg2ImgPipeline,
        RectifiedFlowXLControlNetInpaintPipeline,
        RectifiedFlowXLControlNetPipeline,
        RectifiedFlowXLImg2ImgPipeline,
        RectifiedFlowXLInpaintPipeline,
        RectifiedFlowXLPipeline,
    )
    from rectified_diffusers.portable import save_portable
    from rectified_diffusers.real_triplets import generate_real_triplets
    from rectified_diffusers.schedulers import RectifiedFlowEulerScheduler
    from rectified_diffusers.speed.optimize import Optimized, optimize
    from rectified_diffusers.training.config import (
        DistillConfig,
        DistributionMatchingConfig,
        ProgressiveConfig,
        ReflowConfig,
        TrainerConfig,
    )
    from rectified_diffusers.training.distill import DistillTrainer
    from rectified_diffusers.training.matching import DistributionMatchingTrainer
    from rectified_diffusers.training.objective import FlowBatch, FlowObjective
    from rectified_diffusers.training.progressive import ProgressiveTrainer
    from rectified_diffusers.training.reflow import ReflowTrainer
    from rectified_diffusers.training.trainer import Trainer
    from rectified_diffusers.velocity_unet import DiffusionVelocityUNet
    from rectified_diffusers.weights.components import SwappedComponents, swap_components
    from rectified_diffusers.weights.delta import (
        AppliedDelta,
        WeightDelta,
        apply_weight_delta,
        compute_weight_delta,
        load_weight_delta,
    )

__version__ = "0.1.0"

__all__ = [
    "AppliedDelta",
    "DiffusionVelocityUNet",
    "DistillConfig",
    "DistillTrainer",
    "DistributionMatchingConfig",
    "DistributionMatchingTrainer",
    "Evaluation",
    "EvaluationConfig",
    "FlowBatch",
    "FlowObjective",
    "JoinedTriplets",
    "ModelMixin",
    "Optimized",
    "ProgressiveConfig",
    "ProgressiveTrainer",
    "RealTripletConfig",
    "RectifiedFlowAdapterPipeline",
    "RectifiedFlowControlNetImg2ImgPipeline",
    "RectifiedFlowControlNetInpaintPipeline",
    "RectifiedFlowControlNetPipeline",
    "RectifiedFlowEulerScheduler",
    "RectifiedFlowImg2ImgPipeline",
    "RectifiedFlowInpaintPipeline",
    "RectifiedFlowPipeline",
    "RectifiedFlowXLControlNetImg2ImgPipeline",
    "RectifiedFlowXLControlNetInpaintPipeline",
    "RectifiedFlowXLControlNetPipeline",
    "RectifiedFlowXLImg2ImgPipeline",
    "RectifiedFlowXLInpaintPipeline",
    "RectifiedFlowXLPipeline",
    "ReflowConfig",
    "ReflowTrainer",
    "SchedulerMixin",
    "StackedUNet",
    "SwappedComponents",
    "Trainer",
    "TrainerConfig",
    "TripletConfig",
    "TripletDataset",
    "Triplets",
    "WeightDelta",
    "__version__",
    "apply_weight_delta",
    "bundled_checkpoint",
    "compute_weight_delta",
    "edit",
    "evaluate",
    "export_diffusers",
    "export_onnx",
    "export_unet",
    "generate_real_triplets",
    "generate_triplets",
    "interpolate",
    "invert",
    "load_weight_delta",
    "open_prompts",
    "optimize",
    "read_pictures",
    "read_prompts",
    "register",
    "round_trip_error",
    "save_animation",
    "save_portable",
    "slerp",
    "swap_components",
    "verify_triplets",
    "write_plots",
]

_MODULES = {
    "AppliedDelta": "rectified_diffusers.weights.delta",
    "DiffusionVelocityUNet": "rectified_diffusers.velocity_unet",
    "DistillConfig": "rectified_diffusers.training.config",
    "DistillTrainer": "rectified_diffusers.training.distill",
    "DistributionMatchingConfig": "rectified_diffusers.training.config",
    "DistributionMatchingTrainer": "rectified_diffusers.training.matching",
    "Evaluation": "rectified_diffusers.evaluation.report",
    "EvaluationConfig": "rectified_diffusers.evaluation.config",
    "FlowBatch": "rectified_diffusers.training.objective",
    "FlowObjective": "rectified_diffusers.training.objective",
    "JoinedTriplets": "rectified_diffusers.data.joined",
    "Optimized": "rectified_diffusers.speed.optimize",
    "ProgressiveConfig": "rectified_diffusers.training.config",
    "ProgressiveTrainer": "rectified_diffusers.training.progressive",
    "RealTripletConfig": "rectified_diffusers.data.config",
    "RectifiedFlowAdapterPipeline": "rectified_diffusers.pipelines",
    "RectifiedFlowControlNetImg2ImgPipeline": "rectified_diffusers.pipelines",
    "RectifiedFlowControlNetInpaintPipeline": "rectified_diffusers.pipelines",
    "RectifiedFlowControlNetPipeline": "rectified_diffusers.pipelines",
    "RectifiedFlowEulerScheduler": "rectified_diffusers.schedulers",
    "RectifiedFlowImg2ImgPipeline": "rectified_diffusers.pipelines",
    "RectifiedFlowInpaintPipeline": "rectified_diffusers.pipelines",
    "RectifiedFlowPipeline": "rectified_diffusers.pipelines",
    "RectifiedFlowXLControlNetImg2ImgPipeline": "rectified_diffusers.pipelines_xl",
    "RectifiedFlowXLControlNetInpaintPipeline": "rectified_diffusers.pipelines_xl",
    "RectifiedFlowXLControlNetPipeline": "rectified_diffusers.pipelines_xl",
    "RectifiedFlowXLImg2ImgPipeline": "rectified_diffusers.pipelines_xl",
    "RectifiedFlowXLInpaintPipeline": "rectified_diffusers.pipelines_xl",
    "RectifiedFlowXLPipeline": "rectified_diffusers.pipelines_xl",
    "ReflowConfig": "rectified_diffusers.training.config",
    "ReflowTrainer": "rectified_diffusers.training.reflow",
    "StackedUNet": "rectified_diffusers.models",
    "SwappedComponents": "rectified_diffusers.weights.components",
    "Trainer": "rectified_diffusers.training.trainer",
    "TrainerConfig": "rectified_diffusers.training.config",
    "TripletConfig": "rectified_diffusers.data.config",
    "TripletDataset": "rectified_diffusers.data.triplets",
    "Triplets": "rectified_diffusers.data.triplets",
    "WeightDelta": "rectified_diffusers.weights.delta",
    "apply_weight_delta": "rectified_diffusers.weights.delta",
    "compute_weight_delta": "rectified_diffusers.weights.delta",
    "edit": "rectified_diffusers.inversion",
    "evaluate": "rectified_diffusers.evaluation.evaluate",
    "export_diffusers": "rectified_diffusers.export",
    "export_onnx": "rectified_diffusers.export",
    "export_unet": "rectified_diffusers.export",
    "generate_real_triplets": "rectified_diffusers.real_triplets",
    "generate_triplets": "rectified_diffusers.data.triplets",
    "interpolate": "rectified_diffusers.animation",
    "invert": "rectified_diffusers.inversion",
    "load_weight_delta": "rectified_diffusers.weights.delta",
    "open_prompts": "rectified_diffusers.data.prompts",
    "optimize": "rectified_diffusers.speed.optimize",
    "read_pictures": "rectified_diffusers.evaluation.pictures",
    "read_prompts": "rectified_diffusers.data.prompts",
    "round_trip_error": "rectified_diffusers.inversion",
    "save_animation": "rectified_diffusers.animation_files",
    "save_portable": "rectified_diffusers.portable",
    "slerp": "rectified_diffusers.animation",
    "swap_components": "rectified_diffusers.weights.components",
    "verify_triplets": "rectified_diffusers.data.triplets",
    "write_plots": "rectified_diffusers.evaluation.plots",
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
