"""Read the lines of text and JSON Lines files; every error names the file and the line, and says what to do."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 1 << 20


def read_lines(path: Path, offset: int = 0, number: int = 1) -> Iterator[tuple[int, int, str]]:
    """Yield byte offset, line number and stripped text of each line that is not blank.

    Args:
        offset: byte at which a line starts.
        number: of that line.

    Raises:
        ValueError: a line is not UTF-8, has NUL characters, which UTF-16 has, or more than `MAX_LINE_BYTES` bytes.
    """
    with path.open("rb") as file:
        file.seek(offset)
        # Not splitlines(): it also splits at U+2028 and form feeds, which occur inside scraped captions.
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{path}, line {number}: expected at most {MAX_LINE_BYTES} bytes. Shorten the line.")
            try:  # a byte-order mark is not part of the first line
                text = line.decode("utf-8-sig" if offset == 0 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error}). Save the file as UTF-8.") from error
            if "\0" in text:
                raise ValueError(f"{path}, line {number}: expected text, got NUL characters. Save the file as UTF-8.")
            if text:
                yield offset, number, text
            offset, number = offset + len(line), number + 1


def read_object(path: Path, number: int, line: str, *keys: str) -> dict[str, Any]:
    """Return the JSON object of a line, which has a text under each of `keys`; raise a ValueError otherwise."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}). Write one object per line.") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
        example = json.dumps(dict.fromkeys(keys, "..."))
        raise ValueError(f"{path}, line {number}: expected an object like {example}, got {line[:200]}.")
    return row
