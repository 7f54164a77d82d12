"""Compare the emoji teacher with reflowed and distilled models, on seen and held-out captions.

    python benchmarks/emoji_table.py --teacher work/teacher --reflow work/2-rectified-flow --distilled work/one-step \\
        --data work/data --weights work/weights --alignment work/alignment

Runs `rectified-diffusers evaluate --plots` once per model, into one folder. Every row generates the same captions from
the same noise. Each caption has two real images: one set is the reference, the other gives the floor. R-precision is
computed with the scorer of examples/emoji/alignment.py. The second table has the ratio of every metric to the
teacher's. If the script is killed, run the same command again to resume. The results and plots are written to
benchmarks/results.
"""

import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from diffusers import DiffusionPipeline

import rectified_diffusers  # noqa: F401  (makes our pipelines known to the loader)
from machine import provenance
from rectified_diffusers.data.real_images import read_pictures
from rectified_diffusers.evaluation.config import EvaluationConfig
from rectified_diffusers.evaluation.evaluate import evaluate
from rectified_diffusers.evaluation.plots import write_plots
from rectified_diffusers.evaluation.report import Evaluation
from rectified_diffusers.models.latents import latent_shape


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="pipeline folder")
    for name in ("reflow", "distilled"):
        parser.add_argument(
            f"--{name}", type=Path, nargs="+", default=[], help="pipeline folders; several are labeled by folder"
        )
    parser.add_argument(
        "--distilled-steps", type=int, nargs="+", default=[1], help="steps of the distilled models (default: 1)"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that examples/emoji/data.py wrote")
    parser.add_argument("--weights", type=Path, required=True, help="folder that examples/emoji/weights.py wrote")
    parser.add_argument("--alignment", type=Path, required=True, help="folder that examples/emoji/alignment.py wrote")
    parser.add_argument("--num-prompts", type=int, default=1000, help="images of seen captions, per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher-guidance", type=float, default=5.0)
    parser.add_argument("--reflow-guidance", type=float, default=1.5)
    parser.add_argument("--straightness-prompts", type=int, default=32, help="prompts per seed")
    parser.add_argument("--straightness-steps", type=int, default=100)
    parser.add_argument("--feature-size", type=int, default=128, help="image size for MobileNetV2, in pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("work/emoji_table"), help="folder of the evaluation")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/emoji_table"), help="without suffix")
    return parser.parse_args()


def named(kind: str, folders: list[Path]) -> list[tuple[str, Path]]:
    """Label a single model by its kind, and several models by their folders too."""
    return [(kind if len(folders) == 1 else f"{kind}: {folder}", folder) for folder in folders]


def measure(args: argparse.Namespace) -> Evaluation:
    """Evaluate all models in one folder."""
    models = [
        ("diffusion teacher", args.teacher, (25,), args.teacher_guidance),
        *((name, folder, (25, 1), args.reflow_guidance) for name, folder in named("2-RF", args.reflow)),
        *((name, folder, tuple(args.distilled_steps), 1.0) for name, folder in named("distilled", args.distilled)),
    ]
    for name, folder, steps, guidance_scale in models:
        pipeline = DiffusionPipeline.from_pretrained(str(folder)).to(args.device)
        config = EvaluationConfig(
            steps=steps,
            guidance_scale=guidance_scale,
            seeds=tuple(args.seeds),
            num_pictures=args.num_prompts,
            feature_size=args.feature_size,
            mobilenet_weights=args.weights / "mobilenet_v2.safetensors",
            alignment=args.alignment,
            sentence_encoder=str(args.weights / "minilm"),
            straightness_prompts=args.straightness_prompts,
            straightness_steps=args.straightness_steps,
            batch_size=args.batch_size,
        )
        pictures = read_pictures(args.data, latent_shape(pipeline)[1] * pipeline.vae_scale_factor)
        evaluate(pipeline, pictures, args.work, config, name)
    report = replace(Evaluation.read(args.work), reference=("diffusion teacher", 25, args.teacher_guidance))
    report.write(args.work)
    return report


def main() -> None:
    args = parse_arguments()
    report, made = measure(args), provenance(args.device)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**asdict(report), "made": made}, indent=2)
    args.output.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    note = f"    {made['command']}\n\nCommit {made['commit']}; {made['hardware']}; {made['date']}.\n"
    text = "\n\n".join(["# Emoji: teacher and students", report.as_markdown().strip(), note])
    args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    for plot in write_plots(args.work):
        shutil.copy(plot, args.output.with_name(f"{args.output.name}_{plot.name}"))
    print(text)


if __name__ == "__main__":
    main()
