"""Public names and where they live; `__init__.py` loads them on first use, type checkers read them here."""

import pathlib

import diffusers

from .data.config import RealTripletConfig, TripletConfig
from .data.dataset import JoinedTriplets, TripletDataset, Triplets, verify_triplets
from .data.generate import generate_triplets
from .data.generate_real import generate_real_triplets
from .data.prompts import open_prompts, read_prompts
from .data.real_images import read_pictures
from .editing.animation import save_animation
from .editing.interpolation import interpolate, slerp
from .editing.inversion import edit, invert, round_trip_error
from .evaluation.config import EvaluationConfig
from .evaluation.evaluate import evaluate
from .evaluation.plots import write_plots
from .evaluation.report import Evaluation
from .export.onnx import export_onnx
from .export.original_layout import export_unet
from .export.portable import save_portable
from .export.stock import export_diffusers
from .models.stacked_unet import StackedUNet
from .models.velocity_unet import DiffusionVelocityUNet
from .pipelines.registration import register
from .pipelines.scheduler import RectifiedFlowEulerScheduler
from .pipelines.stable_diffusion import (
    RectifiedFlowAdapterPipeline,
    RectifiedFlowControlNetImg2ImgPipeline,
    RectifiedFlowControlNetInpaintPipeline,
    RectifiedFlowControlNetPipeline,
    RectifiedFlowImg2ImgPipeline,
    RectifiedFlowInpaintPipeline,
    RectifiedFlowPipeline,
)
from .pipelines.stable_diffusion_xl import (
    RectifiedFlowXLControlNetImg2ImgPipeline,
    RectifiedFlowXLControlNetInpaintPipeline,
    RectifiedFlowXLControlNetPipeline,
    RectifiedFlowXLImg2ImgPipeline,
    RectifiedFlowXLInpaintPipeline,
    RectifiedFlowXLPipeline,
)
from .speed.optimize import Optimized, optimize
from .training.config import DistillConfig, DistributionMatchingConfig, ProgressiveConfig, ReflowConfig, TrainerConfig
from .training.distill import DistillTrainer
from .training.dmd import DistributionMatchingTrainer
from .training.objective import FlowBatch, FlowObjective
from .training.progressive import ProgressiveTrainer
from .training.reflow import ReflowTrainer
from .training.trainer import Trainer
from .weights.components import SwappedComponents, swap_components
from .weights.delta import AppliedDelta, WeightDelta, apply_weight_delta, compute_weight_delta, load_weight_delta

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

__version__: str
ModelMixin = diffusers.ModelMixin
SchedulerMixin = diffusers.SchedulerMixin

def bundled_checkpoint() -> pathlib.Path: ...
