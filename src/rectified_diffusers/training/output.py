"""The output folder of a run: checkpoints, log, validation pictures and, at the end, a whole pipeline."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import make_image_grid

from rectified_diffusers.training.checkpoint import TEMPORARY, flush, remove, write_atomically
from rectified_diffusers.training.config import TrainerConfig

INDEX = "model_index.json"
RECORD = "training.json"


class RunFolder:
    """Paths of a run and the writing of its files, of which none is ever seen half written but the log's last line.

    `training.json` says what made the pipeline beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.validation = path / "validation"
        self.log = path / "log.jsonl"

    def append_log(self, line: dict[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def flush_log(self) -> None:
        """Bring the log to the disk, so that no checkpoint is ahead of it."""
        if self.log.exists():
            flush(self.log)

    def prepare(self, step: int) -> None:
        """Make the folder ready to go on after `step`: no leftovers of a killed process, no log of later steps."""
        if step == 0 and (self.path / INDEX).exists():
            raise ValueError(
                f"{self.path} holds a pipeline and no checkpoint of a run to resume, so that training would replace "
                "it. Give another output_dir."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.checkpoints, self.validation):
            for leftover in folder.glob(f"{TEMPORARY}*"):
                remove(leftover)
        if self.log.exists():
            whole = [line for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = "".join(line for line in whole if json.loads(line)["step"] <= step)
            write_atomically(self.log, lambda path: path.write_text(kept))

    def publish(self, pipeline: StableDiffusionPipeline, record: dict[str, Any]) -> None:
        """Write a pipeline, unless the one that is there has the same record.

        Its parts are made beside their place and moved; `model_index.json`, without which nothing can be loaded, goes
        first when an old pipeline is replaced and comes last.
        """
        index, text = self.path / INDEX, json.dumps(record, indent=2) + "\n"
        if index.exists() and (self.path / RECORD).exists() and (self.path / RECORD).read_text() == text:
            return
        index.unlink(missing_ok=True)
        staging = self.path / f"{TEMPORARY}pipeline"
        remove(staging)
        pipeline.save_pretrained(staging)
        (staging / RECORD).write_text(text)
        flush(staging)
        for part in sorted(staging.iterdir(), key=lambda part: (part.name == INDEX, part.name)):
            target = self.path / part.name
            remove(target)
            part.replace(target)
        staging.rmdir()
        flush(self.path, recursive=False)


def save_contact_sheet(
    path: Path, pipeline: StableDiffusionPipeline, config: TrainerConfig, steps: tuple[int, ...]
) -> None:
    """Draw every validation prompt from its own fixed noise: a column per prompt, a row per number of steps."""
    pipeline.set_progress_bar_config(disable=True)
    prompts, dtype = list(config.validation_prompts), pipeline.vae.dtype
    images = []
    # The student is float32; autocast lets it work beside a text encoder and a VAE in half precision.
    with torch.autocast(pipeline.device.type, dtype, enabled=dtype != torch.float32):
        for count in steps:
            for i, prompt in enumerate(prompts):
                result: Any = pipeline(
                    prompt,
                    num_inference_steps=count,
                    guidance_scale=config.validation_guidance_scale,
                    generator=torch.Generator().manual_seed(config.seed + i),
                )
                images += result.images
    sheet = make_image_grid(images, rows=len(steps), cols=len(prompts))
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))
