"""Tensor math of rectified flow. Imports torch and nothing else."""

from .coupling import given, independent, minibatch_optimal_transport
from .interpolation import Coefficients, Cosine, Differentiable, Interpolation, Straight, VariancePreserving
from .loss import LOSS_KINDS, LossKind, endpoint_loss, perceptual_loss, pseudo_huber, velocity_loss
from .ode import Velocity, euler, heun
from .prediction import (
    PREDICTION_TYPES,
    DiffusionAsFlow,
    PredictionType,
    convert_prediction,
    from_pair,
    match_signal_to_noise,
    to_pair,
)
from .time_density import FixedTime, Grid, LogitNormal, TimeDensity, Uniform, UShaped

__all__ = [
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
    "convert_prediction",
    "endpoint_loss",
    "euler",
    "from_pair",
    "given",
    "heun",
    "independent",
    "match_signal_to_noise",
    "minibatch_optimal_transport",
    "perceptual_loss",
    "pseudo_huber",
    "to_pair",
    "velocity_loss",
]
