"""What each option of the training is worth for a one-step model: alone, and the best of each kind together.

    python benchmarks/ablation.py --teacher work/teacher --data work/data --prompts work/prompts.txt \\
        --weights work/weights --alignment work/alignment --budget cpu

The base is the row `2-RF + distillation` of table.py: the paper's setting, with the learning rates of the budget.
Every variant changes one option of it and has the same number of training examples; a finish takes its share of that
from the stages before it, and has fewer examples as each is more work. A variant that is the base, as one of the
initialisations is, has no row. The last row has of each kind the variant with the lowest Frechet distance (seen
captions, mean over the seeds), where one is below the base. Resumable, as table.py is, and sharing its work folder:
what table.py has trained is not trained again.

Of the EMA, only decays of 0.9 and less differ at a small budget: diffusers' average keeps (1 + n) / (10 + n) of itself
at step n, if that is less than the decay.
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
    "distillation loss": {
        "LPIPS from the start": {"l2": {"loss": "lpips"}},
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
    "real pairs": {"a quarter of the triplets": {"triplets": {"real": "1/4"}}},
    "distribution-matching finish": {
        "a quarter of the budget": {"finish": {"share": "1/4"}},
        "a quarter, with real pictures": {"finish": {"share": "1/4", "real": True}},
    },
}
"""By kind and name, the options that a variant changes: of the stages of a trainer, of the distillation by its loss in
the base, of all of them, the number of triplets or the share of real ones, or the share of the budget that a finish
has and whether it sees real pictures."""


def varied(base: Line, name: str, changes: dict[str, dict[str, Any]]) -> Line:
    """Give the base with some options changed."""
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
    return replace(base, name=name, stages=tuple(stages), triplets=times, real=real)


def lines_of(kinds: list[str], initialisation: str = "weights") -> dict[str, Line]:
    """Give the base and the variants of some kinds, by kind and name, but for those that are the base."""
    lines = {"base": replace(ROWS[BASE], name="base: " + ROWS[BASE].name)}
    for kind in kinds:
        for name, changes in VARIANTS[kind].items():
            if changes != {"reflow": {"initialisation": initialisation}}:
                lines[f"{kind}: {name}"] = varied(ROWS[BASE], f"{kind}: {name}", changes)
    return lines


def best_together(report: Evaluation, kinds: list[str]) -> Line | None:
    """Combine the best variant of each kind that beats the base; None if fewer than two kinds have one."""
    distance = {row.name: row.figures[CRITERION].mean for row in report.rows}
    base = distance["base: " + ROWS[BASE].name]
    together: dict[str, dict[str, Any]] = {}
    won = []
    for kind in kinds:
        made = [name for name in VARIANTS[kind] if f"{kind}: {name}" in distance]
        name = min(made, key=lambda name: distance[f"{kind}: {name}"])
        if distance[f"{kind}: {name}"] < base:
            won.append(f"{kind} {name}")
            for key, options in VARIANTS[kind][name].items():
                together[key] = {**together.get(key, {}), **options}
    return varied(ROWS[BASE], f"together: {', '.join(won)}", together) if len(won) > 1 else None


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
