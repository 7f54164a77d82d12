"""The loop that the VAE and the teacher are trained with: averaged weights, resumable, one process or several.

What a step sees is drawn from a generator seeded with the step, so a killed run goes on as if nothing had happened.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
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
    """Train `module`; `save` is called with the averaged weights in place.

    `loss_of_batch(module, generator, mine)` draws a whole batch from the generator and returns the mean loss of the
    rows `mine`, this process's share.
    """
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    ema = EMAModel(module.parameters(), decay=args.ema_decay, foreach=True)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    schedule = get_wsd_schedule(
        optimizer, args.warmup_steps, args.decay_steps, args.max_steps, decay_type="linear", min_lr_ratio=0.02
    )
    module, optimizer, schedule = accelerator.prepare(module, optimizer, schedule)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)

    folder = args.output / "checkpoints"
    done = max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)
    if done:
        accelerator.load_state(str(folder / str(done)))
    bar = tqdm(
        range(done, args.max_steps),
        initial=done,
        total=args.max_steps,
        mininterval=5,
        disable=not accelerator.is_main_process,
    )
    for step in bar:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        with accelerator.autocast():
            loss = loss_of_batch(module, generator, mine)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(module.parameters())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % args.save_every_steps == 0 or step + 1 == args.max_steps:
            save_checkpoint(accelerator, folder, step + 1)
            if accelerator.is_main_process:
                ema.store(module.parameters())
                ema.copy_to(module.parameters())
                save()
                ema.restore(module.parameters())


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int = 2) -> None:
    """Write a checkpoint under a temporary name, rename it when whole, and drop all but the newest `keep`."""
    accelerator.save_state(str(folder / "unfinished"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / "unfinished").rename(folder / str(step))
        steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        for old in steps[:-keep]:
            shutil.rmtree(folder / str(old))
    accelerator.wait_for_everyone()
