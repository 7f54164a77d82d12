"""What each process of a launch runs: short trainings one after the other in one process group.

    torchrun --nproc-per-node 2 -m tests.training.processes TRIPLETS OUTPUT RUN ...

A RUN is `name=options`: name is the folder below OUTPUT, and options a JSON object for `make_trainer`, with its
`method` if that is not reflow. Distribution matching takes the triplets for real ones, too.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from rectified_diffusers.data.dataset import TripletDataset
from tests.training.helpers import make_trainer


def allow_fsdp_on_cpu() -> None:
    """Let accelerate turn to FSDP, which it does for GPUs alone; torch's FSDP2 itself runs on CPUs and gloo."""
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


def main(triplets: str, output: str, *runs: str) -> None:
    torch.set_num_threads(1)
    if all(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "CPU")):
        allow_fsdp_on_cpu()
    dataset = TripletDataset(triplets)
    for run in runs:
        name, _, options = run.partition("=")
        given = {"method": "reflow", **json.loads(options or "{}")}
        if given["method"] == "dmd":
            given["real_data"] = dataset
        trainer = make_trainer(dataset=dataset, output_dir=Path(output, name), **given)
        trainer.train()
        record = {
            "processes": trainer.accelerator.num_processes,
            "distributed_type": trainer.accelerator.distributed_type.value,
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
