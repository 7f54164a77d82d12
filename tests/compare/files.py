"""Rules for when two files are equal.

Safetensors: tensors bit by bit, and metadata. Pictures: size, pixels and times of every frame. JSON, and lines of it:
entry by entry, but for dates, timings, versions and places. ONNX: graph and weights, without the lines of source that
the exporter notes at each node. Output of a command: its lines of JSON; of one that has none, the completion, no
option may be lost. All others: as they are. Prose, charts and timings are left out.
"""

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageSequence
from safetensors import safe_open

LEFT_OUT = ("*.err", "*.md", "*.html", "*.py", "*/plots/*", "*/seconds.safetensors")
NOT_COMPARED = {"seconds", "seconds_per_image", "date", "versions", "commit", "hardware", "address"}  # keys of JSON
# Options that the version after records and the version before does not know, with the value that changes nothing.
NEW_OPTIONS: dict[str, Any] = {"interpolation": "straight", "student_steps": 1}
# What only the version after records: the model that a run started with, and the files of its result.
NEW_RECORDS = {"starting_model"}
NEW_FILES = ("*/files.json",)
# Digests of what is compared itself, which the version after computes of something else: of the content of a folder of
# images, before of its sizes; so of the manifest, which names that digest, and of the header of a shard.
OTHER_DIGESTS = {"pictures", "manifest", "sha256"}
SETS = (".target_modules",)  # ends of keys: lists that peft makes of sets, in the order of this process' hashes
SEALS = {"blake2b"}  # of what stands beside them: another one beside a new option


def is_compared(name: str) -> bool:
    return not any(fnmatch(name, pattern) for pattern in LEFT_OUT)


def difference(before: Path, after: Path) -> str | None:
    """Return in one line how two files differ; None if they are equal."""
    for path, side in ((before, "before"), (after, "after")):
        if not path.exists():
            if side == "before" and any(fnmatch(str(path), pattern) for pattern in NEW_FILES):
                return None
            return f"not written by the version {side}"
    if before.read_bytes() == after.read_bytes():
        return None
    compare = {
        ".safetensors": _of_safetensors,
        ".json": _of_json_files,
        ".jsonl": _of_json_lines,
        ".out": _of_output,
        ".png": _of_pictures,
        ".gif": _of_pictures,
        ".onnx": _of_onnx,
    }.get(before.suffix)
    return compare(before, after) if compare else "other bytes"


def _of_safetensors(before: Path, after: Path) -> str | None:
    with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
        if set(old.keys()) != set(new.keys()):
            return f"tensors {sorted(set(old.keys()) ^ set(new.keys()))[:3]} are on one side only"
        metadata = of_json(_parsed(old.metadata()), _parsed(new.metadata()), "metadata")
        names = sorted(old.keys())
        return metadata or next(
            (name for name in names if not _same(old.get_tensor(name), new.get_tensor(name))), None
        )


def _parsed(metadata: dict[str, str] | None) -> dict[str, Any]:
    """Read the values that are JSON, without what follows it: in a shard, its checksum."""
    read = json.JSONDecoder().raw_decode
    return {key: read(value)[0] if value[:1] in ("{", "[") else value for key, value in (metadata or {}).items()}


def _same(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Compare bits: NaN is equal to itself, 0 is not -0."""
    if before.dtype != after.dtype or before.shape != after.shape:
        return False
    old, new = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (before, after))
    return torch.equal(old, new)


def _of_json_files(before: Path, after: Path) -> str | None:
    return of_json(json.loads(before.read_text()), json.loads(after.read_text()))


def _of_json_lines(before: Path, after: Path) -> str | None:
    old, new = ([json.loads(line) for line in path.read_text().splitlines()] for path in (before, after))
    return of_json(old, new)


def _of_output(before: Path, after: Path) -> str | None:
    old, new = (path.read_text().splitlines() for path in (before, after))
    results = [[json.loads(line) for line in lines if line.startswith("{")] for lines in (old, new)]
    if any(results):
        return of_json(*results)
    lost = _options(old) - _options(new)
    return f"lost {sorted(lost)[:3]}" if lost else None


def _options(lines: list[str]) -> set[str]:
    return {option for line in lines for option in re.findall(r"(?<![\w-])--[\w-]+", line)}


def of_json(before: Any, after: Any, where: str = "") -> str | None:
    """Return where two JSON values differ, ignoring the keys that are not compared."""
    if isinstance(before, dict) and isinstance(after, dict):
        apart = (
            NOT_COMPARED
            | OTHER_DIGESTS
            | (NEW_RECORDS - before.keys())
            | _new_options(before, after)
            | (SEALS if _has_new_option(before, after) else set())
        )
        keys = [key for key in {**before, **after} if key not in apart]
        for key in keys:
            if key not in before or key not in after:
                return f"{where}/{key} is on one side only"
        return next((found for key in keys if (found := of_json(before[key], after[key], f"{where}/{key}"))), None)
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        if where.endswith(SETS):
            before, after = sorted(before), sorted(after)
        pairs = enumerate(zip(before, after, strict=True))
        return next((found for i, pair in pairs if (found := of_json(*pair, f"{where}/{i}"))), None)
    same = type(before) is type(after) and repr(before) == repr(after)  # NaN is equal to itself
    return None if same else f"{where or '/'} is {str(before)[:60]}, then {str(after)[:60]}"


def _new_options(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    known = (key for key in NEW_OPTIONS if key in after and key not in before)
    return {key for key in known if after[key] == NEW_OPTIONS[key]}


def _has_new_option(before: Any, after: Any) -> bool:
    """Return whether an object nested in this one has a new option."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return False
    below = (_has_new_option(before[key], after[key]) for key in before.keys() & after.keys())
    return bool(_new_options(before, after)) or any(below)


def _of_pictures(before: Path, after: Path) -> str | None:
    old, new = (_frames(path) for path in (before, after))
    if len(old) != len(new):
        return f"{len(old)} frames, then {len(new)}"
    return next(
        (f"frame {i} differs" for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]), None
    )


def _frames(path: Path) -> list[Any]:
    with Image.open(path) as image:
        frames = ImageSequence.Iterator(image)
        return [(each.mode, each.size, each.info.get("duration"), each.convert("RGBA").tobytes()) for each in frames]


def _of_onnx(before: Path, after: Path) -> str | None:
    return None if _bare(before) == _bare(after) else "the graphs differ"


def _bare(path: Path) -> bytes:
    """Return a model without the exporter's notes of the source line of each node."""
    import onnx

    model = onnx.load(str(path))
    for part in (model.graph, *model.functions):
        for each in (part, *part.node, *part.value_info):
            each.ClearField("doc_string")
            each.ClearField("metadata_props")
    return model.SerializeToString(deterministic=True)
