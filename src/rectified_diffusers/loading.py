"""Loading what strangers wrote: no pickles, downloads compared with their names, and what to do where it fails.

Messages are added where those of diffusers, safetensors and the Hub's client do not name the file or the remedy.
"""

import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from huggingface_hub import constants, errors, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open

from rectified_diffusers.complete import complete_components

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_CONVERT = (
    "Pickles can run code when they are opened. Convert it once, if you trust it, with diffusers' own loader: "
    "diffusers.DiffusionPipeline.from_pretrained({source!r}).save_pretrained(new_folder)"
)
# The exceptions of the library with which huggingface_hub speaks HTTP: requests, httpx or a successor, by its age.
_NETWORK: Any = tuple(
    base for base in HfHubHTTPError.__mro__ if base.__module__.split(".")[0] not in ("builtins", "huggingface_hub")
)
# What diffusers and transformers raise at a config whose values are of wrong types.
_WRONG_TYPES: Any = (TypeError, AttributeError, KeyError, IndexError, RecursionError)
if hasattr(errors, "StrictDataclassError"):  # of huggingface_hub, since 0.31
    _WRONG_TYPES = (*_WRONG_TYPES, errors.StrictDataclassError)
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CHUNK = 1 << 20


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name the dtype as `from_pretrained` of this diffusers release wants it: 0.40 renamed `torch_dtype`."""
    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if release >= (0, 40) else "torch_dtype": dtype}


def safetensors_only(options: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options of a loader of diffusers with which it opens no pickle, or refuse those that ask for one."""
    if options.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False asks for pickles, which can run code when they are opened; leave it out. "
            "Load them with diffusers' own class, if you trust them, and save_pretrained(new_folder)."
        )
    return {**options, "use_safetensors": True}


def refuse_pickle(source: Any, conversion: str) -> None:
    """Refuse the name of a file that is not safetensors; what is no text or path, such as tensors, has been read.

    Args:
        conversion: what makes a safetensors file of it.
    """
    if isinstance(source, (str, os.PathLike)) and not os.fspath(source).endswith(".safetensors"):
        raise ValueError(
            f"{Path(source).name} is no .safetensors file, and others can run code when they are opened. Convert it "
            f"once, if you trust it: {conversion}."
        )


def refuse_folder_of_pickles(folder: Path, conversion: str) -> None:
    """Refuse a local folder that has weights as pickles and none in safetensors."""
    if folder.is_dir() and (pickle := _only_pickles(folder)):
        refuse_pickle(pickle, conversion)


def refuse_foreign_code(source: str | os.PathLike[str], replaced: Sequence[str] = ()) -> None:
    """Refuse a local folder whose model index names classes of libraries that diffusers would import for it.

    diffusers before 0.40 imports whatever an index names. Allowed are the libraries that it knows, the modules of its
    pipelines, and what the caller has imported. For a repository on the Hub, diffusers' own gate does the same.

    Args:
        replaced: classes that are never loaded from where the index says, since others take their place.

    Raises:
        ValueError: a part is of another library.
    """
    index = Path(source, "model_index.json")
    if not index.is_file() or not _is_json_object(index):  # the latter is explained where loading fails
        return
    for name, entry in json.loads(index.read_text(encoding="utf-8")).items():
        if name.startswith("_") or not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
            continue
        library = entry[0]
        known = library in LOADABLE_CLASSES or hasattr(diffusers.pipelines, library) or library in sys.modules
        if known or entry[-1] in replaced:
            continue
        raise ValueError(
            f"{index}: {name} is of {library!r}, which is neither diffusers nor transformers nor imported here, so "
            "loading it would run code. If you trust it, import it first, or pass trust_remote_code=True."
        )


@contextmanager
def checked_downloads(source: Any, cache_dir: str | Path | None = None) -> Iterator[None]:
    """Compare what is fetched from the Hub inside with its hash, however that ends; a damaged file is deleted.

    The Hub's client compares lengths. A file of the right length with wrong bytes is found here, by the hash that the
    cache names it with, once, after its download.

    Args:
        source: Hub id; of a path, or of what has been read already, there is nothing to compare.
    """
    repository = source if isinstance(source, str) else ""
    before = _blobs(repository, cache_dir)
    try:
        yield
    finally:
        _verify_downloads(repository, cache_dir, before)


@contextmanager
def remedies(
    source: str | os.PathLike[str],
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> Iterator[None]:
    """Check what `from_pretrained(source, ...)`, run inside, downloads and loads, and say what to do where it fails.

    Raises:
        ValueError: weights of a model are missing or unexpected, no weights are stored under the variant, a config has
            values of wrong types, or an index of shards leaves the folder.
        OSError: a safetensors file is cut off or has no valid header, or a download has the wrong hash; the weights
            are pickles; the Hub cannot be reached.
    """
    before = _blobs(source, cache_dir)
    try:
        with complete_components():
            yield
        folder = _folder_of(source, cache_dir, revision)
        _verify_downloads(source, cache_dir, before)
        _check_indexes(folder)
    except (LocalEntryNotFoundError, *_NETWORK) as error:
        is_missing = isinstance(error, LocalEntryNotFoundError)  # offline by choice, or since the Hub did not answer
        causes = [cause for cause in _chain(error) if isinstance(cause, _NETWORK) and cause is not error]
        if not causes if is_missing else isinstance(error, OSError) and str(source) in str(error):
            raise  # the Hub's own answers say what to do
        cause = causes[0] if is_missing else error
        raise ConnectionError(
            f"{source} could not be fetched: {type(cause).__name__}: {' '.join(str(cause).split())}. Nothing "
            "half-fetched is used: load it again when the Hub answers (https://status.huggingface.co), or with "
            "local_files_only=True if it is cached."
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        if variant is not None and f"variant={variant}" in str(error):
            raise ValueError(
                f"You are trying to load the model files of the `variant={variant}`, but {source} has none; the "
                "published InstaFlow checkpoints have no variant at all. Leave variant out; for half precision, call "
                ".to(torch.float16) on the pipeline."
            ) from error
        folder = _folder_of(source, cache_dir, revision)
        _verify_downloads(source, cache_dir, before)
        _forget_unfinished(error, source, cache_dir)
        _explain_files(error, source, folder)
        _explain_absence(error, source)
        raise
    except (*_WRONG_TYPES, RuntimeError) as error:
        folder = _folder_of(source, cache_dir, revision)
        _verify_downloads(source, cache_dir, before)
        if not isinstance(error, _WRONG_TYPES) and not re.search("mismatch|dimension|shape", str(error)):
            raise
        _explain_redirects(error, source)
        _explain_files(error, source, folder)
        raise ValueError(
            f"{source} cannot be loaded: a value in model_index.json or in the config of a part is missing or of "
            f"another type or size than expected ({type(error).__name__}: {' '.join(str(error).split())}). Download "
            "or save it again."
        ) from error


def _explain_absence(error: Exception, source: str | os.PathLike[str]) -> None:
    """Raise what is to be done if no Hub answered, where diffusers speaks of a stack trace and of an argument."""
    for cause in _chain(error):
        if isinstance(cause, (*_NETWORK, OfflineModeIsEnabled)) and not isinstance(cause, HfHubHTTPError):
            raise ConnectionError(
                f"{source} is not whole in the Hub's cache of this machine, and the Hub cannot be reached ({cause}). "
                f"Give a folder instead, fetched where there is a network: hf download {source} --local-dir FOLDER."
            ) from error


def _explain_files(error: Exception, source: str | os.PathLike[str], folder: Path) -> None:
    """Raise what is to be done if damaged files or pickles are the cause of an error."""
    for file in (folder / "model_index.json", *sorted(folder.glob("*/*config.json"))):
        if file.is_file() and not _is_json_object(file):
            raise ValueError(f"{file} is no JSON object, as every config is. Download or save it again.") from error
    if any(isinstance(cause, SafetensorError) for cause in _chain(error)):
        for file, damage in _damaged_files(folder):
            # In the Hub's cache a snapshot holds links: as long as the file itself is there, it is used again.
            raise OSError(
                f"{file} cannot be read: {damage}. The file was damaged or not written whole. Delete "
                f"{os.path.realpath(file)} and load again (from the Hub, the file is fetched anew; "
                "force_download=True does not replace it), or copy the folder again from where it is whole."
            ) from error
    if "safetensors" not in str(error):
        return
    listed = "necessary `safetensors` weights" in str(error)  # of a repository on the Hub, of which nothing is here
    pickles = re.findall(r"[\w./-]+\.(?:bin|ckpt|pth?|pkl)\b", str(error)) if listed else []
    pickles += [str(pickle) for part in (folder, *folder.glob("*")) if (pickle := _only_pickles(part))]
    if pickles:
        raise OSError(
            f"{source} has weights as pickles ({sorted(pickles)[0]}), expected .safetensors. "
            f"{_CONVERT.format(source=str(source))}."
        ) from error


def _is_json_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _only_pickles(folder: Path) -> Path | None:
    """Give a pickle of a folder that has weights in no other format."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if any(file.suffix == ".safetensors" for file in files):
        return None
    return next((file for file in files if file.suffix in _PICKLES), None)


def _explain_redirects(error: BaseException, source: str | os.PathLike[str]) -> None:
    """Raise what is to be done where huggingface_hub before 1.0 followed redirects until Python stopped it."""
    frames = traceback.extract_tb(error.__traceback__) if isinstance(error, RecursionError) else []
    if any(frame.name == "_request_wrapper" for frame in frames):
        raise ConnectionError(
            f"{source} could not be fetched: the Hub redirects in a loop. Load it again when the Hub answers."
        ) from None


def _forget_unfinished(error: Exception, source: str | os.PathLike[str], cache_dir: str | Path | None) -> None:
    """Delete unfinished downloads after one of a wrong length, from which huggingface_hub before 1.0 would go on."""
    if "Consistency check failed" in str(error):
        for unfinished in _blob_folder(source, cache_dir).glob("*.incomplete"):
            unfinished.unlink()


def _blob_folder(source: str | os.PathLike[str], cache_dir: str | Path | None) -> Path:
    """Return where the Hub's cache keeps the files of a repository; of a path, a folder that does not exist."""
    try:
        name = repo_folder_name(repo_id=str(source), repo_type="model")
    except errors.HFValidationError:
        name = "no repository"
    return Path(cache_dir or constants.HF_HUB_CACHE, name, "blobs")


def _blobs(source: str | os.PathLike[str], cache_dir: str | Path | None) -> dict[Path, int]:
    """List the files of a repository in the Hub's cache, which are named by their hashes, with their times."""
    folder = _blob_folder(source, cache_dir)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file: file.stat().st_mtime_ns for file in files if _HASH.fullmatch(file.name)}


def _verify_downloads(
    source: str | os.PathLike[str], cache_dir: str | Path | None, before: Mapping[Path, int]
) -> None:
    """Compare the files that came into the Hub's cache with their names; a damaged one is deleted.

    What is kept outside git is named by its sha256, and what is in git by git's hash of it.
    """
    for blob, modified in _blobs(source, cache_dir).items():
        if before.get(blob) == modified or (got := _hash_of(blob)) == blob.name:
            continue
        snapshots = blob.parent.parent / "snapshots"
        links = [link for link in snapshots.rglob("*") if os.path.realpath(link) == os.path.realpath(blob)]
        names = {Path(*link.relative_to(snapshots).parts[1:]).as_posix() for link in links}
        for file in (*links, blob):
            file.unlink()
        raise OSError(
            f"{source}: {', '.join(sorted(names)) or 'a file'} was damaged on its way from the Hub: expected the hash "
            f"{blob.name}, got {got}. It has been deleted from the cache; load again, and it is fetched anew."
        )


def _check_indexes(folder: Path) -> None:
    """Refuse an index of shards by which diffusers went out of the folder: it joins whatever name it finds there."""
    for index in sorted(folder.glob("*/*.index*.json")):
        for shard in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
            if Path(shard).name != shard:
                raise ValueError(
                    f"{index} lists the shard {shard!r}, expected the name of a file beside it. It is not of a "
                    "save by diffusers: download the model from where it was made."
                )


def _hash_of(blob: Path) -> str:
    is_git = len(blob.name) == 40
    content = hashlib.sha1(b"blob %d\0" % blob.stat().st_size) if is_git else hashlib.sha256()
    with blob.open("rb") as file:
        while chunk := file.read(_CHUNK):
            content.update(chunk)
    return content.hexdigest()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Give an error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _folder_of(source: str | os.PathLike[str], cache_dir: str | Path | None, revision: str | None) -> Path:
    """Find where a checkpoint lies: the folder itself, or its snapshot in the Hub's cache."""
    if os.path.isdir(source):
        return Path(source)
    try:
        index = try_to_load_from_cache(str(source), "model_index.json", cache_dir=cache_dir, revision=revision)
    except errors.HFValidationError:  # a path that is not there
        index = None
    return Path(index).parent if isinstance(index, str) else Path(str(source))


def _damaged_files(folder: Path) -> Iterator[tuple[Path, SafetensorError]]:
    """Find the safetensors files whose header cannot be read or does not fit their length."""
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            yield file, error
