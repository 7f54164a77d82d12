"""What each process of a launch runs: short trainings one after the other in one process group.

    torchrun --nproc-per-node 2 -m tests.training.processes TRIPLETS OUTPUT RUN ...

A RUN is `name=options`: name is the folder below OUTPUT, and options a JSON object for `make_trainer`, with its
`method` if that is not reflow, and `half` for a U-Net in bfloat16. Distribution matching takes the triplets for real
ones, too, except for a LoRA.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from packaging.version import Version

from rectified_diffusers.data.dataset import TripletDataset
from tests.forks import exit_codes, free_port
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import make_trainer

needs_fsdp2 = pytest.mark.skipif(Version(accelerate.__version__) < Version("1.6"), reason="accelerate has no FSDP2")


def allow_fsdp_on_cpu() -> None:
    """Let accelerate turn to FSDP, which it does for GPUs alone; torch's FSDP2 itself runs on CPUs and gloo."""
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


def fsdp_environment() -> dict[str, str]:
    """Return the variables that `accelerate launch` sets for our config of FSDP, here for CPUs."""
    config = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "fsdp.yaml"
    options = yaml.safe_load(config.read_text())["fsdp_config"]
    named = {name.upper(): str(value) for name, value in options.items()}
    return {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", **named}


def in_forks(count: int, sharded: bool, function: Callable[..., object], *arguments: Any) -> None:
    """Call a function in several processes of one process group; raise if one of them fails.

    To be called in a process that has used neither accelerate nor several threads, see `tests.forks.call_in_fork`.
    """
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= fsdp_environment() if sharded else {"ACCELERATE_USE_CPU": "true"}

    def run(rank: int) -> None:
        os.environ |= {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        if sharded:
            allow_fsdp_on_cpu()
        function(*arguments)

    codes = exit_codes(run, [(rank,) for rank in range(count)])
    assert codes == [0] * count, codes


def main(triplets: str, output: str, *runs: str) -> None:
    torch.set_num_threads(1)
    if all(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "CPU")):
        allow_fsdp_on_cpu()
    dataset = TripletDataset(triplets)
    for run in runs:
        name, _, options = run.partition("=")
        given = {"method": "reflow", **json.loads(options or "{}")}
        if given["method"] == "dmd" and "lora_rank" not in given:
            given["real_data"] = dataset
        if given.pop("half", False):
            given["kind"] = make_tiny_pipeline()
            given["kind"].unet.to(torch.bfloat16)
        trainer = make_trainer(dataset=dataset, output_dir=Path(output, name), **given)
        student = trainer.train()
        record = {
            "processes": trainer.accelerator.num_processes,
            "distributed_type": trainer.accelerator.distributed_type.value,
            "returns": type(student).__name__,
            "sharded": any(hasattr(weight, "full_tensor") for weight in trainer.student.parameters),
            "held": sum(
                getattr(weight, "to_local", lambda w=weight: w)().numel() for weight in trainer.student.parameters
            ),
        }
        Path(output, f"{name}-{trainer.accelerator.process_index}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
