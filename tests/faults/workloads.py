"""The commands that do long work, on the tiny models, and what their folders hold."""

import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rectified_diffusers.data.shards import Shard
from tests.faults.process import ENDED_WELL, Command
from tests.tiny import make_tiny_pipeline

TRIPLETS = ["--num-triplets", "20", "--triplets-per-shard", "4", "--batch-size", "4", "--num-inference-steps", "2"]
TRAINING = [
    *("--batch-size", "4", "--learning-rate", "1e-3", "--warmup-steps", "2", "--mixed-precision", "no"),
    *("--save-every-steps", "2", "--keep-checkpoints", "2", "--log-every-steps", "1"),
]
PROGRAMS = {
    "reflow": ["reflow", "--max-steps", "6"],
    "distill": ["distill", "--max-steps", "6"],
    # Two rounds, and a checkpoint in each.
    "progressive": ["progressive", "--teacher-steps", "4", "--steps-per-round", "3"],
    "dmd": ["dmd", "--max-steps", "6", "--fake-updates", "2", "--first-fake-updates", "2"],
    "distill with LoRA": ["distill", "--max-steps", "6", "--lora-rank", "2"],
}
for module in ("data.generate", *(f"training.{command}" for command, *_ in PROGRAMS.values())):
    importlib.import_module(f"rectified_diffusers.{module}")  # here, so that a harmed process need not


@dataclass(frozen=True)
class Workload:
    """A command without its output folder, and how to count its records: rows of triplets, or logged steps."""

    name: str
    arguments: tuple[str, ...]
    records: Callable[[Path], Counter[str]]
    processes: int = 1

    def start(self, output_dir: Path, prepare: Callable[[], object] = lambda: None) -> Command:
        return Command(self.command(output_dir), output_dir.with_suffix(".stderr"), prepare, self.processes)

    def command(self, output_dir: Path) -> list[str]:
        return [*self.arguments, "--output-dir", str(output_dir)]


def make_workloads(folder: Path) -> dict[str, Workload]:
    """Write a tiny teacher, prompts and triplets below a folder, and return the commands that work on them."""
    teacher, flow, prompts, triplets = (folder / name for name in ("teacher", "flow", "prompts.txt", "triplets"))
    make_tiny_pipeline("diffusion").save_pretrained(teacher)
    make_tiny_pipeline("flow").save_pretrained(flow)
    prompts.write_text("a red apple\nthe sea\na cat\n")
    draw = Workload("triplets", ("triplets", "--teacher", str(teacher), "--prompts", str(prompts), *TRIPLETS), _rows)
    code, error = draw.start(triplets).finish()
    if code != ENDED_WELL:
        raise RuntimeError(f"the triplets of the campaign could not be made: {error}")
    common = ("--triplets", str(triplets), *TRAINING)
    workloads = [draw]
    # The discriminator of dmd takes any triplets for real images.
    added = {"dmd": ("--teacher", str(teacher), "--real-triplets", str(triplets))}
    for name, (command, *length) in PROGRAMS.items():
        words = (command, "--model", str(flow), *common, *length, *added.get(name, ()))
        workloads.append(Workload(name, words, _steps))
    return {workload.name: workload for workload in workloads}


def digests(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder, by its name; lock files hold nothing and are left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


def _rows(folder: Path) -> Counter[str]:
    """Count the triplets in a folder by prompt and noise, from the files themselves."""
    found: Counter[str] = Counter()
    for path in sorted(folder.glob("shard-*.safetensors")):
        shard = Shard.open(path)
        for row, prompt in enumerate(shard.header["prompts"]):
            noise = hashlib.blake2b(shard.row("noise", row).contiguous().numpy().tobytes()).hexdigest()
            found[f"{prompt} {noise}"] += 1
    return found


def _steps(folder: Path) -> Counter[str]:
    """Count the lines of the log by step."""
    log = folder / "log.jsonl"
    return (
        Counter(str(json.loads(line)["step"]) for line in log.read_text().splitlines()) if log.exists() else Counter()
    )
