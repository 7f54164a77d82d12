"""Try ways to train a finished one-step model further, each with the same number of network evaluations.

    python benchmarks/finish.py --model MODEL --teacher examples/emoji/teacher --data work/data \\
        --prompts work/prompts.txt --weights work/weights --alignment work/alignment --batch-size 32 --steps 1000

Every row starts from MODEL, whose own row is the first, and is trained on triplets of the teacher. `--steps` counts
steps of distillation; a step of distribution matching takes several networks, and a row has as many fewer of them. The
work folder is shared with table.py, and a killed script resumes.
"""

import argparse
from fractions import Fraction
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
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="TRIAL")
    args = parsed(parser)
    if args.model is None:
        parser.error("give --model, the finished model that every row starts from.")
    table = Table(args, {name: Line(name, TRIALS[name], 1) for name in args.trials})
    write(args.output, "Ways to train a finished one-step model further", table.run(), table.costs(), args)


if __name__ == "__main__":
    main()
