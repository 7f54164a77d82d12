"""Progressive distillation: in each round, a student learns to do in one step what its teacher does in two."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.data.dataset import TripletDataset, Triplets
from rectified_diffusers.flow.time_density import Grid
from rectified_diffusers.models.guidance import guide
from rectified_diffusers.pipelines.scheduler import require_straight
from rectified_diffusers.seeds import generator_of
from rectified_diffusers.training.checkpoint_reading import StoredCheckpoint
from rectified_diffusers.training.config import ProgressiveConfig
from rectified_diffusers.training.losses import FlowLoss
from rectified_diffusers.training.sharding import copy_weights, freeze
from rectified_diffusers.training.trainer import Trainer

TEACHER = "teacher.safetensors"


class ProgressiveTrainer(Trainer[ProgressiveConfig]):
    """Halve the steps of a flow round by round, Algorithm 2 of arXiv:2202.00512 on the straight path.

    A student of N steps learns, at t = 0, 1/N, ..., (N - 1)/N, the mean of its teacher's velocities over two Euler
    steps of 1/(2N) from x_t, which leads to the same point. It is initialized with its teacher's weights; its averaged
    weights become the next teacher. Euler on the straight path is DDIM, so for a diffusion model that `initialisation`
    converts to a velocity model the rounds are those of the paper, with the loss on the velocity instead of the data.

    The pipeline must be a flow, or be converted to one with `initialisation="snr_matching"`. Training uses the data of
    the triplets, and their noise only with `pairs="coupled"`.

    Example:
        ```python
        config = ProgressiveConfig(output_dir=Path("few-steps"), teacher_steps=2, steps_per_round=1000)
        ProgressiveTrainer(pipeline, triplets, config).train()
        one_step = RectifiedFlowPipeline.from_pretrained("few-steps")
        ```
    """

    needs_flow = True

    def __init__(self, pipeline: Any, dataset: TripletDataset, config: ProgressiveConfig) -> None:
        super().__init__(pipeline, dataset, config)
        require_straight(pipeline.scheduler, "Progressive distillation")
        self.validation_steps = (config.student_steps, 2 * config.student_steps, 4 * config.student_steps)
        self.prompt_dropout = config.prompt_dropout
        if config.teacher_guidance_scale > 1:
            self.denoiser.guide(config.teacher_guidance_scale)
        self.guides_first_teacher = config.teacher_guidance_scale > 1 and self.denoiser.two_passes
        self.loss = FlowLoss.of(config.loss, config, self.denoiser, self.device)
        self.teacher, self.is_first_teacher = self.first_teacher(), True
        self.step = 1

    def first_teacher(self) -> Any:
        """Return the teacher of the first round, the pipeline's own network, which no checkpoint contains."""
        return freeze(self.make_network(), self.accelerator)

    @property
    def fits_pairs(self) -> bool:
        return self.config.pairs == "coupled"

    @property
    def schedule_steps(self) -> int:
        return self.config.steps_per_round

    def round_of(self, step: int) -> int:
        """Return the round of a step; rounds count from 0, steps from 1."""
        return (step - 1) // self.config.steps_per_round

    def steps_of(self, step: int) -> int:
        """Return the number N of Euler steps that the student learns to use at an optimizer step."""
        return self.config.teacher_steps >> (self.round_of(step) + 1)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step; the schedule restarts with each round."""
        return super().learning_rate((step - 1) % self.config.steps_per_round + 1)

    def sample_inputs(self, step: int, use: str = "") -> tuple[Tensor, ...]:
        """Sample rows, times on the student's grid and dropped prompts."""
        self.time_density = Grid(self.steps_of(step))
        return super().sample_inputs(step, use)

    def train_step(self, step: int) -> tuple[float, ...]:
        """Do one update; the first update of a round makes the student the teacher."""
        self.step = step
        if step > 1 and self.round_of(step) > self.round_of(step - 1):
            self.begin_round()
        return super().train_step(step)

    def begin_round(self) -> None:
        """Set teacher and student to the averaged weights of the student, and reset the optimizer and the average."""
        self.student.restart()
        teacher = dict(self.teacher.named_parameters())
        copy_weights(self.student.parameters, [teacher[name] for name in self.student.names])

    def read(self, rows: Tensor, dropped: Tensor) -> Triplets:
        """Read triplets; with independent pairs, the noise of a row is sampled from (seed, step, row)."""
        batch = super().read(rows, dropped)
        if self.config.pairs == "coupled":
            return batch
        shape = batch.noise.shape[1:]
        seed, step = self.config.seed, self.step
        noise = [torch.randn(shape, generator=generator_of(seed, step, row)) for row in rows.tolist()]
        return replace(batch, noise=torch.stack(noise).to(self.device))

    def compute_loss(self, batch: Triplets, t: Tensor) -> Tensor:
        x_t, _ = self.interpolation.interpolate(batch.noise, batch.data, t)
        target = self.teacher_velocity(x_t, t, batch.prompts)
        return self.loss(self.predict_velocity(x_t, t, batch.prompts), target, x_t, t)

    @torch.no_grad()
    def teacher_velocity(self, x_t: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        """Return the velocity that moves x_t in one step to the end point of the teacher's two steps."""
        half = 0.5 / self.steps_of(self.step)
        first = self.predict_teacher(x_t, t, prompts)
        second = self.predict_teacher(x_t + half * first, t + half, prompts)
        return (first + second) / 2

    def predict_teacher(self, x_t: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        """Return the teacher's velocity; the first teacher is guided, later teachers have learned the guidance."""
        velocity = self.predict_velocity(x_t, t, prompts, self.teacher)
        if not self.guides_first_teacher or self.round_of(self.step) > 0:
            return velocity
        null = self.predict_velocity(x_t, t, [""] * len(prompts), self.teacher)
        return guide(null, velocity, self.denoiser.guidance)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint, without the first teacher, which is the pipeline's own network."""
        if self.round_of(self.step) == 0:
            return super().tensors()
        names, teacher = self.student.names, dict(self.teacher.named_parameters())
        return {**super().tensors(), TEACHER: {name: teacher[name] for name in names}}

    def targets(self, checkpoint: StoredCheckpoint) -> dict[str, dict[str, Tensor]]:
        stored = checkpoint.tensors(TEACHER)
        if stored:
            self.is_first_teacher = False  # loading may change it even if the checkpoint is damaged
        elif not self.is_first_teacher:
            self.teacher, self.is_first_teacher = self.first_teacher(), True
        teacher = dict(self.teacher.named_parameters())
        return {**super().targets(checkpoint), TEACHER: {name: teacher[name] for name in stored}}

    def restore(self, checkpoint: StoredCheckpoint, tensors: dict[str, dict[str, Tensor]]) -> None:
        super().restore(checkpoint, tensors)
        self.step = checkpoint.step
