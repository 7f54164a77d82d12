"""Reflow: straighten a flow by training on the pairs that a teacher made."""

from typing import Any

from torch import Tensor

from rectified_diffusers.data.dataset import TripletDataset, Triplets
from rectified_diffusers.flow.time_density import LogitNormal, Uniform, UShaped
from rectified_diffusers.training.config import ReflowConfig
from rectified_diffusers.training.losses import FlowLoss
from rectified_diffusers.training.trainer import Trainer


class ReflowTrainer(Trainer[ReflowConfig]):
    """Fit the velocity on (noise, data) pairs that a teacher coupled: one round of reflow.

    Minimises E ||(data - noise) - v(x_t, t)||^2 with x_t = t * data + (1 - t) * noise, Eq. (1) of arXiv:2209.03003.
    Start from the teacher itself, an epsilon model or a flow; run it again on the result's triplets for a k-th reflow.
    The other losses have the same minimum only where few paths cross, so that one velocity is right: 2-RF++
    (arXiv:2405.20320) finds that of the pairs of a good teacher.
    """

    validation_steps = (1, 25)

    def __init__(self, pipeline: Any, dataset: TripletDataset, config: ReflowConfig) -> None:
        super().__init__(pipeline, dataset, config)
        densities = {"uniform": Uniform, "logit_normal": LogitNormal, "u_shaped": UShaped}
        self.time_density = densities[config.time_density]()
        self.prompt_dropout = config.prompt_dropout
        self.loss = FlowLoss.of(config.loss, config, self.pipeline.vae, self.device, weigh_by_time=True)

    def compute_loss(self, batch: Triplets, t: Tensor) -> Tensor:
        x_t, velocity = self.interpolation.interpolate(batch.noise, batch.data, t)
        return self.loss(self.predict_velocity(x_t, t, batch.prompts), velocity, x_t, t)
