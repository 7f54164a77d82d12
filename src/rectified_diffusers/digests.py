"""Digests of content: of JSON values and of files."""

import hashlib
import json
from pathlib import Path
from typing import Any


def digest_of(value: Any, size: int = 8) -> str:
    """Return the BLAKE2b digest of any JSON value, in `size` bytes; a digest of another size is no part of it."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=size).hexdigest()


def hash_file(path: Path, digest: Any) -> Any:
    """Return `digest`, an object of hashlib, updated with the content of a file."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest
