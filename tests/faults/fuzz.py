"""Files and arguments from strangers, by the million: each is taken or refused with an error of our own.

    python -m tests.faults.fuzz --examples 200000            every target, that many inputs each
    python -m tests.faults.fuzz --targets shard manifest

Inputs are valid ones with damage that a parser may trip over: lying lengths, offsets and shapes, values of other
types, cut and altered bytes. Exit code 1 if any input gives another exception than those that the target promises.
"""

import argparse
import contextlib
import io
import json
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from rectified_diffusers.cli import COMMANDS, build_parser
from rectified_diffusers.cli.shared import CommandError
from rectified_diffusers.data.manifest import MANIFEST_NAME
from rectified_diffusers.data.prompts import read_prompts
from rectified_diffusers.data.shards import Shard
from rectified_diffusers.data.triplets import TripletDataset
from rectified_diffusers.training.checkpoint import read_checkpoint
from rectified_diffusers.weights.delta import apply_weight_delta, load_weight_delta

# --- strategies -----------------------------------------------------------------------------------------------------

ODD_NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**53, 2**63 - 1, -(2**63), 2**64, 1e308, float("nan"), float("inf")])
SCALARS = st.one_of(st.none(), st.booleans(), ODD_NUMBERS, st.integers(), st.floats(), st.text(max_size=8))
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def altered_json(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value of which one entry, at any depth, is gone, added or of another value."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        how = draw(st.integers(0, 5))
        if how == 0:
            return {name: item for name, item in value.items() if name != key}
        if how == 1:
            return {**value, draw(st.text(max_size=6)): draw(JSON_VALUES)}
        return {**value, key: draw(altered_json(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 2)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(altered_json(value[index])), *value[index + 1 :]]
    return draw(JSON_VALUES)


@st.composite
def altered_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a cut, an insertion, an overwriting or all anew."""
    how = draw(st.integers(0, 4))
    if how == 0:
        return draw(st.binary(max_size=64))
    start = draw(st.integers(0, len(content)))
    if how == 1:
        return content[:start]
    piece = draw(st.binary(min_size=1, max_size=16))
    return content[:start] + piece + content[start + (len(piece) if how > 2 else 0) :]


@st.composite
def altered_safetensors(draw: st.DrawFn, content: bytes, text_key: str | None) -> bytes:
    """A safetensors file with a lie in its header, in our text inside the header, in its length or in its bytes."""
    how = draw(st.integers(0, 3))
    if how == 0:
        return draw(altered_bytes(content))
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    if how == 1 and text_key:
        line, separator, _ = header["__metadata__"][text_key].partition("\n")
        line = json.dumps(draw(altered_json(json.loads(line))))
        checksum = f"{zlib.crc32(line.encode()):08x}" if separator else ""
        header["__metadata__"][text_key] = f"{line}{separator}{checksum}"
    else:
        header = draw(altered_json(header))
    encoded = json.dumps(header).encode()
    length = len(encoded) if how < 3 else draw(st.one_of(st.just(len(encoded)), st.integers(0, 2**64 - 1)))
    return struct.pack("<Q", length) + encoded + body


# --- targets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What reads inputs, how they look, and with what it may refuse them."""

    inputs: st.SearchStrategy[Any]
    read: Callable[[Any], object]
    refusals: tuple[type[BaseException], ...] = (ValueError, OSError)


def make_targets(folder: Path) -> dict[str, Target]:
    """Write valid files below a folder and give the targets that take damaged copies of them."""
    from tests.training.helpers import make_dataset, make_trainer

    triplets = folder / "triplets"
    dataset = make_dataset(triplets)
    make_trainer("reflow", dataset, folder / "run", max_steps=2).train()
    checkpoint = folder / "run" / "checkpoints" / "step-00000002"
    shard_path, manifest_path = triplets / "shard-00000.safetensors", triplets / MANIFEST_NAME
    shard, manifest = shard_path.read_bytes(), json.loads(manifest_path.read_text())
    module = torch.nn.Linear(3, 2)
    delta = save({name: 0.1 * torch.ones_like(weight) for name, weight in module.state_dict().items()})
    header = {"kind": "weight_delta", "format_version": 1, "dtype": "float32", "fine_tune": "a", "base": "b"}
    described = save(
        {name: 0.1 * torch.ones_like(weight) for name, weight in module.state_dict().items()},
        {"format": "pt", "rectified_diffusers": json.dumps(header)},
    )

    def read_shard(content: bytes) -> None:
        path = folder / "shard.safetensors"
        path.write_bytes(content)
        opened = Shard.open(path)
        opened.layout()
        opened.verify()

    def open_triplets(content: bytes) -> None:
        shard_path.write_bytes(content)
        TripletDataset(triplets).rows([0, 1])

    def open_manifest(value: Any) -> None:
        shard_path.write_bytes(shard)
        manifest_path.write_text(json.dumps(value))
        TripletDataset(triplets).rows([0])

    def apply_delta(content: bytes) -> None:
        path = folder / "delta.safetensors"
        path.write_bytes(content)
        apply_weight_delta(module, load_weight_delta(path)).take_back()

    def read_text(suffix: str) -> Callable[[bytes], object]:
        def read(content: bytes) -> None:
            path = folder / f"prompts{suffix}"
            path.write_bytes(content)
            for _ in read_prompts(path):
                pass

        return read

    def open_checkpoint(value: Any) -> None:
        (checkpoint / "state.json").write_text(json.dumps(value))
        read_checkpoint(checkpoint)

    lines = b'{"prompt": "a red apple"}\n{"prompt": "the sea", "n": [1, {"a": null}]}\n'
    state = json.loads((checkpoint / "state.json").read_text())
    return {
        "shard": Target(altered_safetensors(shard, "rectified_diffusers"), read_shard),
        "triplets": Target(altered_safetensors(shard, "rectified_diffusers"), open_triplets),
        "manifest": Target(altered_json(manifest), open_manifest),
        "delta": Target(altered_safetensors(delta, None), apply_delta),
        "described-delta": Target(altered_safetensors(described, "rectified_diffusers"), apply_delta),
        "prompts-txt": Target(altered_bytes("a red apple\nthe café\n\n".encode()), read_text(".txt")),
        "prompts-jsonl": Target(altered_bytes(lines), read_text(".jsonl")),
        "checkpoint": Target(altered_json(state), open_checkpoint),
        "arguments": Target(arguments(), parse, (ValueError, OSError, CommandError, SystemExit)),
    }


def arguments() -> st.SearchStrategy[list[str]]:
    """Command lines of our commands, options and odd values."""
    names = sorted({option for command in _command_parsers() for option in command._option_string_actions})
    commands = st.sampled_from([name.removeprefix("add_") for name in (add.__name__ for add in COMMANDS)])
    values = st.one_of(
        st.text(max_size=6), st.sampled_from(["0", "-1", "1e400", "nan", "none", "cat", "--", "@x", "%s", ""])
    )
    words = st.lists(st.one_of(st.sampled_from(names), values), max_size=8)
    return st.builds(lambda command, rest: [command, *rest], commands | st.text(max_size=4), words)


def parse(argv: list[str]) -> None:
    """Parse as `main` does, up to where the work would begin."""
    from rectified_diffusers.options import options_from

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        namespace = build_parser().parse_args(argv)
    if hasattr(namespace, "config_class"):
        options_from(namespace, namespace.config_class)


def _command_parsers() -> list[argparse.ArgumentParser]:
    actions = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser for action in actions for parser in action.choices.values()]


# --- the run --------------------------------------------------------------------------------------------------------


def fuzz(target: Target, examples: int) -> tuple[int, int]:
    """Give inputs to a target and return how many it took and how many it refused; any other exception is raised."""
    taken = refused = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def run(value: Any) -> None:
        nonlocal taken, refused
        try:
            target.read(value)
        except target.refusals:
            refused += 1
        else:
            taken += 1

    run()
    return taken, refused


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--examples", type=int, default=10_000, help="inputs to each target (default: 10000)")
    parser.add_argument("--targets", nargs="*")
    parser.add_argument("--output", type=Path, help="file for the table, Markdown")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    failures, rows = [], []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:
        for name, target in make_targets(Path(work)).items():
            if options.targets and name not in options.targets:
                continue
            began = time.monotonic()
            try:
                taken, refused = fuzz(target, options.examples)
            except Exception as error:  # noqa: BLE001 - a crash of a target is the finding
                failures.append(f"{name}: {type(error).__name__}: {error}")
                print(failures[-1], *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
                continue
            rows.append(f"| {name} | {taken + refused} | {taken} | {refused} | 0 |")
            print(rows[-1], f"{time.monotonic() - began:.0f} s", flush=True)
    table = "\n".join(["| target | inputs | taken | refused | crashes |", "|---|---|---|---|---|", *rows])
    print(table)
    if options.output:
        options.output.write_text(f"`python -m tests.faults.fuzz --examples {options.examples}`\n\n{table}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
