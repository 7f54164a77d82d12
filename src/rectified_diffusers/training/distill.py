"""Distillation: one step from noise to data, on pairs that a rectified flow made."""

from typing import Any

from torch import Tensor

from rectified_diffusers.data.dataset import TripletDataset, Triplets
from rectified_diffusers.flow.time_density import FixedTime
from rectified_diffusers.models.plain_unet import plain_unet
from rectified_diffusers.training.config import DistillConfig
from rectified_diffusers.training.losses import FlowLoss
from rectified_diffusers.training.trainer import Trainer


class DistillTrainer(Trainer[DistillConfig]):
    """Fit data_hat = noise + v(noise, t = 0) to the data of a 2-Rectified Flow: InstaFlow's last stage.

    The paper (arXiv:2309.06380) trains with `loss="l2"` first and then, from the result, with `loss="lpips"`.
    """

    time_density = FixedTime(0.0)
    validation_steps = (1,)

    def __init__(self, pipeline: Any, dataset: TripletDataset, config: DistillConfig) -> None:
        super().__init__(pipeline, dataset, config)
        self.loss = FlowLoss.of(config.loss, config, self.pipeline.vae, self.device)

    def make_network(self) -> Any:
        network = super().make_network()
        return plain_unet(network) if self.config.plain_unet else network

    def compute_loss(self, batch: Triplets, t: Tensor) -> Tensor:
        # One step from t = 0 takes all the time there is, so the error of the data is the error of the velocity.
        predicted = self.predict_velocity(batch.noise, t, batch.prompts)
        return self.loss(predicted, batch.data - batch.noise, batch.noise, t)
