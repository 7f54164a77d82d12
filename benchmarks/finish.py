"""Compare further trainings of a finished one-step model, each with about the same number of network evaluations.

    python benchmarks/finish.py --model MODEL --teacher examples/emoji/teacher --data work/data \\
        --prompts work/prompts.txt --weights work/weights --alignment work/alignment --batch-size 32 --steps 1000

Every row starts from MODEL and is trained on triplets of the teacher; the row `as it is` is MODEL itself. `--steps`
counts steps of distillation. A step of distribution matching evaluates several networks, so its rows have fewer steps.
The work folder is shared with table.py. If the script is killed, run the same command again to resume.
"""

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

from table import Line, Stage, Table, add_arguments, parsed, write

MATCHING = {"fake_updates": 3, "first_fake_updates": 20, "learning_rate": 1e-4, "fake_learning_rate": 2e-4}
REGRESSION = {"regression_weight": 0.25, "regression_loss": "lpips"}


def weighted(adversarial: int, discriminator: int) -> dict[str, float]:
    """Return multiples of the default weights of the terms that come with real images."""
    return {"adversarial_weight": adversarial * 1e-3, "discriminator_weight": discriminator * 1e-2}


def matching(real: bool = False, **options: Any) -> tuple[Stage, ...]:
    return (Stage("dmd", Fraction(1), {**MATCHING, **options}, discriminator=real),)


TRIALS: dict[str, tuple[Stage, ...]] = {
    "as it is": (),
    "L2": (Stage("distill", Fraction(1), {"loss": "l2"}),),
    "LPIPS": (Stage("distill", Fraction(1), {"loss": "lpips"}),),
    "matching": matching(),
    "matching, regression": matching(**REGRESSION),
    "matching, real pictures": matching(real=True),
    "matching, real pictures x10": matching(real=True, **weighted(10, 1)),
    "matching, real pictures x100, discriminator x10": matching(real=True, **weighted(100, 10)),
    "matching, real pictures x1000, discriminator x100": matching(real=True, **weighted(1000, 100)),
    "matching, real pictures x1000, discriminator x100, regression x4": matching(
        real=True, **weighted(1000, 100), **{**REGRESSION, "regression_weight": 1.0}
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser, "finish")
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder that the rows start from")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="TRIAL")
    args = parsed(parser)
    table = Table(args, {name: Line(name, TRIALS[name], 1) for name in args.trials}, args.model)
    write(args.output, "Ways to train a finished one-step model further", table.run(), table.costs(), args)


if __name__ == "__main__":
    main()
