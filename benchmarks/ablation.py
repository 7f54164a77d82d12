"""Measure the effect of each training option on a one-step model: alone, and the best of each kind together.

    python benchmarks/ablation.py --teacher work/teacher --data work/data --prompts work/prompts.txt \\
        --weights work/weights --alignment work/alignment --budget cpu

The base is the row `2-RF + distillation` of table.py: the paper's setting, with the learning rates of the budget.
Every variant changes one option of the base and has the same number of training examples. A distribution-matching
stage takes its share of the budget from the stages before it, and has fewer examples because each costs more. A
variant equal to the base, as one of the initializations is, has no row. The last row combines, for each kind, the
variant with the lowest Frechet distance (seen captions, mean over the seeds), if it is below the base. The script is
resumable and shares the work folder of table.py: models that table.py has trained are not trained again.

At a small budget only EMA decays of 0.9 and less differ: diffusers' average keeps (1 + n) / (10 + n) of itself at step
n, if that is less than the decay.
"""

import argparse
from dataclasses import replace
from fractions import Fraction
from typing import Any

from rectified_diffusers.evaluation.report import Evaluation
from table import ROWS, Line, Stage, Table, add_arguments, parsed, write

BASE = "2rf-distill"
CRITERION = "frechet_distance_seen"
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "time density": {
        "logit-normal": {"reflow": {"time_density": "logit_normal"}},
        "U-shaped": {"reflow": {"time_density": "u_shaped"}},
    },
    "reflow loss": {
        "pseudo-Huber": {"reflow": {"loss": "pseudo_huber"}},
        "LPIPS-Huber": {"reflow": {"loss": "lpips_huber"}},
    },
    "lengths of L2 and LPIPS": {
        "L2 to the end": {"lpips": {"loss": "l2"}},
        "LPIPS from the start": {"l2": {"loss": "lpips"}},
    },
    "distillation loss": {
        "pseudo-Huber, then LPIPS": {"l2": {"loss": "pseudo_huber"}},
        "LPIPS-Huber": {"l2": {"loss": "lpips_huber"}, "lpips": {"loss": "lpips_huber"}},
    },
    "initialisation": {
        "equal signal-to-noise": {"reflow": {"initialisation": "snr_matching"}},
        "the teacher's weights": {"reflow": {"initialisation": "weights"}},
    },
    "EMA": {"none": {"all": {"ema_decay": 0.0}}, "0.9": {"all": {"ema_decay": 0.9}}},
    "prompt dropout": {"none": {"reflow": {"prompt_dropout": 0.0}}},
    "triplets": {"twice as many": {"triplets": {"times": 2}}},
    "distillation triplets": {"the teacher's, as for reflow": {"triplets": {"reuse": True}}},
    "real pairs": {"a quarter of the triplets": {"triplets": {"real": "1/4"}}},
    "distribution-matching finish": {
        "a quarter of the budget": {"finish": {"share": "1/4"}},
        "a quarter, with real pictures": {"finish": {"share": "1/4", "real": True}},
    },
}
"""The options that a variant changes, by kind and name: those of a trainer's stages, of the distillation stage with
this loss in the base, or of all stages; the number of triplets, the share of real ones, or whether distillation has
those of reflow; or the budget share of a distribution-matching stage, and whether it sees real images."""


def varied(base: Line, name: str, changes: dict[str, dict[str, Any]]) -> Line:
    """Return the base with some options changed."""
    stages = []
    for stage in base.stages:
        key = stage.method if stage.method == "reflow" else stage.options["loss"]
        stages.append(replace(stage, options={**stage.options, **changes.get("all", {}), **changes.get(key, {})}))
    if "finish" in changes:
        share = Fraction(changes["finish"]["share"])
        stages = [replace(stage, share=stage.share * (1 - share)) for stage in stages]
        real = changes["finish"].get("real", False)
        stages.append(Stage("dmd", share, changes.get("all", {}), discriminator=real))
    triplets = changes.get("triplets", {})
    times, real = triplets.get("times", base.triplets), Fraction(triplets.get("real", base.real))
    reuse = triplets.get("reuse", base.reuse)
    return replace(base, name=name, stages=tuple(stages), triplets=times, real=real, reuse=reuse)


def lines_of(kinds: list[str], initialisation: str = "weights") -> dict[str, Line]:
    """Return the base and the variants of some kinds, by kind and name, except those equal to the base."""
    lines = {"base": replace(ROWS[BASE], name="base: " + ROWS[BASE].name)}
    for kind in kinds:
        for name, changes in VARIANTS[kind].items():
            if changes != {"reflow": {"initialisation": initialisation}}:
                lines[f"{kind}: {name}"] = varied(ROWS[BASE], f"{kind}: {name}", changes)
    return lines


def best_together(report: Evaluation, kinds: list[str]) -> Line | None:
    """Combine the best variant of each kind that beats the base; None if fewer than two kinds have one.

    Of two kinds that change the same option, the better one takes part.
    """
    distance = {row.name: row.figures[CRITERION].mean for row in report.rows}
    base = distance["base: " + ROWS[BASE].name]
    best: dict[str, str] = {}  # of the kinds that beat the base
    for kind in kinds:
        made = [name for name in VARIANTS[kind] if f"{kind}: {name}" in distance]
        name = min(made, key=lambda name: distance[f"{kind}: {name}"])
        if distance[f"{kind}: {name}"] < base:
            best[kind] = name
    together: dict[str, dict[str, Any]] = {}
    won = []
    for kind in sorted(best, key=lambda kind: distance[f"{kind}: {best[kind]}"]):
        changes = VARIANTS[kind][best[kind]]
        if not any(options.keys() & together.get(key, {}).keys() for key, options in changes.items()):
            won.append(kind)
            for key, options in changes.items():
                together[key] = {**together.get(key, {}), **options}
    names = ", ".join(f"{kind} {best[kind]}" for kind in kinds if kind in won)
    return varied(ROWS[BASE], f"together: {names}", together) if len(won) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser, "ablation")
    parser.add_argument("--kinds", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="KIND")
    args = parsed(parser)
    lines = lines_of(args.kinds, args.initialisation)
    report = Table(args, lines).run()
    together = best_together(report, args.kinds)
    if together is not None:
        lines["together"] = together
        report = Table(args, lines).run()
    write(args.output, "Options of the training, one by one", report, Table(args, lines).costs(), args)


if __name__ == "__main__":
    main()
