"""Tensor math of rectified flow. Imports torch and nothing else."""

from .interpolation import Coefficients, Cosine, Differentiable, Interpolation, Straight, VariancePreserving
from .loss import LOSS_KINDS, LossKind, endpoint_loss, perceptual_loss, pseudo_huber, velocity_loss
from .ode import Velocity, euler, heun
from .prediction import (
    DIFFUSION_TYPES,
    PREDICTION_TYPES,
    DiffusionAsFlow,
    PredictionType,
    from_pair,
    match_signal_to_noise,
    scale_of,
    to_pair,
)
from .time_density import FixedTime, Grid, LogitNormal, TimeDensity, Uniform, UShaped

__all__ = [
    "DIFFUSION_TYPES",
    "LOSS_KINDS",
    "PREDICTION_TYPES",
    "Coefficients",
    "Cosine",
    "Differentiable",
    "DiffusionAsFlow",
    "FixedTime",
    "Grid",
    "Interpolation",
    "LogitNormal",
    "LossKind",
    "PredictionType",
    "Straight",
    "TimeDensity",
    "UShaped",
    "Uniform",
    "VariancePreserving",
    "Velocity",
    "endpoint_loss",
    "euler",
    "from_pair",
    "heun",
    "match_signal_to_noise",
    "perceptual_loss",
    "pseudo_huber",
    "scale_of",
    "to_pair",
    "velocity_loss",
]
