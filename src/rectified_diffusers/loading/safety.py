"""Refuse pickles, and code that a model's folder names, before a library opens or imports them."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

_LARGEST = {"layers": 1000, "sample_size": 1 << 14}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def safetensors_only(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return loader options with which diffusers opens no pickle; refuse options that request one."""
    if options.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False requests pickles, which can run code when they are opened. Omit it, or, if you "
            "trust them, convert them with diffusers' own class and save_pretrained(new_folder)."
        )
    return {**options, "use_safetensors": True}


def refuse_pickle(source: Any, conversion: str) -> None:
    """Refuse a file name that is not safetensors. Anything but a text or path, such as tensors, is already in memory.

    Args:
        conversion: how to convert the file to safetensors.
    """
    if isinstance(source, (str, os.PathLike)) and not os.fspath(source).endswith(".safetensors"):
        raise ValueError(
            f"{Path(source).name} is not a .safetensors file, and others can run code when they are opened. Convert "
            f"it once, if you trust it: {conversion}."
        )


def refuse_folder_of_pickles(folder: Path, conversion: str) -> None:
    """Refuse a local folder whose only weights are pickles."""
    if folder.is_dir() and (pickle := only_pickles(folder)):
        refuse_pickle(pickle, conversion)


def refuse_foreign_code(source: str | os.PathLike[str], replaced: Sequence[str] = ()) -> None:
    """Refuse a local folder whose model index names a library that diffusers would import, or with absurd sizes.

    diffusers before 0.40 imports whatever an index names. Allowed are the libraries known to diffusers, the modules of
    its pipelines, and what the caller has imported. For a repository on the Hub, diffusers' own check does the same.

    Args:
        replaced: classes that are not loaded from the named library, because others replace them.
    """
    refuse_absurd_sizes(source)
    index = Path(source, "model_index.json")
    for name, (library, *_, kind) in _components_of(index).items():
        known = library in LOADABLE_CLASSES or hasattr(diffusers.pipelines, library) or library in sys.modules
        if not known and kind not in replaced:
            raise ValueError(
                f"{index}: {name} is from {library!r}, expected diffusers, transformers or an imported library, "
                "because loading it runs code. If you trust it, import it first, or pass trust_remote_code=True."
            )


def _components_of(index: Path) -> dict[str, list[Any]]:
    """Return library and class of each component in an index; a damaged index is explained where loading fails."""
    entries = json.loads(index.read_text(encoding="utf-8")) if index.is_file() and is_json_object(index) else {}
    named = {name: entry for name, entry in entries.items() if isinstance(entry, list) and name[:1] != "_"}
    return {name: [entry[0], *entry] for name, entry in named.items() if entry and isinstance(entry[0], str)}


def refuse_absurd_sizes(source: str | os.PathLike[str]) -> None:
    """Refuse a local folder with a config whose numbers would keep a library busy without end, such as 10^6 layers."""
    for file in sorted(Path(source).glob("*/config.json")):
        config = json.loads(file.read_text(encoding="utf-8")) if is_json_object(file) else {}
        for name, value in config.items():
            limit = next((limit for part, limit in _LARGEST.items() if part in name), 10**8)
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(number, int) and number > limit for number in numbers):
                raise ValueError(
                    f"{file}: expected {name} of at most {limit:,}, got {value}. Download or save the model again."
                )


def require_components(source: str | os.PathLike[str]) -> None:
    """Raise a ValueError if a local folder lacks a part that its index names."""
    for name in _components_of(Path(source, "model_index.json")):
        folder = Path(source, name)
        if not folder.is_dir():
            raise ValueError(f"{source} lacks the folder {name}, which its model_index.json names. Copy it again.")
        # transformers 5 would load a tokenizer with no words.
        vocabularies = (file for pattern in ("tokenizer.json", "vocab.*", "*.model") for file in folder.glob(pattern))
        if name.startswith("tokenizer") and not any(vocabularies):
            raise ValueError(f"{folder} contains no vocabulary of a tokenizer. Copy it again.")


def is_json_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def only_pickles(folder: Path) -> Path | None:
    """Return a pickle of a folder that has weights in no other format, or None."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if any(file.suffix == ".safetensors" for file in files):
        return None
    return next((file for file in files if file.suffix in _PICKLES), None)
