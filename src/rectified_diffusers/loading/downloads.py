"""Verify the hashes of downloads from the Hub, and delete damaged or unfinished files."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors
from huggingface_hub.file_download import repo_folder_name

from rectified_diffusers.digests import hash_file

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@contextmanager
def checked_downloads(source: Any, cache_dir: str | Path | None = None) -> Iterator[None]:
    """Verify the hash of every file downloaded from the Hub inside this context; delete damaged files.

    The check also runs if the context ends with an error. The Hub's client compares only lengths; this compares the
    content with the hash that is the file's name in the cache.

    Args:
        source: Hub id; for a path, or for data that is already in memory, nothing is checked.
    """
    repository = source if isinstance(source, str) else ""
    before = blobs_of(repository, cache_dir)
    try:
        yield
    finally:
        verify_downloads(repository, cache_dir, before)


def forget_unfinished(error: Exception, source: str | os.PathLike[str], cache_dir: str | Path | None) -> None:
    """Delete unfinished downloads after one of a wrong length; huggingface_hub before 1.0 would resume them."""
    if "Consistency check failed" in str(error):
        for unfinished in blob_folder(source, cache_dir).glob("*.incomplete"):
            unfinished.unlink()


def blob_folder(source: str | os.PathLike[str], cache_dir: str | Path | None) -> Path:
    """Return the folder of a repository's files in the Hub's cache; for a path, a folder that does not exist."""
    try:
        name = repo_folder_name(repo_id=str(source), repo_type="model")
    except errors.HFValidationError:
        name = "no repository"
    return Path(cache_dir or constants.HF_HUB_CACHE, name, "blobs")


def blobs_of(source: str | os.PathLike[str], cache_dir: str | Path | None) -> dict[Path, int]:
    """Return a repository's files in the Hub's cache, which are named by their hashes, with modification times."""
    folder = blob_folder(source, cache_dir)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file: file.stat().st_mtime_ns for file in files if _HASH.fullmatch(file.name)}


def verify_downloads(source: str | os.PathLike[str], cache_dir: str | Path | None, before: Mapping[Path, int]) -> None:
    """Verify the hashes of new files in the Hub's cache against their names; delete a damaged file and raise.

    Files stored outside git are named by their sha256, files in git by their git hash.
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
            f"{source}: {', '.join(sorted(names)) or 'a file'} was damaged in the download: expected the hash "
            f"{blob.name}, got {got}. It has been deleted from the cache: load again."
        )


def _hash_of(blob: Path) -> str:
    is_git = len(blob.name) == 40
    content = hashlib.sha1(b"blob %d\0" % blob.stat().st_size) if is_git else hashlib.sha256()
    return hash_file(blob, content).hexdigest()
