"""Measure on this CPU which switches of `optimize` pay: the settings of "auto" against each one changed alone.

    python benchmarks/cpu_switches.py                  # about a quarter of an hour on two quiet cores
    python benchmarks/cpu_switches.py --small --rounds 2 --output work/cpu_switches   # to test the script

The models have the shapes of Stable Diffusion 1.5. The variants take turns in one process: U-Net, VAE decoder and
AutoencoderTiny, each called once before it is timed. A change pays if its shortest time is below that of "auto" by
more than the spread of auto's own times. The results are stored by kind of CPU, next to those of other machines;
`rectified_diffusers.speed.cpu.SWITCHES` must agree with them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny

from machine import provenance, seconds, write_results
from models import MAX_TOKENS, make, make_pipeline
from rectified_diffusers import optimize
from rectified_diffusers.speed.cpu import SWITCHES, cpu_kind

ALWAYS = {"keep_memory": True, "cache_times": True}  # switches whose "auto" is on for every CPU
STAGES = ("U-Net", "decoder", "tiny decoder")


def variants() -> dict[str, dict[str, Any]]:
    """Return the arguments of `optimize`: "auto", and every switch changed alone."""
    switches = SWITCHES[cpu_kind()] | ALWAYS
    changed: dict[str, dict[str, Any]] = {"auto": {}}
    for name, value in switches.items():
        if name == "dtype":
            other = torch.bfloat16 if value == torch.float32 else torch.float32
            changed[f"dtype={other}".replace("torch.", "")] = {name: other}
        else:
            changed[f"{name}={not value}"] = {name: not value}
    return changed


@torch.no_grad()
def times(pipeline: Any, decoder: Any, side: int, arguments: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of each stage of a pipeline optimized with some arguments."""
    found = {}
    with optimize(pipeline, **arguments):
        dtype = pipeline.unet.dtype
        latents = torch.randn(1, 4, side, side, dtype=dtype)
        text = torch.randn(1, MAX_TOKENS, pipeline.unet.config.cross_attention_dim, dtype=dtype)
        calls = {
            "U-Net": lambda: pipeline.unet(latents, torch.tensor(1000.0), text, return_dict=False),
            "decoder": lambda: pipeline.vae.decode(latents, return_dict=False),
        }
        for name, call in calls.items():
            call()
            found[name] = seconds(call, "cpu")
    with optimize(pipeline, decoder=decoder, **arguments):
        latents = latents.to(pipeline.vae.dtype)
        pipeline.vae.decode(latents)
        found["tiny decoder"] = seconds(lambda: pipeline.vae.decode(latents, return_dict=False), "cpu")
    return found


def summary(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the shortest times of each variant, the spread of auto's, and the stages in which a change pays."""

    def extreme(of: Any, name: str) -> dict[str, float]:
        return {stage: of(each[stage] for each in rounds[name]) for stage in STAGES}

    shortest = {name: extreme(min, name) for name in rounds}
    longest = extreme(max, "auto")
    spread = {stage: longest[stage] - shortest["auto"][stage] for stage in STAGES}
    pays = {
        name: [stage for stage in STAGES if row[stage] < shortest["auto"][stage] - spread[stage]]
        for name, row in shortest.items()
    }
    return {"seconds": shortest, "spread of auto": spread, "pays": pays}


def as_markdown(kinds: dict[str, Any]) -> list[str]:
    lines = ["# Switches of `optimize` by kind of CPU", "", "Shortest seconds of alternated runs at 512x512.", ""]
    for kind, results in kinds.items():
        found = results["summary"]
        lines += [f"## {kind}", "", f"{results['provenance']['hardware']}, {results['provenance']['date']}, "]
        lines[-1] += f"{results['rounds']} rounds, threads {results['provenance']['threads']}, "
        lines[-1] += f"load at the start {results['provenance']['load at the start']}"
        lines += ["", f"| | {' | '.join(STAGES)} | better than auto |", "|---|" + "---|" * (len(STAGES) + 1)]
        for name, row in (found["seconds"] | {"spread of auto": found["spread of auto"]}).items():
            cells = " | ".join(f"{row[stage]:.3f}" for stage in STAGES)
            lines.append(f"| {name} | {cells} | {', '.join(found['pays'].get(name, []))} |")
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--small", action="store_true", help="narrow models at 128 pixels, to test the script")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_switches"), help="without suffix")
    args = parser.parse_args()
    stored = args.output.with_suffix(".json")
    kinds = json.loads(stored.read_text(encoding="utf-8"))["kinds"] if stored.exists() else {}
    results: dict[str, Any] = {"provenance": provenance()}
    pipeline = make_pipeline("sd15", torch.float32, "cpu", diffusion=False, small=args.small)
    decoder = make(AutoencoderTiny, torch.float32, "cpu")
    side = (128 if args.small else args.size) // 8
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in variants()}
    for done in range(1, args.rounds + 1):
        for name, arguments in variants().items():
            rounds[name].append(times(pipeline, decoder, side, arguments))
        kinds[cpu_kind()] = results | {"rounds": done, "times": rounds, "summary": summary(rounds)}
        write_results(args.output, results | {"kinds": kinds}, as_markdown(kinds), quiet=done < args.rounds)


if __name__ == "__main__":
    main()
