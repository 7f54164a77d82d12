"""The JSON manifest of a folder of triplets: the settings that produced them, which every further run must match."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rectified_diffusers.data.shards import holds_shards, write_atomically

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
_FORMAT = 1
STORAGE_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # ours -> safetensors'


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_triplets": ("a number of at least 1", _is_count),
    "triplets_per_shard": ("a number of at least 1", _is_count),
    "num_prompts": ("a number of at least 1", _is_count),
    "storage_dtype": (f"one of {', '.join(STORAGE_DTYPES)}", lambda value: value in tuple(STORAGE_DTYPES)),
    "latent_shape": ("three numbers of at least 1", lambda value: _is_shape(value) and len(value) == 3),
    "text_embeddings": (
        "shapes by name, or nothing",
        lambda value: value is None or (isinstance(value, dict) and all(map(_is_shape, value.values()))),
    ),
}
"""Entries that reading relies on: a description and a check. All other entries are only compared."""


def new_manifest(**settings: Any) -> dict[str, Any]:
    """Return a manifest with `settings`, which determine the triplets. Its last entry `made_with` does not."""
    return {"format": _FORMAT, **settings}


def settle_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a new folder, or check this run against the existing one. Return the manifest in use."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())
        return manifest
    found = read_manifest(folder)
    differing = first_difference(
        {key: value for key, value in found.items() if key != "made_with"},
        {key: value for key, value in manifest.items() if key != "made_with"},
    )
    if differing:
        key, there, here = differing
        anew = "" if holds_shards(folder) else " No triplets are there yet: to begin anew, remove that file."
        raise ValueError(
            f"The triplets in {folder} were made with other settings: expected {key} = {there!r}, got {here!r}. "
            f"Use the settings in {path} to go on, or choose another output_dir.{anew}"
        )
    # A different release or teacher location gives only a warning. Releases differ in rounding, but each triplet is
    # still a sample of its teacher, and an error would cost a long run its shards after an upgrade. A teacher whose
    # folder was moved is the same teacher.
    origin = found.get("made_with")
    differing = first_difference(origin, manifest["made_with"]) if isinstance(origin, dict) else None
    if differing:
        key, there, here = differing
        logger.warning("The triplets in %s were begun with %s = %r, now it is %r; going on.", folder, key, there, here)
    return found


def first_difference(found: dict[str, Any], expected: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the dotted key, found value and expected value of the first difference between two manifests, or None.

    Inside a nested object, such as a solver's config, keys that one side lacks are options of another release and are
    ignored.
    """
    for key in [*found, *(key for key in expected if key not in found)]:
        there, here = found.get(key), expected.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            nested = first_difference(
                {name: there[name] for name in there if name in here},
                {name: here[name] for name in there if name in here},
            )
            if nested:
                return f"{key}.{nested[0]}", nested[1], nested[2]
        elif there != here:
            return key, there, here
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a folder of triplets."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; give a folder that generate_triplets has written.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        written = manifest["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no manifest of triplets ({error!r}); restore it or make the folder again."
        ) from error
    if written != _FORMAT:
        raise ValueError(f"{path} has format {written!r}, expected {_FORMAT}; read it with the release that wrote it.")
    for name, (expected, holds) in _ENTRIES.items():
        if not holds(manifest.get(name)):
            raise ValueError(
                f"{path}: expected {name} to be {expected}, got {manifest.get(name)!r}; restore it or make the folder "
                "again."
            )
    return manifest


def identity(manifest: dict[str, Any]) -> str:
    """Return a SHA-256 of the manifest's settings, which ties shards to their manifest."""
    settings = {key: value for key, value in manifest.items() if key != "made_with"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def num_shards(manifest: dict[str, Any]) -> int:
    return -(-manifest["num_triplets"] // manifest["triplets_per_shard"])


def rows_of(manifest: dict[str, Any], shard: int) -> int:
    return min(manifest["triplets_per_shard"], manifest["num_triplets"] - shard * manifest["triplets_per_shard"])
