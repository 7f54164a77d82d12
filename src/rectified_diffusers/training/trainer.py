"""The loop shared by all trainers: accelerate, EMA, checkpoints, log, validation images, finished pipeline."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from diffusers.optimization import get_scheduler
from diffusers.utils.logging import is_progress_bar_enabled
from torch import Tensor
from tqdm.auto import tqdm

from rectified_diffusers.data.dataset import TripletDataset, Triplets
from rectified_diffusers.data.teacher import autocast, fingerprints
from rectified_diffusers.distributed import Peers, training_accelerator
from rectified_diffusers.flow.interpolation import Interpolation, Straight
from rectified_diffusers.flow.time_density import TimeDensity
from rectified_diffusers.models.denoiser import Conditioning, Denoiser
from rectified_diffusers.seeds import generator_of
from rectified_diffusers.training import guards
from rectified_diffusers.training.checkpoint_reading import StoredCheckpoint, load_newest
from rectified_diffusers.training.checkpoint_writing import CheckpointWriter, require_room
from rectified_diffusers.training.config import TrainerConfig
from rectified_diffusers.training.identity import QUANTIZATION, STARTING_MODEL, config_to_json, require_resumable
from rectified_diffusers.training.lora import Adapter, add_lora, fuse_lora
from rectified_diffusers.training.model_card import (
    Card,
    base_model_of,
    measure_straightness,
    require_repository,
    upload,
)
from rectified_diffusers.training.prompts import PromptEncoder
from rectified_diffusers.training.reading import RowReader
from rectified_diffusers.training.report import REPORT, render_report
from rectified_diffusers.training.run_folder import RunFolder, save_validation_images
from rectified_diffusers.training.sharding import gathered, is_sharded
from rectified_diffusers.training.student import denoiser_for, initial_network, student_pipeline, student_scheduler
from rectified_diffusers.training.tracking import report_image, start_trackers, tracker_arguments
from rectified_diffusers.training.trained import Trained
from rectified_diffusers.training.watchdog import Watchdog

Config = TypeVar("Config", bound=TrainerConfig)


class Trainer(ABC, Generic[Config]):
    """Train a copy of a pipeline's network on triplets; subclasses define the times and the loss.

    The inputs of a step, its rows, times and dropped prompts, are a function of `(seed, step)`. A run that was stopped
    or killed continues from its newest checkpoint exactly as if it had not been interrupted, and the number of
    processes and the size of a micro-batch change only rounding. The pipeline is one that `Denoiser.of` supports. Its
    text encoders and VAE are frozen, and on the training device while they are used. Its network, a U-Net or a
    transformer, is not changed; if a LoRA is trained, the LoRA's base shares its weights, which are frozen and may be
    quantized.

    Example:
        ```python
        class ClippedReflow(ReflowTrainer):
            def compute_loss(self, batch, t):
                return super().compute_loss(batch, t).clamp(max=10.0)  # (B,)

        trainer = ClippedReflow(teacher, triplets, ReflowConfig(output_dir=Path("clipped")))
        ```
    """

    config: Config
    time_density: TimeDensity
    interpolation: Interpolation = Straight()
    prompt_dropout: float = 0.0
    validation_steps: tuple[int, ...]
    metrics: ClassVar[tuple[str, ...]] = ("loss", "grad_norm")
    """Names in the log for the values that `train_step` returns."""
    needs_flow: ClassVar[bool] = False
    """Whether the network must predict a velocity before the first step."""

    def __init__(self, pipeline: Any, dataset: TripletDataset, config: Config) -> None:
        guards.require_config(type(self), config)
        guards.require_own_weights(pipeline)
        self.denoiser = denoiser_for(pipeline, dataset)
        self.student_steps: int = getattr(config, "student_steps", 1)
        self.scheduler = student_scheduler(self.denoiser, self.student_steps)  # before any part of the pipeline moves
        self.pipeline, self.dataset, self.config = pipeline, dataset, config
        if self.fits_pairs:
            guards.require_pairs(dataset.manifest)
        if self.needs_flow and not self.starts_as_flow:
            raise guards.not_a_flow(type(self).__name__, pipeline)
        self.accelerator = training_accelerator(config.mixed_precision, **tracker_arguments(config))
        self.sharded = is_sharded(self.accelerator)
        self.quantization = guards.require_trainable(self.denoiser, config, self.sharded)
        guards.require_divisible(config.batch_size, self.accelerator.num_processes)
        self.reader = RowReader(dataset, config.num_workers, self.device)
        self.output = RunFolder(Path(config.output_dir))
        self.starting_model = fingerprints(pipeline)  # before training: bitsandbytes rounds biases when it uses them
        self.prompt_encoder = PromptEncoder(self.denoiser, self.device)
        if getattr(pipeline, "vae", None) is not None:
            pipeline.vae.to(self.device).requires_grad_(False).eval()
        self.peers, keep = Peers.connect(), config.keep_checkpoints
        self.watchdog = Watchdog(self.peers.process, self.peers.count)
        self.writer = CheckpointWriter(self.output.checkpoints, keep, self.peers, self.output.flush_log)
        name = self.denoiser.component
        self.student = Trained(self.make_network(), self.accelerator, config, self.writer, name)
        steps: dict[str, Any] = {"num_warmup_steps": config.warmup_steps, "num_training_steps": self.schedule_steps}
        schedule = get_scheduler(config.lr_schedule, self.student.optimizer.optimizer, **steps)
        self.lr_factor = schedule.lr_lambdas[0]  # a function of the step alone, so there is no state to save
        self.since_line: list[tuple[float, ...]] = []

    @property
    def fits_pairs(self) -> bool:
        """Whether training requires that the data of a triplet belongs to its noise."""
        return True

    @property
    def schedule_steps(self) -> int:
        """Number of steps after which a linear or cosine learning rate is 0."""
        return self.config.max_steps

    def make_network(self) -> Any:
        """Return the network that training starts from, see `initial_network`; its trained weights need a gradient."""
        shared = self.device if self.config.lora_rank is not None else None
        network = initial_network(self.denoiser, self.config.initialisation, shared, self.sharded)
        network = network if self.sharded else network.to(self.device)
        return network.requires_grad_(True) if self.config.lora_rank is None else add_lora(network, self.config)

    @abstractmethod
    def compute_loss(self, batch: Triplets, t: Tensor) -> Tensor:
        """Return the loss of each example, `(B,)`; the loop takes the mean over the batch.

        Args:
            batch: triplets on the device, float32, with the dropped prompts empty.
            t: flow times of the examples, `(B,)`.
        """

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def predict_velocity(self, x_t: Tensor, t: Tensor, prompts: list[str], network: Any = None) -> Tensor:
        """Return the velocity predicted by `network` (default: the student), in the precision of the config.

        The result is `(B, C, H, W)` in float32, for times t `(B,)`.
        """
        return self.predict(self.denoiser, network or self.student.model, x_t, t, self.prompt_encoder(prompts))

    def predict(self, denoiser: Denoiser, network: Any, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity of a network of any pipeline, computed in the precision of the config, as float32."""
        with autocast(self.device, self.config.mixed_precision):
            velocity = denoiser.velocity(network, x_t, t, conditioning)
        return velocity.float()

    def train(self) -> Any:
        """Train to `max_steps`, from the newest checkpoint if there is one, and return the student with EMA weights.

        The finished pipeline is written to `output_dir`. A complete run is not repeated: its student is loaded. If the
        weights are sharded, only the first process returns the student, and the others None.
        """
        locked = self.output.locked() if self.accelerator.is_main_process else nullcontext()
        with locked, self.writer, self.watchdog:
            self.watchdog.enter("loading the newest checkpoint")
            self.run_steps(self.resume())
            self.watchdog.enter("writing the finished pipeline")
            return self.finish()

    def run_steps(self, step: int) -> None:
        """Run the steps after `step`, with logging, validation and checkpoints when due."""
        config, main = self.config, self.accelerator.is_main_process
        if step < config.max_steps:
            self.begin(step)
        hidden = not (main and is_progress_bar_enabled())
        bar = tqdm(total=config.max_steps, initial=step, desc=type(self).__name__, unit="step", disable=hidden)
        first, watchdog = step + 1, self.watchdog
        # A loss on images runs the pipeline's own decoding, which needs all its parts on one device.
        released = nullcontext() if config.decodes_images else self.prompt_encoder.released()
        with bar, released, self.reader.ahead(self.rows_after(step)):
            while step < config.max_steps:
                step += 1
                watchdog.enter(f"step {step}")
                self.writer.check()
                metrics = self.train_step(step)
                if step == first:
                    self.writer.reserve(self.tensors())
                self.since_line.append(metrics)
                if step % config.log_every_steps == 0:
                    self.log(step)
                if config.validate_every_steps and step % config.validate_every_steps == 0:
                    watchdog.enter(f"validation at step {step}")
                    self.validate(step)
                if step % config.save_every_steps == 0 or step == config.max_steps:
                    watchdog.enter(f"the checkpoint of step {step}")
                    self.save(step)
                bar.update()
                rate = bar.format_dict["rate"] or 0.0
                images = f"{rate * config.batch_size:.3g}"
                bar.set_postfix(loss=f"{metrics[0]:.4g}", images_per_s=images, refresh=False)
            watchdog.enter("writing the last checkpoint")
            self.writer.wait()

    def begin(self, step: int) -> None:
        """Check for anything that would stop training later, and prepare for the steps after `step`."""
        config = self.config
        if self.accelerator.is_main_process:
            require_room(self.output.checkpoints, self.checkpoint_bytes, config.keep_checkpoints)
            if config.push_to_hub and config.hub_model_id:
                require_repository(config.hub_model_id)
        self.prompt_encoder.remember(self.dataset)
        if step == 0 and self.starts_as_flow:
            self.check_direction(self.predict_velocity)
        start_trackers(self.accelerator, config, step)

    def check_direction(self, predict_velocity: Callable[[Tensor, Tensor, list[str]], Tensor]) -> None:
        """Raise if v(x_t, t, prompts) points away from the data of the first triplets."""
        rows = torch.arange(min(guards.ROWS, self.config.micro_batch_size or guards.ROWS, len(self.dataset)))
        guards.require_direction(predict_velocity, self.read(rows, torch.zeros(len(rows)).bool()))

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint in bytes."""
        return self.student.nbytes

    @property
    def starts_as_flow(self) -> bool:
        """Whether the student predicts a velocity before the first step, not the target of a diffusion model."""
        return self.config.initialisation == "snr_matching" or self.denoiser.diffusion() is None

    def generator_for(self, step: int, use: str = "") -> torch.Generator:
        """Return the CPU generator for one use in an optimizer step, equal on every process and after a resume."""
        return generator_of(self.config.seed, f"{step}{use}")

    def uses(self, step: int) -> list[str]:
        """Return the uses of inputs in a step, one for each update, in their order."""
        return [""]

    def rows_after(self, step: int) -> Iterator[list[int]]:
        """Yield the rows that this process reads after `step`, micro-batch by micro-batch."""
        for later in range(step + 1, self.config.max_steps + 1):
            for use in self.uses(later):
                yield from (rows.tolist() for (rows,) in self.student.micro_batches([self.sample_rows(later, use)]))

    def sample_rows(self, step: int, use: str = "", generator: torch.Generator | None = None) -> Tensor:
        """Sample the rows of an update for the full batch: the first numbers of the generator of (step, use)."""
        generator = generator or self.generator_for(step, use)
        return torch.randint(len(self.dataset), (self.config.batch_size,), generator=generator)

    def sample_inputs(self, step: int, use: str = "") -> tuple[Tensor, ...]:
        """Sample the inputs of an update for the full batch: rows, flow times, which prompts are dropped."""
        generator, count = self.generator_for(step, use), self.config.batch_size
        rows = self.sample_rows(step, use, generator)
        t = self.time_density.sample(count, generator)
        return rows, t, torch.rand(count, generator=generator) < self.prompt_dropout

    def train_step(self, step: int) -> tuple[float, ...]:
        """Update the weights and their average once; return the loss and the norm of its gradient."""
        return self.update(self.student, step, self.losses, self.learning_rate(step))

    def update(
        self, trained: Trained, step: int, losses_of: Callable[..., Tensor], learning_rate: float, use: str = ""
    ) -> tuple[float, float]:
        """Update one network with the inputs for `use`; return the loss and the norm of its gradient."""
        seed = self.generator_for(step, use).initial_seed()
        return trained.update(step, self.sample_inputs(step, use), losses_of, learning_rate, seed)

    def losses(self, *inputs: Tensor) -> Tensor:
        """Return the losses `(B,)` of a micro-batch, from its part of the tensors that `sample_inputs` returned."""
        return self.compute_loss(*self.load_inputs(*inputs))

    def load_inputs(self, *inputs: Tensor) -> tuple[Any, Tensor]:
        """Return the batch and the times of a micro-batch, on the device."""
        rows, t, dropped = inputs
        return self.read(rows, dropped), t.to(self.device)

    def read(self, rows: Tensor, dropped: Tensor) -> Triplets:
        """Load triplets to the device, with dropped prompts replaced by the empty prompt."""
        batch = self.reader.rows(rows.tolist())
        self.prompt_encoder.use_stored(batch)
        prompts = ["" if drop else prompt for prompt, drop in zip(batch.prompts, dropped.tolist(), strict=True)]
        noise, data = (part.to(self.device, non_blocking=True) for part in (batch.noise, batch.data))
        return replace(batch, prompts=prompts, noise=noise, data=data)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step; steps count from 1."""
        return self.config.learning_rate * self.lr_factor(step)

    def log(self, step: int) -> None:
        """Write a log line with the means since the previous line; no timings, so equal runs have equal files."""
        metrics = zip(self.metrics, zip(*self.since_line, strict=True), strict=True)
        means = {name: math.fsum(values) / len(values) for name, values in metrics}
        self.since_line = []
        line = {"step": step, **means, "learning_rate": self.learning_rate(step)}
        if self.accelerator.is_main_process:
            self.output.append_log(line)
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)

    def validate(self, step: int) -> None:
        """Generate validation images with the averaged weights, a row per number of steps, each process a share."""
        path = self.output.validation / f"step-{step:08d}.png"
        with self.student.average() as network, self.prompt_encoder.with_encoders():
            pipeline, arguments = self.make_pipeline(network), self.denoiser.call_arguments
            save_validation_images(path, pipeline, self.config, self.validation_steps, arguments)
        if self.accelerator.is_main_process:
            report_image(self.accelerator, path, step)

    def averaged(self) -> Any:
        """Return a new network with the full averaged weights, see `gathered`; every process must call this."""
        return gathered(self.student.ema.shadow_params, self.make_network, self.accelerator)

    def identity(self) -> dict[str, Any]:
        """Return the values that must be equal for one run to continue another."""
        return {
            "trainer": type(self).__name__,
            "dataset_rows": len(self.dataset),
            "dataset_manifest": self.dataset.manifest.fingerprint,
            STARTING_MODEL: self.starting_model,
            **({} if self.quantization is None else {QUANTIZATION: self.quantization}),
            **config_to_json(self.config),
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint by file and name, not copied."""
        return self.student.tensors()

    def save(self, step: int) -> None:
        """Begin to write a checkpoint; every process must call this, and writes a part."""
        scaler = self.accelerator.scaler
        state = {
            "run": self.identity(),
            "ema_steps": self.student.ema.optimization_step,
            "since_line": list(self.since_line),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        self.writer.save(step, self.tensors(), state)

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one, and return the number of completed steps."""
        step = load_newest(self.output.checkpoints, self.load, self.peers) or 0
        if self.accelerator.is_main_process:
            self.output.prepare(step)
        self.accelerator.wait_for_everyone()
        return step

    def load(self, checkpoint: StoredCheckpoint) -> int:
        """Load a checkpoint of this run and return its step; raise if it is of another run."""
        guards.require_steps_left(checkpoint.step, self.config)
        require_resumable(checkpoint.state["run"], self.identity(), self.config)
        tensors = self.targets(checkpoint)
        checkpoint.load(tensors)
        self.restore(checkpoint, tensors)
        return checkpoint.step

    def targets(self, checkpoint: StoredCheckpoint) -> dict[str, dict[str, Tensor]]:
        """Return the tensors into which a checkpoint is loaded; every process must call this."""
        return self.student.targets(checkpoint)

    def restore(self, checkpoint: StoredCheckpoint, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Take over the loaded `targets` and the rest of the checkpoint's state."""
        self.student.restore(tensors, checkpoint.state["ema_steps"])
        self.since_line = [tuple(metrics) for metrics in checkpoint.state["since_line"]]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])

    def make_pipeline(self, network: Any) -> Any:
        """Return the pipeline that samples the student: ours where one exists, with all other components unchanged."""
        return student_pipeline(self.denoiser, network, self.scheduler)

    def finish(self) -> Any:
        """Write the finished pipeline to `output_dir`, unless it is there, and return its network with EMA weights.

        A LoRA is written twice: as a separate file for `pipeline.load_lora_weights(output_dir)`, and fused into the
        pipeline's weights. Only the separate file is uploaded. A LoRA on a quantized base is written only as the file,
        because a sum with quantized weights would be rounded; the returned network has it beside them.
        """
        config, adapter, straight, paths = self.config, None, None, self.config.straightness_paths
        network = self.averaged()
        if config.lora_rank is not None and network is not None:
            adapter = Adapter.of(network, self.denoiser.component)
            network = fuse_lora(network) if self.quantization is None else network
        main, record = self.accelerator.is_main_process, {"steps": config.max_steps, **self.identity()}
        complete = self.peers.exchange(main and self.output.contains(record))[0]
        if paths and not complete:
            with self.student.average() as student, self.prompt_encoder.with_encoders():
                straight = measure_straightness(self.make_pipeline(student), self.dataset, paths, self.denoiser)
        if main:
            if not complete:
                pipeline = self.make_pipeline(network)
                base, line, steps = base_model_of(self.pipeline), self.output.last_line(), self.validation_steps[0]
                usage = {"arguments": self.denoiser.guidance_arguments, "component": self.denoiser.component}
                usage["by_peft"] = adapter is not None and adapter.by_peft
                card = Card(record, type(pipeline), base, steps, line, straight, **usage)
                report = render_report(self.output.path, record, config.validation_prompts, straight)
                self.output.publish(pipeline, record, {"README.md": str(card), REPORT: report}, adapter)
            if config.push_to_hub and config.hub_model_id:
                upload(self.output.path, config.hub_model_id, lora=adapter is not None)
        for tracker in self.accelerator.trackers:
            tracker.finish()  # `end_training` would also destroy the process group, which the next run needs
        self.accelerator.wait_for_everyone()
        return network
