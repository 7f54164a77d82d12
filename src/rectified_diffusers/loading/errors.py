"""Explain why loading a model failed: errors that name the file, the cause and the remedy."""

import json
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import errors, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from rectified_diffusers.loading.complete import complete_components
from rectified_diffusers.loading.downloads import blobs_of, forget_unfinished, verify_downloads
from rectified_diffusers.loading.safety import is_json_object, only_pickles

_CONVERT = (
    "Pickles can run code when they are opened. Convert it once, if you trust it, with diffusers' own loader: "
    "diffusers.DiffusionPipeline.from_pretrained({source!r}).save_pretrained(new_folder)"
)
# Exceptions of the HTTP library of huggingface_hub: requests, httpx or a successor, depending on its release.
_NETWORK: Any = tuple(
    base for base in HfHubHTTPError.__mro__ if base.__module__.split(".")[0] not in ("builtins", "huggingface_hub")
)
# What diffusers and transformers raise for a config whose values have wrong types.
_WRONG_TYPES = (
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    RecursionError,
    OverflowError,
    MemoryError,
    errors.StrictDataclassError,
)


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype as the `from_pretrained` option of this diffusers release: 0.40 renamed `torch_dtype`."""
    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if release >= (0, 40) else "torch_dtype": dtype}


@contextmanager
def remedies(
    source: str | os.PathLike[str],
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> Iterator[None]:
    """Check what `from_pretrained(source, ...)` downloads and loads in this context; explain the remedy on failure.

    Raises:
        ValueError: weights of a model are missing or unexpected, no weights are stored under the variant, a config has
            values of wrong types, or an index of shards points outside the folder.
        OSError: a safetensors file is truncated or has no valid header, or a download has the wrong hash; the weights
            are pickles; the Hub cannot be reached.
    """
    before = blobs_of(source, cache_dir)
    try:
        with complete_components():
            yield
        verify_downloads(source, cache_dir, before)
        _check_indexes(_folder_of(source, cache_dir, revision))
    except (LocalEntryNotFoundError, *_NETWORK) as error:
        is_missing = isinstance(error, LocalEntryNotFoundError)  # offline by choice, or as the Hub did not answer
        causes = [cause for cause in _chain(error) if isinstance(cause, _NETWORK) and cause is not error]
        if not causes if is_missing else isinstance(error, OSError) and str(source) in str(error):
            raise  # the Hub's own error messages explain the remedy
        cause = causes[0] if is_missing else error
        raise ConnectionError(
            f"{source} could not be fetched: {type(cause).__name__}: {' '.join(str(cause).split())}. Load it again "
            "later (https://status.huggingface.co), or with local_files_only=True if it is cached."
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        if variant is not None and f"variant={variant}" in str(error):
            raise ValueError(
                f"You are trying to load the model files of the `variant={variant}`, but {source} has none. Leave "
                "variant out; for half precision, call .to(torch.float16) on the pipeline."
            ) from error
        verify_downloads(source, cache_dir, before)
        forget_unfinished(error, source, cache_dir)
        _explain_files(error, source, _folder_of(source, cache_dir, revision))
        _explain_absence(error, source)
        raise
    except (*_WRONG_TYPES, RuntimeError) as error:
        verify_downloads(source, cache_dir, before)
        if not isinstance(error, _WRONG_TYPES) and not re.search(
            "mismatch|dimension|shape|allocate|overflow|larger than|out of range", str(error)
        ):
            raise
        _explain_redirects(error, source)
        _explain_files(error, source, _folder_of(source, cache_dir, revision))
        raise ValueError(
            f"{source} cannot be loaded: a value in model_index.json or in the config of a component is missing or "
            f"of another type or size than expected ({type(error).__name__}: {' '.join(str(error).split())})."
        ) from error


def _explain_absence(error: Exception, source: str | os.PathLike[str]) -> None:
    """Raise an error with the remedy if the Hub could not be reached; diffusers' own refers to a stack trace."""
    for cause in _chain(error):
        if isinstance(cause, (*_NETWORK, OfflineModeIsEnabled)) and not isinstance(cause, HfHubHTTPError):
            raise ConnectionError(
                f"{source} is not completely in the local cache of the Hub, and the Hub cannot be reached ({cause}). "
                f"Download it to a folder on a machine with a network: hf download {source} --local-dir FOLDER."
            ) from error


def _explain_files(error: Exception, source: str | os.PathLike[str], folder: Path) -> None:
    """Raise an error with the remedy if damaged files or pickles caused the error."""
    for file in (folder / "model_index.json", *sorted(folder.glob("*/*config.json"))):
        if file.is_file() and not is_json_object(file):
            raise ValueError(f"{file} must be a JSON object. Download or save it again.") from error
    if any(isinstance(cause, SafetensorError) for cause in _chain(error)):
        for file, damage in damaged_files(folder):
            # In the Hub's cache a snapshot contains links: as long as the file itself exists, it is used again.
            raise OSError(
                f"{file} cannot be read: {damage}. The file is damaged or incomplete. Delete "
                f"{os.path.realpath(file)} and load again, or copy the complete folder again."
            ) from error
    if "safetensors" not in str(error):
        return
    listed = "necessary `safetensors` weights" in str(error)  # of a repository on the Hub with no local files
    pickles = re.findall(r"[\w./-]+\.(?:bin|ckpt|pth?|pkl)\b", str(error)) if listed else []
    pickles += [str(pickle) for part in (folder, *folder.glob("*")) if (pickle := only_pickles(part))]
    if pickles:
        raise OSError(
            f"{source} has weights as pickles ({sorted(pickles)[0]}), expected .safetensors. "
            f"{_CONVERT.format(source=str(source))}."
        ) from error


def _explain_redirects(error: BaseException, source: str | os.PathLike[str]) -> None:
    """Raise an error with the remedy if huggingface_hub before 1.0 followed redirects until Python stopped it."""
    frames = traceback.extract_tb(error.__traceback__) if isinstance(error, RecursionError) else []
    if any(frame.name == "_request_wrapper" for frame in frames):
        raise ConnectionError(f"{source} could not be fetched: the Hub redirects in a loop. Try later.") from None


def _check_indexes(folder: Path) -> None:
    """Refuse an index of shards that points outside the folder: diffusers joins any name in it to the path."""
    for index in sorted(folder.glob("*/*.index*.json")):
        for shard in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
            if Path(shard).name != shard:
                raise ValueError(
                    f"{index} lists the shard {shard!r}, expected a file name without a folder. Download the model "
                    "from its original source."
                )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _folder_of(source: str | os.PathLike[str], cache_dir: str | Path | None, revision: str | None) -> Path:
    """Return the folder of a checkpoint: the source itself, or its snapshot in the Hub's cache."""
    if os.path.isdir(source):
        return Path(source)
    try:
        index = try_to_load_from_cache(str(source), "model_index.json", cache_dir=cache_dir, revision=revision)
    except errors.HFValidationError:  # a path that does not exist
        index = None
    return Path(index).parent if isinstance(index, str) else Path(str(source))


def damaged_files(folder: Path) -> Iterator[tuple[Path, SafetensorError]]:
    """Yield the safetensors files whose header cannot be read or does not match their length, each with its error."""
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            yield file, error
