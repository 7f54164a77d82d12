"""Compare what is downloaded from the Hub with its hash, and delete what is damaged or unfinished."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors
from huggingface_hub.file_download import repo_folder_name

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CHUNK = 1 << 20


@contextmanager
def checked_downloads(source: Any, cache_dir: str | Path | None = None) -> Iterator[None]:
    """Compare what is fetched from the Hub inside with its hash, however that ends; a damaged file is deleted.

    The Hub's client compares lengths. A file of the right length with wrong bytes is found here, by the hash that the
    cache names it with, once, after its download.

    Args:
        source: Hub id; of a path, or of what has been read already, there is nothing to compare.
    """
    repository = source if isinstance(source, str) else ""
    before = blobs_of(repository, cache_dir)
    try:
        yield
    finally:
        verify_downloads(repository, cache_dir, before)


def forget_unfinished(error: Exception, source: str | os.PathLike[str], cache_dir: str | Path | None) -> None:
    """Delete unfinished downloads after one of a wrong length, from which huggingface_hub before 1.0 would go on."""
    if "Consistency check failed" in str(error):
        for unfinished in blob_folder(source, cache_dir).glob("*.incomplete"):
            unfinished.unlink()


def blob_folder(source: str | os.PathLike[str], cache_dir: str | Path | None) -> Path:
    """Return where the Hub's cache keeps the files of a repository; of a path, a folder that does not exist."""
    try:
        name = repo_folder_name(repo_id=str(source), repo_type="model")
    except errors.HFValidationError:
        name = "no repository"
    return Path(cache_dir or constants.HF_HUB_CACHE, name, "blobs")


def blobs_of(source: str | os.PathLike[str], cache_dir: str | Path | None) -> dict[Path, int]:
    """List the files of a repository in the Hub's cache, which are named by their hashes, with their times."""
    folder = blob_folder(source, cache_dir)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file: file.stat().st_mtime_ns for file in files if _HASH.fullmatch(file.name)}


def verify_downloads(source: str | os.PathLike[str], cache_dir: str | Path | None, before: Mapping[Path, int]) -> None:
    """Compare the files that came into the Hub's cache with their names; a damaged one is deleted.

    What is kept outside git is named by its sha256, and what is in git by git's hash of it.
    """
    for blob, modified in blobs_of(source, cache_dir).items():
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


def _hash_of(blob: Path) -> str:
    is_git = len(blob.name) == 40
    content = hashlib.sha1(b"blob %d\0" % blob.stat().st_size) if is_git else hashlib.sha256()
    with blob.open("rb") as file:
        while chunk := file.read(_CHUNK):
            content.update(chunk)
    return content.hexdigest()
