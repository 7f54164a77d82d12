"""From a diffusion teacher down to one step, all stages in one process: minutes on a GPU.

    python examples/emoji/one_step.py --data work/data --prompts work/prompts.txt --weights work/weights \\
        --output work/one_step

Runs the stages of README.md in this folder one after the other, through the Python interface and with larger batches.
Each stage has its own folder in the output and is skipped if it is complete; if the script is killed, run the same
command again to resume. The default numbers of steps and triplets are those of step 4 in README.md: ten minutes on an
H200. The included teacher already has the further steps of that run; `--teacher-steps 0` keeps it as it is.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from teacher import parse_arguments as teacher_arguments
from teacher import train_teacher

import rectified_diffusers  # noqa: F401  (makes our pipelines known to the loader)
from rectified_diffusers.data.config import RealTripletConfig, TripletConfig
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.generate import generate_triplets
from rectified_diffusers.data.generate_real import generate_real_triplets
from rectified_diffusers.data.prompts import read_prompts
from rectified_diffusers.training.config import DistillConfig, DistributionMatchingConfig, ReflowConfig
from rectified_diffusers.training.distill import DistillTrainer
from rectified_diffusers.training.dmd import DistributionMatchingTrainer
from rectified_diffusers.training.reflow import ReflowTrainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS_PER_FILE = 4096  # so that a dataset can keep all files open


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--prompts", type=Path, required=True, help="file that prompts.py wrote")
    parser.add_argument("--weights", type=Path, required=True, help="folder that weights.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the stages' folders")
    parser.add_argument("--teacher", type=Path, default=Path(__file__).parent / "teacher")
    parser.add_argument("--teacher-steps", type=int, default=911, help="further steps of the teacher; 0: as it is")
    parser.add_argument("--first-triplets", type=int, default=40_960, help="triplets of the teacher")
    parser.add_argument("--reflow-steps", type=int, default=390)
    parser.add_argument("--second-triplets", type=int, default=53_248, help="triplets of the 2-Rectified Flow")
    parser.add_argument("--l2-steps", type=int, default=394)
    parser.add_argument("--lpips-steps", type=int, default=645)
    parser.add_argument("--matching-steps", type=int, default=103, help="steps of distribution matching; 0: none")
    parser.add_argument("--real-pictures", type=int, default=9097, help="for its discriminator; 0: no discriminator")
    parser.add_argument("--batch-size", type=int, default=512)
    return parser.parse_args()


def load(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(DEVICE)


class Stages:
    """Runs the stages, each from the folders of those before."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.output
        self.prompts = read_prompts(args.prompts)

    def run(self) -> None:
        args, teacher = self.args, self.teacher()
        triplets = self.triplets("triplets-1", teacher, args.first_triplets, 16, guidance_scale=3.0, seed=0)
        common = self.common("2-rectified-flow", args.reflow_steps, 6e-4)
        reflow = self.train(ReflowTrainer, ReflowConfig(**common, initialisation="snr_matching"), teacher, triplets)

        triplets = self.triplets("triplets-2", reflow, args.second_triplets, 12, guidance_scale=1.5, seed=1)
        common = self.common("one-step-l2", args.l2_steps, 6e-4)
        one_step = self.train(DistillTrainer, DistillConfig(**common, plain_unet=True), reflow, triplets)
        common = self.common("one-step-lpips", args.lpips_steps, 3e-4)
        weights = args.weights / "lpips_alexnet.safetensors"
        config = DistillConfig(**common, loss="lpips", lpips_weights=weights)
        one_step = self.train(DistillTrainer, config, one_step, triplets)
        if args.matching_steps:
            self.finish(one_step, triplets, teacher)

    def finish(self, model: Path, triplets: TripletDataset, teacher: Path) -> None:
        """Match the distribution of the teacher and, if there are to be real pictures, theirs."""
        pipeline, count, real = load(teacher), self.args.real_pictures, None
        if count:
            config = RealTripletConfig(
                num_triplets=count, num_inference_steps=0, batch_size=64, triplets_per_shard=ROWS_PER_FILE
            )
            real = generate_real_triplets(pipeline, self.args.data, self.work / "real-triplets", config)
        config = DistributionMatchingConfig(
            **self.common("finished", self.args.matching_steps, 1e-4, self.args.batch_size // 2),
            teacher_guidance_scale=3.0,
            fake_updates=3,
            first_fake_updates=60,
            fake_learning_rate=2e-4,
        )
        self.train(DistributionMatchingTrainer, config, model, triplets, teacher=pipeline, real_data=real)

    def teacher(self) -> Path:
        """Give the folder of the teacher: the given one, or what it becomes with further steps."""
        steps, begin = self.args.teacher_steps, self.args.teacher
        if not steps:
            return begin
        folder = self.work / "teacher"
        options: dict[str, Any] = {
            "data": self.args.data,
            "vae": begin / "vae",
            "initial-model": begin,
            "output": folder,
            "max-steps": steps,
            "decay-steps": steps // 2,
            "save-every-steps": 1000,
            "batch-size": self.args.batch_size,
            "learning-rate": 8e-4,
            "ema-decay": 0.998,
        }
        began = time.perf_counter()
        train_teacher(teacher_arguments([f"--{name}={value}" for name, value in options.items()]))
        self.report("teacher", began)
        return folder

    def triplets(self, name: str, teacher: Path, count: int, steps: int, **options: Any) -> TripletDataset:
        config = TripletConfig(
            num_triplets=count,
            num_inference_steps=steps,
            batch_size=1024,
            triplets_per_shard=ROWS_PER_FILE,
            mixed_precision="bf16",
            **options,
        )
        began = time.perf_counter()
        dataset = generate_triplets(load(teacher), self.prompts, self.work / name, config)
        self.report(name, began)
        return dataset

    def common(self, name: str, steps: int, learning_rate: float, batch_size: int | None = None) -> dict[str, Any]:
        """Give the options that every trainer has."""
        return {
            "output_dir": self.work / name,
            "max_steps": steps,
            "batch_size": batch_size or self.args.batch_size,
            "learning_rate": learning_rate,
            "warmup_steps": max(1, steps // 12),
            "lr_schedule": "cosine",
            "ema_decay": 0.995,
            "log_every_steps": 20,
        }

    def train(self, trainer_class: Any, config: Any, model: Path, triplets: TripletDataset, **own: Any) -> Path:
        """Run a trainer, `own` being what it alone takes; give the folder of the finished pipeline."""
        began = time.perf_counter()
        trainer_class(load(model), triplets, config, **own).train()
        self.report(config.output_dir.name, began)
        return config.output_dir

    def report(self, name: str, began: float) -> None:
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    if DEVICE == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    Stages(parse_arguments()).run()


if __name__ == "__main__":
    main()
