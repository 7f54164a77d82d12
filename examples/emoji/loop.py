"""The training loop of the VAE, its decoder, the teacher and the ControlNet: averaged weights, resumable, parallel.

What a step sees is drawn from a generator seeded with the step, so a killed run goes on as if nothing had happened.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import get_wsd_schedule


def add_training_options(parser: argparse.ArgumentParser, *, max_steps: int, batch_size: int, learning_rate: float):
    """Add the options that `train` reads, with a stage's own defaults."""
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained model and its checkpoints")
    parser.add_argument("--max-steps", type=int, default=max_steps)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument(
        "--decay-steps", type=int, default=max_steps // 5, help="last steps, over which the learning rate falls"
    )
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--save-every-steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)


def train(
    module: torch.nn.Module,
    loss_of_batch: Callable[[torch.nn.Module, torch.Generator, slice], torch.Tensor],
    save: Callable[[], None],
    args: argparse.Namespace,
) -> None:
    """Train what of `module` requires a gradient; `save` is called with the averaged weights in place.

    `loss_of_batch(module, generator, mine)` draws a whole batch from the generator and returns the mean loss of the
    rows `mine`, this process's share.
    """
    accelerator = Accelerator()  # whose own mixed precision would be that of every later training of the process
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    parameters = [weight for weight in module.to(accelerator.device).parameters() if weight.requires_grad]
    ema = EMAModel(parameters, decay=args.ema_decay, foreach=True)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    lr_factor = get_wsd_schedule(
        optimizer, args.warmup_steps, args.decay_steps, args.max_steps, decay_type="linear", min_lr_ratio=0.02
    ).lr_lambdas[0]  # a function of the step alone
    checkpoints = args.output / "checkpoints"
    done = load_newest(checkpoints, parameters, ema, optimizer)
    module, prepared = accelerator.prepare(module, optimizer)

    main = accelerator.is_main_process
    bar = tqdm(range(done, args.max_steps), initial=done, total=args.max_steps, mininterval=5, disable=not main)
    for step in bar:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            loss = loss_of_batch(module, generator, mine)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * lr_factor(step)
        prepared.step()
        prepared.zero_grad()
        ema.step(parameters)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if main and ((step + 1) % args.save_every_steps == 0 or step + 1 == args.max_steps):
            save_checkpoint(checkpoints, step + 1, parameters, ema, optimizer)
            ema.store(parameters)
            ema.copy_to(parameters)
            save()
            ema.restore(parameters)


def save_checkpoint(
    folder: Path, step: int, parameters: list[torch.nn.Parameter], ema: EMAModel, optimizer: torch.optim.Optimizer
) -> None:
    """Write weights, averages and optimizer to one file, renamed when whole, and drop all but the newest two."""
    tensors = {}
    for i, (parameter, average) in enumerate(zip(parameters, ema.shadow_params, strict=True)):
        tensors |= {f"{i}.weight": parameter.detach(), f"{i}.average": average}
        tensors |= {f"{i}.{key}": value for key, value in optimizer.state[parameter].items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "unfinished")
    (folder / "unfinished").rename(folder / f"{step}.safetensors")
    for old in steps_of(folder)[:-2]:
        (folder / f"{old}.safetensors").unlink()


def load_newest(
    folder: Path, parameters: list[torch.nn.Parameter], ema: EMAModel, optimizer: torch.optim.Optimizer
) -> int:
    """Take up the newest checkpoint, if there is one, and give the number of steps that are done."""
    steps = steps_of(folder)
    if not steps:
        return 0
    tensors = load_file(folder / f"{steps[-1]}.safetensors", device=str(parameters[0].device))
    for i, (parameter, average) in enumerate(zip(parameters, ema.shadow_params, strict=True)):
        parameter.data.copy_(tensors[f"{i}.weight"])
        average.copy_(tensors[f"{i}.average"])
        optimizer.state[parameter] = {key: tensors[f"{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    ema.optimization_step = steps[-1]
    return steps[-1]


def steps_of(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    return sorted(int(path.stem) for path in folder.glob("*.safetensors"))
