"""The output folder of a run: checkpoints, log, validation images and, at the end, a complete pipeline."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid

from rectified_diffusers.files import (
    TEMPORARY,
    flush,
    lock,
    remove,
    remove_leftovers,
    system_errors,
    write_atomically,
)
from rectified_diffusers.loading.saving import save_pipeline
from rectified_diffusers.training.config import TrainerConfig
from rectified_diffusers.training.lora import Adapter

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
RECORD = "training.json"


class RunFolder:
    """Paths of a run and the code that writes its files. Only the last line of the log is ever visible half written.

    `training.json` records how the pipeline in the same folder was trained.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.validation = path / "validation"
        self.log = path / "log.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other runs until the end of the block or of the process."""
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.path) as held:
            if held is False:
                raise OSError(
                    f"Another process is training into {self.path}. Wait for its end, or give another output_dir."
                )
            if held is None:
                logger.warning("%s is on a file system without locks: start no second run in it.", self.path)
            yield

    def append_log(self, line: dict[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def flush_log(self) -> None:
        """Flush the log to disk, so that no checkpoint is ahead of it."""
        if self.log.exists():
            flush(self.log)

    def prepare(self, step: int) -> None:
        """Prepare the folder to continue after `step`: remove leftovers of a killed process and later log lines."""
        if step == 0 and (self.path / INDEX).exists():
            raise ValueError(
                f"{self.path} holds a pipeline and no checkpoint of a run to resume, so that training would replace "
                "it. Give another output_dir."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.checkpoints, self.validation):
            remove_leftovers(folder)
        if self.log.exists():
            whole = [line for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = "".join(line for line in whole if json.loads(line)["step"] <= step)
            write_atomically(self.log, lambda path: path.write_text(kept))

    def last_line(self) -> dict[str, Any]:
        """Return the last line of the log; empty if there is none."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return json.loads(lines[-1]) if lines else {}

    def contains(self, record: dict[str, Any]) -> bool:
        """Return whether the folder holds a complete pipeline with this record."""
        path = self.path / RECORD
        return (self.path / INDEX).exists() and path.exists() and path.read_text() == _text_of(record)

    def publish(
        self, pipeline: Any, record: dict[str, Any], texts: Mapping[str, str], adapter: Adapter | None
    ) -> None:
        """Write a pipeline with its record, texts (card and report, by file) and LoRA; replace an existing pipeline.

        The parts are written to a temporary folder and moved. `model_index.json`, without which nothing can be loaded,
        is the first file removed from an old pipeline and the last one moved.
        """
        (self.path / INDEX).unlink(missing_ok=True)
        staging = self.path / f"{TEMPORARY}pipeline"
        remove(staging)
        _reset_tokenizers(pipeline)
        with system_errors():
            save_pipeline(pipeline, staging)
            if adapter is not None:
                adapter.save(type(pipeline), staging)
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")
        (staging / RECORD).write_text(_text_of(record))
        flush(staging)
        for part in sorted(staging.iterdir(), key=lambda part: (part.name == INDEX, part.name)):
            target = self.path / part.name
            remove(target)
            part.replace(target)
        staging.rmdir()
        flush(self.path, recursive=False)


def _reset_tokenizers(pipeline: Any) -> None:
    """Remove the padding and truncation settings of the tokenizers' last call, so that they are not saved.

    The saved files would otherwise depend on whether this process encoded a prompt, which it does not always do when
    an earlier process did the last step. Every call sets these settings again.
    """
    for part in pipeline.components.values():
        tokenizer = getattr(part, "backend_tokenizer", None)
        if tokenizer is not None:
            tokenizer.no_padding()
            tokenizer.no_truncation()


def _text_of(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2) + "\n"


def save_validation_images(
    path: Path,
    pipeline: Any,
    config: TrainerConfig,
    steps: tuple[int, ...],
    arguments: Callable[[str, int, float], dict[str, Any]],
) -> None:
    """Generate an image per validation prompt from fixed noise: a column per prompt, a row per number of steps.

    Of a video, it is the middle frame.

    Args:
        arguments: returns the arguments of the pipeline's call for a prompt, a number of steps and a guidance scale.
    """
    pipeline.set_progress_bar_config(disable=True)
    prompts, vae = list(config.validation_prompts), getattr(pipeline, "vae", None)
    dtype = torch.float32 if vae is None else vae.dtype
    images = []
    # The student is float32; autocast allows a text encoder and a VAE in half precision.
    with torch.autocast(pipeline.device.type, dtype, enabled=dtype != torch.float32):
        for count in steps:
            for i, prompt in enumerate(prompts):
                generator = torch.Generator().manual_seed(config.seed + i)
                result: Any = pipeline(
                    **arguments(prompt, count, config.validation_guidance_scale), generator=generator
                )
                made = result[0]
                frames = made[0] if isinstance(made[0], (list, tuple)) else [made[0]]
                images.append(frames[len(frames) // 2])
    grid = make_image_grid(images, rows=len(steps), cols=len(prompts))
    write_atomically(path, lambda temporary: grid.save(temporary, format="PNG"))
