"""The JSON manifest of a folder of triplets: the settings that produced them, which every further run must match."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rectified_diffusers.data.shards import Shard, holds_shards, shard_numbers, shard_path
from rectified_diffusers.digests import digest_of
from rectified_diffusers.files import write_atomically
from rectified_diffusers.options import LARGEST

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
PROMPT = "prompt."  # prefix of the names of stored text embeddings in a shard
FORMAT = 1
FORMATS = (1, 2)  # 2: latents in the layout of the scheduler, `call_options`; of pipelines other than SD and SDXL
ORIGIN = "made_with"  # the entry that does not determine the triplets
STORAGE_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # ours -> safetensors'


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_object(text: Any) -> bool:
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_triplets": (f"a number from 1 to {LARGEST:,}", _is_count),
    "triplets_per_shard": (f"a number from 1 to {LARGEST:,}", _is_count),
    "num_prompts": (f"a number from 1 to {LARGEST:,}", _is_count),
    "storage_dtype": (f"one of {', '.join(STORAGE_DTYPES)}", lambda value: value in tuple(STORAGE_DTYPES)),
    "latent_shape": (
        f"one to four numbers from 1 to {LARGEST:,}",
        lambda value: _is_shape(value) and 1 <= len(value) <= 4,
    ),
    "call_options": ("a JSON object as text, or nothing", lambda value: value is None or _is_object(value)),
    "text_embeddings": (
        "shapes by name, or nothing",
        lambda value: value is None or (isinstance(value, dict) and all(map(_is_shape, value.values()))),
    ),
}
"""Entries that reading relies on: a description and a check. All other entries are only compared."""


@dataclass(frozen=True)
class Manifest:
    """What determines the triplets of a folder, and where they come from.

    Args:
        settings: the entries of `manifest.json`, except the origin: equal settings produce equal triplets.
        origin: teacher and library versions, which may change for the same triplets.
        text_embeddings: shape of a prompt's embeddings by name; empty if they are not stored.
    """

    settings: Mapping[str, Any]
    origin: Any
    num_triplets: int
    triplets_per_shard: int
    num_prompts: int
    storage_dtype: str
    latent_shape: tuple[int, ...]
    text_embeddings: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, settings: Mapping[str, Any], origin: Any = None) -> "Manifest":
        """Return the manifest with these settings. That of joined folders lacks those which concern shards."""
        embeddings = settings.get("text_embeddings") or {}
        return cls(
            settings,
            origin,
            *(settings.get(name, 0) for name in ("num_triplets", "triplets_per_shard", "num_prompts")),
            storage_dtype=settings.get("storage_dtype", ""),
            latent_shape=tuple(settings.get("latent_shape", ())),
            text_embeddings={name: tuple(shape) for name, shape in embeddings.items()},
        )

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder of triplets, and check its entries and that the shards were made with it."""
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise FileNotFoundError(f"There is no {path}; give a folder that generate_triplets has written.")
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            written = settings["format"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no manifest of triplets ({error!r}); restore it or make the folder again."
            ) from error
        if written not in FORMATS:
            raise ValueError(
                f"{path} has format {written!r}, expected {' or '.join(map(str, FORMATS))}; "
                "read it with the release that wrote it."
            )
        for name, (expected, holds) in _ENTRIES.items():
            if not holds(settings.get(name)):
                raise ValueError(
                    f"{path}: expected {name} to be {expected}, got {settings.get(name)!r}; restore it or make the "
                    "folder again."
                )
        manifest = cls.of({name: value for name, value in settings.items() if name != ORIGIN}, settings.get(ORIGIN))
        manifest._require_shards(folder)
        return manifest

    def write(self, folder: Path) -> None:
        text = json.dumps({**self.settings, ORIGIN: self.origin}, indent=2) + "\n"
        write_atomically(folder / MANIFEST_NAME, lambda partial: partial.write_text(text, encoding="utf-8"))

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the settings, which every shard records."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the settings, which the checkpoints of a training run record."""
        return digest_of(self.settings, size=16)

    @property
    def num_shards(self) -> int:
        return -(-self.num_triplets // self.triplets_per_shard)

    def rows(self, shard: int) -> int:
        """Return the number of triplets in a shard; the last one may have fewer."""
        return min(self.triplets_per_shard, self.num_triplets - shard * self.triplets_per_shard)

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each tensor in a shard, by name."""
        embeddings = {f"{PROMPT}{name}": shape for name, shape in self.text_embeddings.items()}
        return {"noise": self.latent_shape, "data": self.latent_shape, **embeddings}

    @property
    def vae_scaling(self) -> dict[str, float]:
        """The recorded ones of scaling_factor and shift_factor of the VAE; a missing shift is 0."""
        names = [name for name in ("scaling_factor", "shift_factor") if f"vae_{name}" in self.settings]
        return {name: self.settings[f"vae_{name}"] or 0.0 for name in names}

    @property
    def call_options(self) -> dict[str, Any]:
        """Arguments of the teacher's call that determine the image size; empty if they were not recorded."""
        return json.loads(self.settings.get("call_options") or "{}")

    @property
    def guidance_scale(self) -> float:
        return self.settings.get("guidance_scale", 1.0)

    @property
    def is_coupled(self) -> bool:
        """Whether each noise leads to its data: real images may have new noise instead."""
        return self.settings.get("num_inference_steps") != 0

    @property
    def parts(self) -> list["Manifest"]:
        """The manifests of the joined folders, or only this one."""
        return [Manifest.of(part) for part in self.settings.get("parts", [self.settings])]

    def _require_shards(self, folder: Path) -> None:
        """Raise ValueError if there are intact shards and none of them records these settings."""
        others = 0
        for number in shard_numbers(folder):
            try:
                recorded = Shard.open(shard_path(folder, number)).header.get("manifest")
            except (ValueError, OSError):  # reported when it is read
                continue
            if recorded == self.identity:
                return
            others += isinstance(recorded, str)
        if others:
            path = folder / MANIFEST_NAME
            raise ValueError(
                f"{path} was changed: none of the {others} readable shards beside it was made with its settings. "
                f"Restore {MANIFEST_NAME} as it was and keep the shards, or make the triplets in another folder."
            )


def settle_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a new folder, or check this run against the existing one. Return the manifest in use."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        manifest.write(folder)
        return manifest
    found = Manifest.read(folder)
    differing = first_difference(found.settings, manifest.settings)
    if differing:
        key, there, here = differing
        anew = "" if holds_shards(folder) else " There are no triplets yet: to start again, remove that file."
        raise ValueError(
            f"The triplets in {folder} were made with other settings: expected {key} = {there!r}, got {here!r}. "
            f"Use the settings in {path} to continue, or choose another output_dir.{anew}"
        )
    # A different release or teacher location gives only a warning. Releases differ in rounding, but each triplet is
    # still a sample of its teacher, and an error would cost a long run its shards after an upgrade. A teacher whose
    # folder was moved is the same teacher.
    differing = first_difference(found.origin, manifest.origin) if isinstance(found.origin, dict) else None
    if differing:
        key, there, here = differing
        logger.warning("The triplets in %s were started with %s = %r, now it is %r.", folder, key, there, here)
    return found


def first_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
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
