"""Average the U-Nets of pipelines that were trained from one model (model soups, arXiv:2203.05482).

    python examples/emoji/average.py --models work/lpips work/matched --shares 0.5 0.5 --output work/averaged

All other parts are those of the first pipeline.
"""

import argparse
import json
from pathlib import Path

import torch

from rectified_diffusers import RectifiedFlowPipeline
from rectified_diffusers.loading.saving import save_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="pipeline folders")
    parser.add_argument("--shares", type=float, nargs="+", required=True, help="share of each, with a sum of 1")
    parser.add_argument("--output", type=Path, required=True, help="folder of the averaged pipeline")
    args = parser.parse_args()
    if len(args.shares) != len(args.models) or not abs(sum(args.shares) - 1) < 1e-6:
        parser.error(f"expected one share per model with a sum of 1, got {len(args.models)} models and {args.shares}.")

    pipelines = [RectifiedFlowPipeline.from_pretrained(folder, torch_dtype=torch.float32) for folder in args.models]
    weights = [pipeline.unet.state_dict() for pipeline in pipelines]
    average = {
        name: sum(share * other[name] for share, other in zip(args.shares, weights, strict=True))
        for name in weights[0]
    }
    pipelines[0].unet.load_state_dict(average)
    save_pipeline(pipelines[0], args.output)
    shares = {folder.name: share for folder, share in zip(args.models, args.shares, strict=True)}
    (args.output / "training.json").write_text(json.dumps({"average": shares}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
