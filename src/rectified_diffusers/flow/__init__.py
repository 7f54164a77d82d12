"""Tensor math of rectified flow. Imports torch and nothing else."""

from .interpolation import Coefficients, Cosine, Interpolation, Straight, VariancePreserving
from .loss import LOSS_KINDS, LossKind, pseudo_huber, velocity_loss
from .ode import Velocity, euler, heun
from .prediction import DIFFUSION_TYPES, DiffusionAsFlow, PredictionType, scale_of
from .time_density import FixedTime, Grid, LogitNormal, TimeDensity, Uniform, UShaped

__all__ = [
    "DIFFUSION_TYPES",
    "LOSS_KINDS",
    "Coefficients",
    "Cosine",
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
    "euler",
    "heun",
    "pseudo_huber",
    "scale_of",
    "velocity_loss",
]
