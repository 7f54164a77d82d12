"""Distribution matching for one-step models, with a discriminator (DMD, arXiv:2311.18828; DMD2, arXiv:2405.14867)."""

import copy
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from rectified_diffusers.data.dataset import TripletDataset, Triplets
from rectified_diffusers.data.teacher import fingerprint
from rectified_diffusers.flow.interpolation import per_example
from rectified_diffusers.flow.loss import velocity_loss
from rectified_diffusers.models.denoiser import Conditioning
from rectified_diffusers.models.velocity import guided
from rectified_diffusers.pipelines.scheduler import require_straight
from rectified_diffusers.training.checkpoint import Checkpoint
from rectified_diffusers.training.config import DistributionMatchingConfig
from rectified_diffusers.training.guards import ROWS, require_direction, require_same_text
from rectified_diffusers.training.lora import add_lora
from rectified_diffusers.training.losses import FlowLoss
from rectified_diffusers.training.prompts import PromptEncoder
from rectified_diffusers.training.sharding import copy_weights, trainable
from rectified_diffusers.training.student import denoiser_for, initial_network
from rectified_diffusers.training.trained import Update, load_optimizer_tensors, make_optimizer, optimizer_tensors
from rectified_diffusers.training.trainer import Trainer

_LEAST_DISTANCE = 1e-4  # lower bound of the distance between student and teacher data, which is a divisor


def matching_gradient(data: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Return (fake - real) / mean |data - real|, the gradient of DMD by the data `(B, C, H, W)`; mean per example.

    The opposite direction leads to data that is more likely under the teacher than under the student. By Tweedie's
    formula, score = (t * E[data | x_t] - x_t) / (1 - t)^2, so the difference of two scores at x_t is the difference of
    the two estimates times t / (1 - t)^2. DMD (arXiv:2311.18828) replaces this factor with the division.

    Args:
        real, fake: E[data | x_t] at the same noisy x_t of the data, for the teacher's data and for the student's.
    """
    distance = (data - real).abs().flatten(1).mean(1).clamp(min=_LEAST_DISTANCE)
    return (fake - real) / per_example(distance, data)


class DistributionMatchingTrainer(Trainer[DistributionMatchingConfig]):
    """Match the distribution of data = noise + v(noise, t = 0) to the teacher's: DMD2 (arXiv:2405.14867).

    Two networks predict a velocity at the student's data mixed with new noise, x_t = t * data + (1 - t) * new noise:
    the frozen teacher and the fake network. The fake network is initialized with the teacher's velocity without
    guidance and learns the student's data online, with the flow's loss. Where their estimates x_t + (1 - t) * v
    differ, the student moves from the fake estimate toward the teacher's, see `matching_gradient`. One step updates
    the fake velocity `fake_updates` times and the student once. The student should already generate in one step.

    With real images, the student can surpass its teacher. A `Discriminator` on the fake velocity's U-Net learns to
    separate their x_t from those of the student's data. Its terms are added to the losses: -log D(x_t) to the
    student's, -log(1 - D(x_t)) - log D(x_t of real data) to the fake velocity's, with D = sigmoid(logits).

    Only the prompts of the triplets are used, and noise is new at every update, unless `regression_weight` is set:
    then the student uses the noise of the triplets, and DMD's distance to their data (arXiv:2311.18828) is added to
    its loss. The multi-step variant of DMD2 is not implemented.

    Args:
        pipeline: pipeline of the student, a flow; or a diffusion model with `initialisation="snr_matching"`.
        teacher: a diffusion pipeline, or a flow trained on new noise for its data, with the VAE and the text encoders
            of the student. A reflowed model is unsuitable: its velocity depends on the noise paired with its data.
        real: triplets of real images, of which the data and the prompts are used, but not the noise.
    """

    validation_steps = (1,)
    figures = ("loss", "grad_norm", "fake_loss")

    def __init__(
        self,
        pipeline: Any,
        dataset: TripletDataset,
        config: DistributionMatchingConfig,
        teacher: Any,
        real: TripletDataset | None = None,
    ) -> None:
        if real is not None and getattr(config, "mixed_precision", None) == "fp16":
            raise ValueError(
                "What the discriminator says of the student's data has gradients too small for float16, got "
                "mixed_precision='fp16'. Use bf16 or no."
            )
        super().__init__(pipeline, dataset, config)
        if not self.starts_as_flow:
            raise ValueError(
                f"Distribution matching needs a student that predicts a velocity, got {type(pipeline).__name__} with "
                f"{type(pipeline.scheduler).__name__}. Set initialisation='snr_matching', or distil it first."
            )
        if self.sharded:
            raise ValueError(
                "Distribution matching trains two networks in turn, which FSDP is not told of here. Launch it without "
                "FSDP, and with lora_rank if memory is short."
            )
        kind = config.regression_loss if config.regression_weight else "l2"
        self.regression = FlowLoss.of(kind, config, pipeline.vae, self.device)
        self.real = denoiser_for(teacher, dataset)
        require_straight(teacher.scheduler, "Distribution matching")
        self.real.guidance = config.teacher_guidance_scale
        prompts = dataset.rows(range(min(4, len(dataset)))).prompts
        require_same_text(self.prompt_encoder.encode(prompts), self.real.encode(prompts, teacher.device))
        self.real_data: Any = real
        self.discriminator: Any = None  # of the fake network, if there are real images
        if real is not None:
            denoiser_for(pipeline, real)
            shapes = [triplets.manifest.latent_shape for triplets in (dataset, real)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"The real pictures must be as large as those of the triplets, got latents {shapes[1]} and "
                    f"{shapes[0]}. Make the real triplets at the size of the others."
                )
            self.real_prompts = PromptEncoder(self.denoiser, self.device)
        self.teacher = self.make_teacher().to(self.device).requires_grad_(False).eval()
        self.fake = self.make_fake()
        optimizer = make_optimizer(trainable(self.fake), config, self.device)
        self.fake_model, self.fake_optimizer = self.accelerator.prepare(self.fake, optimizer)
        self.fake_update = Update(
            self.accelerator, self.fake_model, self.fake_optimizer, trainable(self.fake), config, self.output
        )

    @property
    def fits_pairs(self) -> bool:
        return self.config.regression_weight > 0

    def make_teacher(self) -> Any:
        """Return a float32 network that predicts the teacher's velocity; the pipeline's network is not changed."""
        return initial_network(self.real, "weights" if self.real.diffusion() is None else "snr_matching")

    def make_fake(self) -> Any:
        """Return the network of the fake velocity, a copy of the teacher's; with lora_rank, only a LoRA is trained.

        With real images, all weights of the discriminator are trained in either case.
        """
        network = copy.deepcopy(self.teacher).requires_grad_(True).train()
        if self.config.lora_rank is not None:
            add_lora(network, self.config)
        if self.real_data is not None:
            self.discriminator = Discriminator(network, self.config.seed)
        if self.config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return network

    @property
    def checkpoint_bytes(self) -> int:
        return super().checkpoint_bytes + 3 * sum(weight.nbytes for weight in self.fake_update.parameters)

    def begin(self, step: int) -> None:
        """Also check that the velocity of a flow teacher has the sign that its scheduler states."""
        super().begin(step)
        if self.real_data is not None:
            self.real_prompts.remember(self.real_data)
        if step == 0 and self.real.diffusion() is None:
            rows = torch.arange(min(ROWS, self.config.micro_batch_size or ROWS, len(self.dataset)))
            require_direction(self.ask_teacher, self.read(rows, torch.zeros(len(rows)).bool()))

    def draw(self, step: int, use: str = "") -> tuple[Tensor, ...]:
        """Sample the inputs of an update for the full batch: rows, times, initial noise, noise to mix with the data.

        With real images, also sample their rows and the noise to mix with them.
        """
        config, generator = self.config, self.generator_for(step, use)
        rows = torch.randint(len(self.dataset), (config.batch_size,), generator=generator)
        t = config.min_t + (config.max_t - config.min_t) * torch.rand(config.batch_size, generator=generator)
        shape = (config.batch_size, *self.dataset.manifest.latent_shape)
        drawn = rows, t, *(torch.randn(shape, generator=generator) for _ in range(2))
        if self.real_data is None:
            return drawn
        real_rows = torch.randint(len(self.real_data), (config.batch_size,), generator=generator)
        return *drawn, real_rows, torch.randn(shape, generator=generator)

    def train_step(self, step: int) -> tuple[float, ...]:
        """Update the fake velocity, then the student; return the student's loss, its gradient norm, the fake loss."""
        config = self.config
        rate = config.fake_learning_rate or config.learning_rate
        for number in range(config.first_fake_updates if step == 1 else 0):
            self.train_fake(step, f"/first-{number}", rate)
        rate *= self.lr_factor(step)
        losses = [self.train_fake(step, f"/fake-{number}", rate) for number in range(config.fake_updates)]
        return *super().train_step(step), math.fsum(losses) / len(losses)

    def train_fake(self, step: int, use: str, rate: float) -> float:
        """Update the fake velocity once at learning rate `rate` and return its loss."""
        seed = self.generator_for(step, use).initial_seed()
        return self.fake_update(step, self.draw(step, use), self.fake_losses, rate, seed)[0]

    def fake_losses(self, *drawn: Tensor) -> Tensor:
        """Return the flow loss of the fake velocity on the student's data for each example.

        With real images, the loss of the discriminator is added, computed on an equal number of real images.
        """
        batch, t, new_noise = self.on_device(*drawn[:4])
        told = self.prompt_encoder(batch.prompts)
        with torch.no_grad():
            data = batch.noise + self.one_step_velocity(batch.noise, told)
        x_t, velocity = self.interpolation.interpolate(new_noise, data, t)
        if self.discriminator is None:
            return velocity_loss(self.ask(self.real, self.fake_model, x_t, t, told), velocity)
        real_rows, real_noise = drawn[4:]
        real_x_t, real_told = self.read_real(real_rows, real_noise, t)
        both = {name: torch.cat([part, real_told[name]]) for name, part in told.items()}
        answer = self.ask(self.real, self.fake_model, torch.cat([x_t, real_x_t]), t.repeat(2), both)
        made, real = self.discriminator.logits.chunk(2)
        losses = softplus(made) + softplus(-real)
        return velocity_loss(answer[: len(x_t)], velocity) + self.config.discriminator_weight * losses

    def read_real(self, rows: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Conditioning]:
        """Return real data mixed with noise, on the device, and the conditioning from its prompts."""
        batch = self.real_data.rows(rows.tolist())
        self.real_prompts.lend(batch)
        x_t, _ = self.interpolation.interpolate(noise.to(self.device), batch.data.to(self.device), t)
        return x_t, self.real_prompts(batch.prompts)

    def example_losses(self, *drawn: Tensor) -> Tensor:
        batch, t, new_noise = self.on_device(*drawn[:4])
        return self.compute_loss(batch, t, new_noise)

    def on_device(self, rows: Tensor, t: Tensor, noise: Tensor, new_noise: Tensor) -> tuple[Triplets, Tensor, Tensor]:
        """Move the sampled inputs to the device: prompts with initial noise, times, and noise to mix with the data."""
        batch = self.read(rows, torch.zeros(len(rows)).bool())
        if not self.config.regression_weight:
            batch = replace(batch, noise=noise.to(self.device))
        return batch, t.to(self.device), new_noise.to(self.device)

    def one_step_velocity(self, noise: Tensor, told: Conditioning) -> Tensor:
        """Return the student's velocity at t = 0, which equals its data minus the noise."""
        return self.ask(self.denoiser, self.model, noise, torch.zeros(len(noise), device=self.device), told)

    def compute_loss(self, batch: Triplets, t: Tensor, new_noise: Tensor | None = None) -> Tensor:
        """Return the student's loss of each example: a term whose gradient is `matching_gradient`, plus added losses.

        Args:
            batch: triplets whose noise is the student's initial noise.
            t: times at which the two velocities are compared.
            new_noise: noise to mix with the student's data at these times; sampled if not given.
        """
        told, noise = self.prompt_encoder(batch.prompts), batch.noise
        velocity = self.one_step_velocity(noise, told)
        data = noise + velocity
        new_noise = torch.randn_like(noise) if new_noise is None else new_noise
        gradient = self.gradient(data.detach(), new_noise, t, told)
        loss = (data - (data - gradient).detach()).square().flatten(1).mean(1) / 2
        if self.discriminator is not None:
            loss = loss + self.config.adversarial_weight * self.adversarial_loss(data, new_noise, t, told)
        weight = self.config.regression_weight
        if not weight:
            return loss
        return loss + weight * self.regression(velocity, batch.data - noise, noise, torch.zeros_like(t))

    def adversarial_loss(self, data: Tensor, new_noise: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        """Return -log D(x_t) of each example, with a gradient for the data only, not for the fake network."""
        with torch.enable_grad():
            seen = data.detach().requires_grad_()
            self.ask(self.real, self.fake, self.interpolation.interpolate(new_noise, seen, t)[0], t, told)
            losses = softplus(-self.discriminator.logits)
            (slope,) = torch.autograd.grad(losses.sum(), seen)
        return losses.detach() + (slope * (data - data.detach())).flatten(1).sum(1)

    @torch.no_grad()
    def gradient(self, data: Tensor, new_noise: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        """Return the gradient for the student's data, computed from both velocities at x_t."""
        x_t, _ = self.interpolation.interpolate(new_noise, data, t)
        remaining = per_example(1 - t, x_t)
        fake = x_t + remaining * self.ask(self.real, self.fake, x_t, t, told)
        return matching_gradient(data, x_t + remaining * self.teacher_velocity(x_t, t, told), fake)

    def ask_teacher(self, x_t: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        return self.ask(self.real, self.teacher, x_t, t, self.prompt_encoder(prompts))

    def teacher_velocity(self, x_t: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        """Return the teacher's guided velocity."""
        null = self.prompt_encoder([""]) if self.real.two_passes else None
        return guided(partial(self.ask, self.real, self.teacher), x_t, t, told, null, self.real.guidance)

    def identity(self) -> dict[str, Any]:
        own: dict[str, Any] = {"teacher_sha256": fingerprint({self.real.component: self.real.network})}
        if self.real_data is not None:
            own |= {"real_rows": len(self.real_data), "real_manifest": self.real_data.manifest.fingerprint}
        return {**super().identity(), **own}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint, without the teacher, which belongs to another pipeline."""
        fake = {name: weight.detach() for name, weight in self.fake.named_parameters() if weight.requires_grad}
        optimizer = optimizer_tensors(self.fake_model, self.fake_optimizer.optimizer)
        return {**super().tensors(), "fake.safetensors": fake, "fake_optimizer.safetensors": optimizer}

    def load(self, checkpoint: Checkpoint) -> None:
        super().load(checkpoint)
        tensors = checkpoint.tensors
        load_optimizer_tensors(self.fake_model, self.fake_optimizer.optimizer, tensors["fake_optimizer.safetensors"])
        weights = [name for name, weight in self.fake.named_parameters() if weight.requires_grad]
        copy_weights((tensors["fake.safetensors"][name] for name in weights), self.fake_update.parameters)


class Discriminator(nn.Module):
    """Classify noisy data as real or as the student's from a U-Net's middle block; logits above 0 mean real.

    It is added to the U-Net as `unet.discriminator`, is trained along with it and runs in each forward pass of the
    U-Net: `logits` `(B,)`, float32, are those of the last pass. The features of the U-Net depend on time and prompt,
    so the logits do too. The images can have any size.

    Args:
        unet: any U-Net with a `mid_block`, such as those of diffusers.
        seed: seed of the initial weights; equal seeds give equal weights.
    """

    logits: Tensor

    def __init__(self, unet: Any, seed: int) -> None:
        super().__init__()
        if getattr(unet, "mid_block", None) is None:
            raise ValueError(
                f"The discriminator sits on the middle block of a U-Net, which {type(unet).__name__} does not have. "
                "Train without real triplets."
            )
        channels, groups = unet.config["block_out_channels"][-1], unet.config["norm_num_groups"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, channels, 3, stride=2, padding=1),
                nn.GroupNorm(groups, channels),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(channels, 1),
            )
        self.to(next(unet.parameters()).device)
        unet.mid_block.register_forward_hook(lambda module, inputs, features: self(features))
        unet.discriminator = self

    def forward(self, features: Tensor) -> None:
        self.logits = self.layers(features)[:, 0].float()
