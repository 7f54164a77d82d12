"""The output folder of a run: checkpoints, log, validation images and, at the end, a complete pipeline."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.utils import make_image_grid

from rectified_diffusers.distributed import divided
from rectified_diffusers.files import (
    TEMPORARY,
    flush,
    lock,
    remove,
    remove_leftovers,
    system_errors,
    write_atomically,
)
from rectified_diffusers.loading.errors import damaged_files
from rectified_diffusers.loading.saving import save_pipeline
from rectified_diffusers.training.config import TrainerConfig
from rectified_diffusers.training.identity import QUANTIZATION, STARTING_MODEL
from rectified_diffusers.training.lora import WEIGHTS, Adapter
from rectified_diffusers.training.parts import file_digest

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
RECORD = "training.json"
FILES = "files.json"
"""Size and digest of each file of the finished pipeline. Not in the record, which is equal wherever the model lay."""
_RESULTS = {INDEX: "pipeline", WEIGHTS: "LoRA"}


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
        found = next((kind for name, kind in _RESULTS.items() if (self.path / name).exists()), None)
        if step == 0 and found is not None:
            raise ValueError(
                f"{self.path} holds a {found} and no checkpoint of a run to resume, so that training would replace "
                "it. Give another output_dir."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.checkpoints, self.validation):
            remove_leftovers(folder)
        if self.log.exists():
            kept = "".join(line for line, entry in read_log(self.log) if entry["step"] <= step)
            write_atomically(self.log, lambda path: path.write_text(kept))

    def last_line(self) -> dict[str, Any]:
        """Return the last line of the log; empty if there is none."""
        entries = [entry for _, entry in read_log(self.log)] if self.log.exists() else []
        return entries[-1] if entries else {}

    def contains(self, record: dict[str, Any]) -> bool:
        """Return whether the folder holds a complete pipeline with this record, whose files are as they were written.

        Model cards and reports may change. A preview release recorded neither starting model nor files: then each
        safetensors file is checked against its header.
        """
        path = self.path / RECORD
        if not (self.path / _last_of(record)).exists() or not path.exists():
            return False
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
            listed = self.path / FILES
            files = dict(json.loads(listed.read_text(encoding="utf-8"))) if listed.exists() else None
        except (ValueError, TypeError):
            return False
        expected = json.loads(_text_of(record))
        if STARTING_MODEL not in found:
            expected.pop(STARTING_MODEL, None)
        if found != expected:
            return False
        if files is None:
            changed = [name for name in _components(self.path / INDEX) if not _is_component(self.path / name)]
        else:
            changed = [name for name, digest in files.items() if not _is_file(self.path / name, digest)]
        if changed:
            logger.warning(
                "%s is not as it was written (%s): the pipeline is written again from the checkpoint.",
                self.path,
                ", ".join(changed),
            )
        return not changed

    def publish(
        self, pipeline: Any, record: dict[str, Any], texts: Mapping[str, str], adapter: Adapter | None
    ) -> None:
        """Write a pipeline with its record, texts (card and report, by file) and LoRA; replace an existing pipeline.

        The parts are written to a temporary folder and moved. `model_index.json`, without which nothing can be loaded,
        is the first file removed from an old pipeline and the last one moved. Of a pipeline with a quantized network,
        only the LoRA is written.
        """
        last = _last_of(record)
        (self.path / last).unlink(missing_ok=True)
        staging = self.path / f"{TEMPORARY}pipeline"
        remove(staging)
        staging.mkdir()
        with system_errors():
            if last == INDEX:
                _reset_tokenizers(pipeline)
                save_pipeline(pipeline, staging)
            if adapter is not None:
                adapter.save(type(pipeline), staging)
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")
        written = sorted(file for file in staging.rglob("*") if file.is_file() and file.name not in texts)
        files = {file.relative_to(staging).as_posix(): file_digest(file) for file in written}
        (staging / FILES).write_text(_text_of(files))
        (staging / RECORD).write_text(_text_of(record))
        flush(staging)
        for part in sorted(staging.iterdir(), key=lambda part: (part.name == last, part.name)):
            target = self.path / part.name
            remove(target)
            part.replace(target)
        staging.rmdir()
        flush(self.path, recursive=False)


def read_log(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line of a log with its entry. Damaged lines are left out with a warning.

    A last line without a line break is left out silently: a process is writing it, or was killed.
    """
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError("expected an object with a step")
        except (ValueError, RecursionError) as error:
            logger.warning("%s, line %d is damaged and left out (%s).", path, number, error)
        else:
            yield line.decode(), entry


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


def _is_file(path: Path, expected: dict[str, Any]) -> bool:
    """Return whether a file has the size and the digest that were recorded."""
    return path.is_file() and path.stat().st_size == expected["bytes"] and file_digest(path) == expected


def _components(index: Path) -> list[str]:
    """Return the components that the index of a pipeline names; the index itself if it cannot be read."""
    try:
        entries = json.loads(index.read_text(encoding="utf-8")).items()
    except (ValueError, AttributeError):
        return [index.name]
    return [name for name, entry in entries if isinstance(entry, list) and entry[0] is not None]


def _is_component(folder: Path) -> bool:
    """Return whether a component's folder exists and, for a model, holds weights of the length in their headers."""
    is_model = (folder / "config.json").exists()
    has_weights = any(folder.glob("*.safetensors"))
    return folder.is_dir() and has_weights >= is_model and not any(damaged_files(folder))


def _last_of(record: Mapping[str, Any]) -> str:
    """Return the file of a finished run that is written last."""
    return INDEX if QUANTIZATION not in record else WEIGHTS


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

    Every process must call this: it generates a share, and the first writes the file. Of videos, the image has the
    middle frames, and a GIF of the same name has all frames.

    Args:
        arguments: returns the arguments of the pipeline's call for a prompt, a number of steps and a guidance scale.
    """
    pipeline.set_progress_bar_config(disable=True)
    prompts, vae = list(config.validation_prompts), getattr(pipeline, "vae", None)
    dtype = torch.float32 if vae is None else vae.dtype

    def generate(count: int, number: int, prompt: str) -> list[Any]:
        generator = torch.Generator().manual_seed(config.seed + number)
        result: Any = pipeline(**arguments(prompt, count, config.validation_guidance_scale), generator=generator)
        made = result[0]
        return list(made[0]) if isinstance(made[0], (list, tuple)) else [made[0]]

    videos: list[list[Any]] = []
    # The student is float32; autocast allows a text encoder and a VAE in half precision.
    with torch.autocast(pipeline.device.type, dtype, enabled=dtype != torch.float32):
        for count in steps:
            videos += divided([partial(generate, count, i, prompt) for i, prompt in enumerate(prompts)])
    if not PartialState().is_main_process:
        return
    grids = [make_image_grid(list(images), rows=len(steps), cols=len(prompts)) for images in zip(*videos, strict=True)]
    write_atomically(path, lambda temporary: grids[len(grids) // 2].save(temporary, format="PNG"))
    if len(grids) > 1:
        options: Any = {"format": "GIF", "save_all": True, "append_images": grids[1:], "duration": 100, "loop": 0}
        write_atomically(path.with_suffix(".gif"), lambda temporary: grids[0].save(temporary, **options))
