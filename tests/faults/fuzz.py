"""Files and arguments from strangers, by the million: each is taken or refused with an error of our own.

    python -m tests.faults.fuzz --examples 120000 --output benchmarks/results/fuzzing.md
    python -m tests.faults.fuzz --targets shard manifest
    python -m tests.faults.fuzz --repeat shard 4711

Inputs are valid ones with damage that a parser may trip over: lying lengths, offsets and shapes, values of other
types, cut and altered bytes. An input is a function of its target's name and its number. What was found is kept in a
JSON file beside the table, and no input is read twice: a run that was stopped goes on with the same command. Exit code
1 if any input gives another exception than those that the target promises.
"""

import argparse
import contextlib
import io
import json
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from benchmarks.machine import provenance
from safetensors.torch import save
from tqdm import tqdm

from rectified_diffusers.cli import COMMANDS, build_parser
from rectified_diffusers.cli.shared import CommandError, options_of
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.manifest import MANIFEST_NAME
from rectified_diffusers.data.prompts import read_prompts
from rectified_diffusers.data.shards import Shard
from rectified_diffusers.training.checkpoint_reading import STATE, sealed, unsealed
from rectified_diffusers.weights.delta import apply_weight_delta, load_weight_delta
from tests.faults import kept
from tests.faults.kept import Found

# --- inputs ---------------------------------------------------------------------------------------------------------

CHARACTERS = [*"aB 7/.-_%\"'{}[]:,\\", *"\0\n\r\t\x85\u2028é😀", "\ud800"]
ODD_NUMBERS = [0, 1, -1, 2, 4, 7, 2**31, 2**53, 2**63 - 1, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320]
ODD_NUMBERS += [float("nan"), float("inf"), float("-inf")]
ODD_WORDS = ["0", "-1", "1e400", "nan", "none", "cat", "--", "@x", "%s", "", "a=b", "1,2", "null"]


def text(chance: Random, longest: int) -> str:
    return "".join(chance.choices(CHARACTERS, k=chance.randint(0, longest)))


def json_value(chance: Random, depth: int = 2) -> Any:
    """Return any JSON value, lists and objects up to a depth."""
    kind = chance.randint(0, 6 if depth else 4)
    if kind == 5:
        return [json_value(chance, depth - 1) for _ in range(chance.randint(0, 3))]
    if kind == 6:
        return {text(chance, 6): json_value(chance, depth - 1) for _ in range(chance.randint(0, 3))}
    scalars = (None, chance.random() < 0.5, chance.choice(ODD_NUMBERS), chance.randint(-300, 300), text(chance, 8))
    return scalars[kind]


def altered_json(chance: Random, value: Any) -> Any:
    """Return a JSON value with one entry, at any depth, removed, added or changed."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key, how = chance.choice(sorted(value)), chance.randint(0, 5)
        if how == 0:
            return {name: item for name, item in value.items() if name != key}
        if how == 1:
            return {**value, text(chance, 6): json_value(chance)}
        return {**value, key: altered_json(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.7:
        index = chance.randrange(len(value))
        return [*value[:index], altered_json(chance, value[index]), *value[index + 1 :]]
    if isinstance(value, str) and chance.random() < 0.3:
        index = chance.randint(0, len(value))
        return value[:index] + text(chance, 4) + value[index + chance.randint(0, 2) :]
    return json_value(chance)


def altered_bytes(chance: Random, content: bytes) -> bytes:
    """Return bytes with a cut, an insertion, an overwrite or a flipped bit, or entirely new bytes."""
    how = chance.randint(0, 5)
    if how == 0:
        return chance.randbytes(chance.randint(0, 64))
    start = chance.randint(0, len(content))
    if how == 1:
        return content[:start]
    if how == 2 and start < len(content):
        return content[:start] + bytes([content[start] ^ 1 << chance.randint(0, 7)]) + content[start + 1 :]
    piece = chance.randbytes(chance.randint(1, 16))
    return content[:start] + piece + content[start + (len(piece) if how > 3 else 0) :]


def altered_safetensors(chance: Random, content: bytes, text_key: str | None) -> bytes:
    """Return a safetensors file with a lie in its header, in our text inside it, in its length or in its bytes."""
    how = chance.randint(0, 3)
    if how == 0:
        return altered_bytes(chance, content)
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    if how == 1 and text_key:
        line, separator, _ = header["__metadata__"][text_key].partition("\n")
        line = json.dumps(altered_json(chance, json.loads(line)))
        checksum = f"{zlib.crc32(line.encode()):08x}" if separator else ""
        header["__metadata__"][text_key] = f"{line}{separator}{checksum}"
    else:
        header = altered_json(chance, header)
    encoded = json.dumps(header).encode()
    length = chance.choice([len(encoded) + 1, chance.getrandbits(64), chance.getrandbits(10)]) if how == 3 else None
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + body


def command_line(chance: Random, options: list[str]) -> list[str]:
    """Return a command with options and odd values."""
    name = chance.choice(COMMANDS).__name__.removeprefix("add_") if chance.random() < 0.95 else text(chance, 4)
    words = (
        lambda: chance.choice(options),
        lambda: chance.choice(ODD_WORDS),
        lambda: str(chance.choice(ODD_NUMBERS)),
        lambda: text(chance, 6),
    )
    return [name, *(chance.choice(words)() for _ in range(chance.randint(0, 8)))]


OURS = "rectified_diffusers"  # the name of our text in a header
BATCH = 5000

# --- targets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What reads inputs, how they look, and with what it may refuse them."""

    make: Callable[[Random], Any]
    read: Callable[[Any], object]
    refusals: tuple[type[BaseException], ...] = (ValueError, OSError)


def make_targets(folder: Path) -> dict[str, Target]:
    """Write valid files below a folder and return the targets that take damaged copies of them."""
    from tests.training.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
    from tests.training.helpers import make_dataset, make_trainer

    triplets = folder / "triplets"
    dataset = make_dataset(triplets)
    make_trainer("reflow", dataset, folder / "run", max_steps=2).train()
    whole = read_checkpoint(folder / "run" / "checkpoints" / "step-00000002")
    weights = {name: {"weight": torch.ones(2)} for name in whole.tensors}  # few, so that reading them takes no time
    checkpoint = write_checkpoint(folder / "checkpoints", Checkpoint(2, weights, whole.state), keep=1)
    shard_path, manifest_path = triplets / "shard-00000.safetensors", triplets / MANIFEST_NAME
    shard, manifest = shard_path.read_bytes(), json.loads(manifest_path.read_text())
    module = torch.nn.Linear(3, 2)
    changes = {name: 0.1 * torch.ones_like(weight) for name, weight in module.state_dict().items()}
    delta = save(changes)
    header = {"kind": "weight_delta", "format_version": 1, "dtype": "float32", "fine_tune": "a", "base": "b"}
    described = save(changes, {"format": "pt", OURS: json.dumps(header)})

    def written(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    def read_shard(content: bytes) -> None:
        opened = Shard.open(written("shard.safetensors", content))
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
        apply_weight_delta(module, load_weight_delta(written("delta.safetensors", content))).take_back()

    def read_txt(content: bytes) -> None:
        list(read_prompts(written("prompts.txt", content)))

    def read_jsonl(content: bytes) -> None:
        list(read_prompts(written("prompts.jsonl", content)))

    def open_checkpoint(value: Any) -> None:
        (checkpoint / STATE).write_text(sealed(value) if isinstance(value, dict) else json.dumps(value))
        read_checkpoint(checkpoint)

    parser = build_parser()
    options = sorted({option for command in _commands_of(parser) for option in command._option_string_actions})

    def parse(argv: list[str]) -> None:
        """Parse as `main` does, up to where the work would begin."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            namespace = parser.parse_args(argv)
        if hasattr(namespace, "options"):
            options_of(namespace)

    lines = b'{"prompt": "a red apple"}\n{"prompt": "the sea", "n": [1, {"a": null}]}\n'
    state = unsealed((checkpoint / STATE).read_text())
    return {
        "shard": Target(lambda chance: altered_safetensors(chance, shard, OURS), read_shard),
        "triplets": Target(lambda chance: altered_safetensors(chance, shard, OURS), open_triplets),
        "manifest": Target(lambda chance: altered_json(chance, manifest), open_manifest),
        "delta": Target(lambda chance: altered_safetensors(chance, delta, None), apply_delta),
        "described-delta": Target(lambda chance: altered_safetensors(chance, described, OURS), apply_delta),
        "prompts-txt": Target(lambda chance: altered_bytes(chance, "a red apple\nthe café\n\n".encode()), read_txt),
        "prompts-jsonl": Target(lambda chance: altered_bytes(chance, lines), read_jsonl),
        "checkpoint": Target(lambda chance: altered_json(chance, state), open_checkpoint),
        "arguments": Target(
            lambda chance: command_line(chance, options), parse, (ValueError, OSError, CommandError, SystemExit)
        ),
    }


def _commands_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [command for action in actions for command in action.choices.values()]


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass
class Count(Found):
    """How many inputs a target took and refused, and the numbers of those that it stumbled over."""

    taken: int = 0
    refused: int = 0
    crashes: dict[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return self.taken + self.refused + len(self.crashes)


def input_of(name: str, target: Target, number: int) -> Any:
    return target.make(Random(f"{name}/{number}"))


def fuzz(name: str, target: Target, count: Count, examples: int) -> None:
    """Run a target on the next inputs, and count the outcomes."""
    for number in range(count.inputs, count.inputs + examples):
        value = input_of(name, target, number)
        try:
            target.read(value)
        except target.refusals:
            count.refused += 1
        except Exception as error:  # noqa: BLE001 (a crash of a target is the finding)
            count.crashes[str(number)] = f"{type(error).__name__}: {error}"
        else:
            count.taken += 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--examples", type=int, default=10_000, help="inputs to each target (default: 10000)")
    parser.add_argument("--targets", nargs="*")
    parser.add_argument("--output", type=Path, help="file for the table, Markdown; the .json beside it keeps counts")
    parser.add_argument("--repeat", nargs=2, metavar=("TARGET", "NUMBER"), help="read one input, and say all of it")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = kept.read(options.output) or {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:
        targets = make_targets(Path(work))
        if options.repeat:
            name, number = options.repeat
            print(value := input_of(name, targets[name], int(number)))
            targets[name].read(value)
            return 0
        counts, commit = {name: Count(**found.get(name, {})) for name in targets}, provenance()["commit"]
        for name in options.targets or targets:
            count, left = counts[name], options.examples - counts[name].inputs
            for _ in tqdm(range(0, left, BATCH), desc=name, unit=f"{BATCH} inputs", mininterval=5):
                fuzz(name, targets[name], count, min(BATCH, options.examples - count.inputs))
                count.note(commit)
                kept.save(options.output, counts)
    total = sum(count.inputs for count in counts.values())
    text = f"{total} damaged inputs: read without an error, refused with one of ours, or a crash, which is any other."
    rows = [f"| {name} | {c.inputs} | {c.taken} | {c.refused} | {len(c.crashes)} |" for name, c in counts.items()]
    rows = ["| target | inputs | taken | refused | crashes |", *rows]
    command = f"python -m tests.faults.fuzz --examples {options.examples}"
    table = kept.render("Fuzzing", text, rows, command, counts.values())
    crashes = [(name, *crash) for name, count in counts.items() for crash in count.crashes.items()]
    print(table, *(f"{name} {number}: {error}" for name, number, error in crashes), sep="\n")
    if options.output:
        options.output.write_text(table, encoding="utf-8")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
