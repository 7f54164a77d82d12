"""Prompts from files. Imports no torch."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

_SUFFIXES = (".txt", ".jsonl")


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from a text file, one a line, or from JSON lines, the key `prompt` of each.

    Lines are stripped and blank ones skipped; the empty prompt, which is valid, has to come from JSON lines.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"Prompts are read from {' or '.join(_SUFFIXES)} files, got {path}; rename or convert it.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompt file {path}; give a text file with one prompt a line.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark is no part of the first prompt
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8.") from error
    # Not splitlines(), which also cuts at U+2028 and form feeds, and these occur inside scraped captions.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    prompts = [line for _, line in lines] if path.suffix == ".txt" else list(_prompts_of(path, lines))
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write at least one, one a line.")
    return prompts


def _prompts_of(path: Path, lines: Sequence[tuple[int, str]]) -> Iterator[str]:
    """Yield the prompt of each JSON line, or say which line has none."""
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); expected one object a line.") from error
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str):
            raise ValueError(
                f'{path}, line {number}: expected an object like {{"prompt": "a red apple"}}, got {line}.'
            )
        yield prompt


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the prompts as a list, or say what is wrong with them; "" stands for the unconditional model."""
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of texts, got the text {prompts!r}; pass [{prompts!r}].")
    prompts = list(prompts)
    if not prompts:
        raise ValueError('prompts must hold at least one prompt, got none; pass [""] for unconditional triplets.')
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be texts, got {type(prompt).__name__} {prompt!r} at index {index}.")
    return prompts
