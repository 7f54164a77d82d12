"""What to do about a checkpoint that does not load, where diffusers' and safetensors' own messages do not say it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name the dtype as `from_pretrained` of this diffusers release wants it: 0.40 renamed `torch_dtype`."""
    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if release >= (0, 40) else "torch_dtype": dtype}


@contextmanager
def remedies(
    source: str | os.PathLike[str],
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> Iterator[None]:
    """Say what to do where `from_pretrained(source, ...)`, run inside, fails by a missing variant or a damaged file.

    Raises:
        ValueError: no weights are stored under the variant.
        OSError: a safetensors file is cut off or has no valid header. Nobody checks the numbers behind the header: a
            file of the right length with wrong numbers loads.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if variant is not None and f"variant={variant}" in str(error):
            raise ValueError(
                f"You are trying to load the model files of the `variant={variant}`, but {source} has none; the "
                "published InstaFlow checkpoints have no variant at all. Leave variant out; for half precision, call "
                ".to(torch.float16) on the pipeline."
            ) from error
        if any(isinstance(cause, SafetensorError) for cause in _chain(error)):
            for file, damage in _damaged_files(_folder_of(source, cache_dir, revision)):
                # In the Hub's cache a snapshot holds links: as long as the file itself is there, it is used again.
                raise OSError(
                    f"{file} cannot be read: {damage}. The file was damaged or not written whole. Delete "
                    f"{os.path.realpath(file)} and load again (from the Hub, the file is fetched anew; "
                    "force_download=True does not replace it), or copy the folder again from where it is whole."
                ) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Give an error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _folder_of(source: str | os.PathLike[str], cache_dir: str | Path | None, revision: str | None) -> Path:
    """Find where a checkpoint lies: the folder itself, or its snapshot in the Hub's cache."""
    if os.path.isdir(source):
        return Path(source)
    index = try_to_load_from_cache(str(source), "model_index.json", cache_dir=cache_dir, revision=revision)
    return Path(index).parent if isinstance(index, str) else Path(source)


def _damaged_files(folder: Path) -> Iterator[tuple[Path, SafetensorError]]:
    """Find the safetensors files whose header cannot be read or does not fit their length."""
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            yield file, error
