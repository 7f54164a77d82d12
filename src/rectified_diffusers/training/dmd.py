"""Distribution matching for one-step models (DMD, arXiv:2311.18828; DMD2, arXiv:2405.14867), with a discriminator."""

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from rectified_diffusers.data.dataset import TripletDataset, Triplets, manifest_digest
from rectified_diffusers.data.teacher import fingerprint
from rectified_diffusers.flow.interpolation import per_example
from rectified_diffusers.flow.loss import velocity_loss
from rectified_diffusers.models.denoiser import Conditioning
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

_LEAST_DISTANCE = 1e-4  # of the student's data from the teacher's, for the division by it


def matching_gradient(data: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Give (fake - real) / mean |data - real|, the gradient of DMD by the data `(B, C, H, W)`; mean per example.

    Against it lies where the teacher finds the data more likely than the student makes it: by Tweedie's formula
    score = (t * E[data | x_t] - x_t) / (1 - t)^2, so that the difference of two scores at x_t is that of the two
    estimates times t / (1 - t)^2, in whose place DMD (arXiv:2311.18828) puts the division.

    Args:
        real, fake: E[data | x_t] at one noisy x_t of the data, for the teacher's data and for the student's.
    """
    distance = (data - real).abs().flatten(1).mean(1).clamp(min=_LEAST_DISTANCE)
    return (fake - real) / per_example(distance, data)


class DistributionMatchingTrainer(Trainer[DistributionMatchingConfig]):
    """Move the distribution of data = noise + v(noise, t = 0) to the teacher's: DMD2 (arXiv:2405.14867).

    Two velocities look at the student's data with new noise in it, x_t = t * data + (1 - t) * new noise: the frozen
    teacher's, and the fake one, which begins as the teacher's without guidance and learns online, by the flow's loss,
    the data that the student makes. Where their estimates x_t + (1 - t) * v differ, the student goes from the fake
    one's towards the teacher's, see `matching_gradient`. One step updates the fake velocity `fake_updates` times and
    the student once. It is a finish for a student that draws in one step already.

    With real pictures the student may go past its teacher: a `Discriminator` on the fake velocity's U-Net learns to
    tell their x_t from those of the student's data, and what it says is added to the losses, -log D(x_t) to the
    student's, -log(1 - D(x_t)) - log D(x_t of real data) to the fake velocity's, with D = sigmoid(logits).

    Of the triplets, the prompts take part; noise is new at every update, unless `regression_weight` is set: then the
    student's is the triplets', and DMD's distance to their data (arXiv:2311.18828) is added to its loss. DMD2's
    several steps are not here.

    Args:
        pipeline: of the student, a flow; or a diffusion model with `initialisation="snr_matching"`.
        teacher: a diffusion pipeline, or a flow trained on new noise for its data, with the VAE and the text encoders
            of the student. A reflowed one will not do: its velocity knows the noise that its data came from.
        real: triplets of real pictures, whose data and prompts take part, and not their noise.
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
        self.real.guidance = config.teacher_guidance_scale
        prompts = dataset.rows(range(min(4, len(dataset)))).prompts
        require_same_text(self.prompt_encoder.encode(prompts), self.real.encode(prompts, teacher.device))
        self.real_data: Any = real
        self.discriminator: Any = None  # of the fake network, if there are real pictures
        if real is not None:
            denoiser_for(pipeline, real)
            shapes = [tuple(triplets.manifest["latent_shape"]) for triplets in (dataset, real)]
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
        """Make a network that gives the teacher's velocity, in float32; the pipeline's own is left alone."""
        return initial_network(self.real, "weights" if self.real.diffusion() is None else "snr_matching")

    def make_fake(self) -> Any:
        """Make the network of the fake velocity, a copy of the teacher's; with lora_rank a LoRA of it is trained.

        The discriminator, if there are real pictures, is trained whole in any case.
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
        """Find out, too, whether a teacher that is a flow has the sign that its scheduler says."""
        super().begin(step)
        if self.real_data is not None:
            self.real_prompts.remember(self.real_data)
        if step == 0 and self.real.diffusion() is None:
            rows = torch.arange(min(ROWS, self.config.micro_batch_size or ROWS, len(self.dataset)))
            require_direction(self.ask_teacher, self.read(rows, torch.zeros(len(rows)).bool()))

    def draw(self, step: int, use: str = "") -> tuple[Tensor, ...]:
        """Draw what an update sees, for the whole batch: rows, times, noise to begin with, noise to mix with data.

        With real pictures, further: their rows, and the noise to mix with them.
        """
        config, generator = self.config, self.generator_for(step, use)
        rows = torch.randint(len(self.dataset), (config.batch_size,), generator=generator)
        t = config.min_t + (config.max_t - config.min_t) * torch.rand(config.batch_size, generator=generator)
        shape = (config.batch_size, *self.dataset.manifest["latent_shape"])
        drawn = rows, t, *(torch.randn(shape, generator=generator) for _ in range(2))
        if self.real_data is None:
            return drawn
        real_rows = torch.randint(len(self.real_data), (config.batch_size,), generator=generator)
        return *drawn, real_rows, torch.randn(shape, generator=generator)

    def train_step(self, step: int) -> tuple[float, ...]:
        """Update the fake velocity, then the student; give the student's loss and gradient norm, and the fake loss."""
        config = self.config
        rate = config.fake_learning_rate or config.learning_rate
        for number in range(config.first_fake_updates if step == 1 else 0):
            self.train_fake(step, f"/first-{number}", rate)
        rate *= self.lr_factor(step)
        losses = [self.train_fake(step, f"/fake-{number}", rate) for number in range(config.fake_updates)]
        return *super().train_step(step), math.fsum(losses) / len(losses)

    def train_fake(self, step: int, use: str, rate: float) -> float:
        """Do one update of the fake velocity at a learning rate; give its loss."""
        seed = self.generator_for(step, use).initial_seed()
        return self.fake_update(step, self.draw(step, use), self.fake_losses, rate, seed)[0]

    def fake_losses(self, *drawn: Tensor) -> Tensor:
        """Give the flow's loss of the fake velocity on data that the student makes, for each example.

        With real pictures, the discriminator's is added, which sees as many of them.
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
        """Read real data to the device, with noise in it, and what the networks are told of its prompts."""
        batch = self.real_data.rows(rows.tolist())
        self.real_prompts.lend(batch)
        x_t, _ = self.interpolation.interpolate(noise.to(self.device), batch.data.to(self.device), t)
        return x_t, self.real_prompts(batch.prompts)

    def example_losses(self, *drawn: Tensor) -> Tensor:
        batch, t, new_noise = self.on_device(*drawn[:4])
        return self.compute_loss(batch, t, new_noise)

    def on_device(self, rows: Tensor, t: Tensor, noise: Tensor, new_noise: Tensor) -> tuple[Triplets, Tensor, Tensor]:
        """Put on the device what was drawn: prompts and noise to begin with, times, and noise to mix with data."""
        batch = self.read(rows, torch.zeros(len(rows)).bool())
        if not self.config.regression_weight:
            batch = replace(batch, noise=noise.to(self.device))
        return batch, t.to(self.device), new_noise.to(self.device)

    def one_step_velocity(self, noise: Tensor, told: Conditioning) -> Tensor:
        """Give the student's velocity at t = 0, which is its data less the noise."""
        return self.ask(self.denoiser, self.model, noise, torch.zeros(len(noise), device=self.device), told)

    def compute_loss(self, batch: Triplets, t: Tensor, new_noise: Tensor | None = None) -> Tensor:
        """Give the student's loss of each example: one whose gradient is `matching_gradient`, and what is added to it.

        Args:
            batch: its noise is what the student begins with.
            t: times at which the two velocities are compared.
            new_noise: what is mixed with the student's data there; drawn here if not given.
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
        """Give -log D(x_t), of each example, whose gradient is that of the data alone and not the fake network's."""
        with torch.enable_grad():
            seen = data.detach().requires_grad_()
            self.ask(self.real, self.fake, self.interpolation.interpolate(new_noise, seen, t)[0], t, told)
            losses = softplus(-self.discriminator.logits)
            (slope,) = torch.autograd.grad(losses.sum(), seen)
        return losses.detach() + (slope * (data - data.detach())).flatten(1).sum(1)

    @torch.no_grad()
    def gradient(self, data: Tensor, new_noise: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        """Give the direction, against which the student's data shall go, by what both velocities make of x_t."""
        x_t, _ = self.interpolation.interpolate(new_noise, data, t)
        remaining = per_example(1 - t, x_t)
        fake = x_t + remaining * self.ask(self.real, self.fake, x_t, t, told)
        return matching_gradient(data, x_t + remaining * self.teacher_velocity(x_t, t, told), fake)

    def ask_teacher(self, x_t: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        return self.ask(self.real, self.teacher, x_t, t, self.prompt_encoder(prompts))

    def teacher_velocity(self, x_t: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        """Give the teacher's velocity under its guidance, whose two passes are one of twice the size."""
        weight = self.config.teacher_guidance_scale
        if weight <= 1 or not self.real.guides_by_two_passes:
            return self.ask(self.real, self.teacher, x_t, t, told)
        empty = {name: part.expand(len(x_t), *part.shape[1:]) for name, part in self.prompt_encoder([""]).items()}
        both = {name: torch.cat([part, empty[name]]) for name, part in told.items()}
        guided, null = self.ask(self.real, self.teacher, x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        return null + weight * (guided - null)

    def identity(self) -> dict[str, Any]:
        own: dict[str, Any] = {"teacher_sha256": fingerprint({self.real.component: self.real.network})}
        if self.real_data is not None:
            own |= {"real_rows": len(self.real_data), "real_manifest": manifest_digest(self.real_data)}
        return {**super().identity(), **own}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Give what a checkpoint has to hold; the teacher is another pipeline's and not among it."""
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
    """Tell real noisy data from a student's by what the middle block of a U-Net makes of it: above 0 is real.

    It becomes a part of the U-Net, `unet.discriminator`, is trained along with it, and is asked whenever the U-Net is:
    `logits` `(B,)`, float32, are those of the last forward pass. As the U-Net knows time and prompt, so does the head.
    It takes pictures of any size.

    Args:
        unet: any U-Net with a `mid_block`, as those of diffusers have it.
        seed: of its first weights; equal seeds begin equally.
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
