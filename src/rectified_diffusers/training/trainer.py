"""The loop that every trainer shares: accelerate, EMA, checkpoints, log, validation pictures, finished pipeline."""

import copy
import hashlib
import json
import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils.logging import is_progress_bar_enabled
from torch import Tensor
from tqdm.auto import tqdm

from rectified_diffusers.data.triplets import TripletDataset, Triplets
from rectified_diffusers.flow.interpolation import Interpolation, Straight
from rectified_diffusers.flow.time_density import TimeDensity
from rectified_diffusers.pipelines import RectifiedFlowPipeline
from rectified_diffusers.schedulers import RectifiedFlowEulerScheduler, time_to_timestep
from rectified_diffusers.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    checkpoint_steps,
    config_to_json,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
    require_same_run,
    write_checkpoint,
)
from rectified_diffusers.training.config import TrainerConfig
from rectified_diffusers.training.output import RunFolder, save_contact_sheet
from rectified_diffusers.training.prompts import PromptEncoder

Config = TypeVar("Config", bound=TrainerConfig)


class Trainer(ABC, Generic[Config]):
    """Train a copy of a pipeline's U-Net on triplets; a subclass says with which times and which loss.

    What a step sees, its rows, times and dropped prompts, is a function of `(seed, step)`: a run that was stopped or
    killed goes on from its newest checkpoint exactly as if nothing had happened, and neither the number of processes
    nor the size of a micro-batch changes more than rounding. The pipeline's text encoder and VAE are frozen, moved to
    the device of the training and otherwise used as they are; its U-Net is left alone.
    """

    config: Config
    time_density: TimeDensity
    interpolation: Interpolation = Straight()
    prompt_dropout: float = 0.0
    validation_steps: ClassVar[tuple[int, ...]]

    def __init__(self, pipeline: StableDiffusionPipeline, dataset: TripletDataset, config: Config) -> None:
        _require_trainable(pipeline, dataset)
        self.pipeline, self.dataset, self.config = pipeline, dataset, config
        # accelerate fixes its mixed precision for the life of the process. bf16 needs only autocast, which
        # predict_velocity does itself, so that runs of either precision can follow each other; fp16 needs a scaler.
        self.accelerator = Accelerator(mixed_precision="fp16" if config.mixed_precision == "fp16" else "no")
        if config.batch_size % self.accelerator.num_processes:
            raise ValueError(
                f"batch_size must be a multiple of the {self.accelerator.num_processes} processes, "
                f"got {config.batch_size}. Choose another batch size or number of processes."
            )
        self.output = RunFolder(Path(config.output_dir))
        self.prompt_encoder = PromptEncoder(pipeline, self.device)
        pipeline.vae.to(self.device).requires_grad_(False).eval()
        self.student = copy.deepcopy(pipeline.unet).to(self.device).float().requires_grad_(True).train()
        if config.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        self.parameters = list(self.student.parameters())
        self.ema = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)
        fused = self.device.type in ("cuda", "cpu")
        optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused or None
        )
        schedule = get_scheduler(
            config.lr_schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
        )
        self.lr_factor = schedule.lr_lambdas[0]  # a function of the step alone, so there is no state to save
        self.model, self.optimizer = self.accelerator.prepare(self.student, optimizer)
        self.since_line: list[tuple[float, float]] = []

    @abstractmethod
    def compute_loss(self, batch: Triplets, t: Tensor) -> Tensor:
        """Give the loss of each example, `(B,)`; the loop takes the mean over the batch.

        Args:
            batch: triplets on the device, float32, with the dropped prompts empty.
            t: flow times of the examples, `(B,)`.
        """

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def predict_velocity(self, x_t: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        """Give the U-Net's velocity at time t, `(B, C, H, W)` in float32, in the precision of the config."""
        prompt_embeds = self.prompt_encoder(prompts)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.mixed_precision == "bf16"):
            velocity = self.model(x_t, time_to_timestep(t), encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        return velocity.float()

    def train(self) -> UNet2DConditionModel:
        """Train up to `max_steps`, from the newest checkpoint if there is one, and give the U-Net with EMA weights.

        The finished pipeline is left in `output_dir`. A run that is complete is not repeated: its U-Net is loaded.
        """
        config, main = self.config, self.accelerator.is_main_process
        step = self.resume()
        if step < config.max_steps:
            self.prompt_encoder.remember(self.dataset)
        hidden = not (main and is_progress_bar_enabled())
        with tqdm(total=config.max_steps, initial=step, desc=type(self).__name__, unit="step", disable=hidden) as bar:
            while step < config.max_steps:
                step += 1
                loss, grad_norm = self.train_step(step)
                self.since_line.append((loss, grad_norm))
                if step % config.log_every_steps == 0:
                    self.log(step)
                if main and config.validate_every_steps and step % config.validate_every_steps == 0:
                    self.validate(step)
                if step % config.save_every_steps == 0 or step == config.max_steps:
                    self.save(step)
                bar.update()
                rate = bar.format_dict["rate"] or 0.0
                bar.set_postfix(loss=f"{loss:.4g}", images_per_s=f"{rate * config.batch_size:.3g}", refresh=False)
        return self.finish()

    def generator_for(self, step: int) -> torch.Generator:
        """Give the CPU generator of one optimizer step, the same on every process and after a resume."""
        digest = hashlib.blake2b(f"{self.config.seed}/{step}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw what a step sees, for the whole batch: rows of the data, flow times, which prompts are dropped."""
        generator, count = self.generator_for(step), self.config.batch_size
        rows = torch.randint(len(self.dataset), (count,), generator=generator)
        t = self.time_density.sample(count, generator)
        return rows, t, torch.rand(count, generator=generator) < self.prompt_dropout

    def train_step(self, step: int) -> tuple[float, float]:
        """Do one update of the weights and their average; give the loss and the norm of its gradient."""
        drawn = self.draw(step)
        count = self.config.batch_size // self.accelerator.num_processes
        mine = slice(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)
        size = min(self.config.micro_batch_size or count, count)
        micro_batches = list(zip(*(part[mine].split(size) for part in drawn), strict=True))
        total = torch.zeros((), device=self.device)
        # Only a U-Net with dropout draws from here: seeded, it does the same after a resume.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.generator_for(step).initial_seed() + self.accelerator.process_index)
            for i, (rows, t, dropped) in enumerate(micro_batches, start=1):
                with nullcontext() if i == len(micro_batches) else self.accelerator.no_sync(self.model):
                    losses = self.compute_loss(self.read(rows, dropped), t.to(self.device))
                    share = losses.sum() / count  # the processes' gradients are averaged
                    self.accelerator.backward(share)
                total += share.detach()
        mean_loss: Any = self.accelerator.reduce(total, "mean")
        norm: Any = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        loss, grad_norm = mean_loss.item(), norm.item()
        self._require_finite(step, loss, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        return loss, grad_norm

    def read(self, rows: Tensor, dropped: Tensor) -> Triplets:
        """Read triplets to the device, with the dropped prompts replaced by the empty one."""
        batch = self.dataset.rows(rows.tolist())
        prompts = ["" if drop else prompt for prompt, drop in zip(batch.prompts, dropped.tolist(), strict=True)]
        return replace(batch, prompts=prompts, noise=batch.noise.to(self.device), data=batch.data.to(self.device))

    def learning_rate(self, step: int) -> float:
        """Give the learning rate of a step, which are counted from 1."""
        return self.config.learning_rate * self.lr_factor(step)

    def _require_finite(self, step: int, loss: float, grad_norm: float) -> None:
        scaler = self.accelerator.scaler
        # fp16 overflows at first by design: the step is skipped and the scale halved, until there is no scale left.
        overflow = scaler is not None and scaler.get_scale() > 1
        if math.isfinite(loss) and (math.isfinite(grad_norm) or overflow):
            return
        steps = checkpoint_steps(self.output.checkpoints)
        last = checkpoint_path(self.output.checkpoints, steps[-1]) if steps else "none yet"
        raise FloatingPointError(
            f"Step {step} has loss {loss} and gradient norm {grad_norm}; the weights were not changed by it. "
            f"Last good checkpoint: {last}. Lower learning_rate, raise warmup_steps or use mixed_precision='no', and "
            "check the triplets; a changed option needs another output_dir."
        )

    def log(self, step: int) -> None:
        """Write a line with the means since the previous line; no times, so that equal runs have equal files."""
        losses, grad_norms = zip(*self.since_line, strict=True)
        self.since_line = []
        line = {
            "step": step,
            "loss": math.fsum(losses) / len(losses),
            "grad_norm": math.fsum(grad_norms) / len(grad_norms),
            "learning_rate": self.learning_rate(step),
        }
        if self.accelerator.is_main_process:
            self.output.append_log(line)

    def validate(self, step: int) -> None:
        """Draw the validation prompts with the EMA weights, one row of pictures per number of steps."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        self.student.eval()
        try:
            save_contact_sheet(
                self.output.validation / f"step-{step:08d}.png",
                self.make_pipeline(self.student),
                self.config,
                self.validation_steps,
            )
        finally:
            self.student.train()
            self.ema.restore(self.parameters)

    def identity(self) -> dict[str, Any]:
        """Give what has to agree for one run to be the continuation of another."""
        made_by = {key: value for key, value in self.dataset.manifest.items() if key != "made_with"}
        manifest = json.dumps(made_by, sort_keys=True).encode()
        return {
            "trainer": type(self).__name__,
            "dataset_rows": len(self.dataset),
            "dataset_manifest": hashlib.blake2b(manifest, digest_size=16).hexdigest(),
            **config_to_json(self.config),
        }

    def save(self, step: int) -> None:
        """Write a checkpoint; every process takes part, the main one writes."""
        names = [name for name, _ in self.student.named_parameters()]
        tensors = {
            "unet.safetensors": dict(zip(names, (weight.detach() for weight in self.parameters), strict=True)),
            "ema.safetensors": dict(zip(names, self.ema.shadow_params, strict=True)),
            "optimizer.safetensors": optimizer_tensors(self.model, self.optimizer.optimizer),
        }
        scaler = self.accelerator.scaler
        state = {
            "run": self.identity(),
            "ema_steps": self.ema.optimization_step,
            "since_line": self.since_line,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        if self.accelerator.is_main_process:
            self.output.flush_log()
            write_checkpoint(
                self.output.checkpoints, Checkpoint(step, tensors, state), keep=self.config.keep_checkpoints
            )
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Take up the newest checkpoint, if there is one, and give the number of steps that are done."""
        checkpoint = newest_checkpoint(self.output.checkpoints)
        step = checkpoint.step if checkpoint else 0
        if step > self.config.max_steps:
            raise ValueError(
                f"{self.output.path} holds a run of {step} steps, got max_steps={self.config.max_steps}. "
                "Raise max_steps to go on, or give another output_dir."
            )
        if checkpoint:
            require_same_run(checkpoint.state["run"], self.identity(), self.output.path)
            self._load(checkpoint)
        if self.accelerator.is_main_process:
            self.output.prepare(step)
        self.accelerator.wait_for_everyone()
        return step

    def _load(self, checkpoint: Checkpoint) -> None:
        tensors, state = checkpoint.tensors, checkpoint.state
        load_optimizer_tensors(self.model, self.optimizer.optimizer, tensors["optimizer.safetensors"])
        self.student.load_state_dict(tensors["unet.safetensors"], strict=False)
        names = [name for name, _ in self.student.named_parameters()]
        self.ema.shadow_params = [tensors["ema.safetensors"][name].to(self.device) for name in names]
        self.ema.optimization_step = state["ema_steps"]
        self.since_line = [tuple(pair) for pair in state["since_line"]]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def make_pipeline(self, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
        """Give the pipeline that samples the student: ours, with every other component as it came."""
        parts = {**self.pipeline.components, "unet": unet, "scheduler": RectifiedFlowEulerScheduler()}
        return RectifiedFlowPipeline(
            **parts, requires_safety_checker=self.pipeline.config.get("requires_safety_checker", True)
        )

    def finish(self) -> UNet2DConditionModel:
        """Write the finished pipeline to `output_dir`, unless it is there, and give its U-Net with EMA weights."""
        unet = copy.deepcopy(self.pipeline.unet).to(self.device).float().eval()
        self.ema.copy_to(unet.parameters())
        if self.accelerator.is_main_process:
            record = {"steps": self.config.max_steps, **self.identity()}
            self.output.publish(self.make_pipeline(unet), record)
        self.accelerator.wait_for_everyone()
        return unet


def _require_trainable(pipeline: StableDiffusionPipeline, dataset: TripletDataset) -> None:
    """Raise what is wrong with pipeline or triplets before anything is loaded onto the device."""
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise TypeError(
            f"Expected a StableDiffusionPipeline or RectifiedFlowPipeline, got {type(pipeline).__name__}. "
            "Other pipelines condition their models in other ways, which the trainers do not know."
        )
    shape, channels = tuple(dataset.rows([0]).data.shape), pipeline.unet.config["in_channels"]
    if shape[1] != channels:
        raise ValueError(
            f"The U-Net takes {channels} channels, the triplets have {shape[1]} (shape {shape}). "
            "Make the triplets with a teacher that shares the VAE of this pipeline."
        )
