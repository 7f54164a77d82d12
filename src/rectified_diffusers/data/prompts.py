"""Read prompts from files and data sets without loading them into memory. Does not import torch."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from rectified_diffusers.checks import require_unicode
from rectified_diffusers.lines import read_lines, read_object

_LINES = (".txt", ".jsonl")
_BLOCK = 1024  # prompts in memory at a time


def open_prompts(source: str | Path, column: str = "prompt", split: str = "train") -> "StoredPrompts":
    """Open prompts that are read on demand, so that ten million need no more memory than ten.

    Opening reads all prompts once, to find errors and to compute the checksum that identifies them.

    Args:
        source: a text file with one prompt per line; JSON lines; a parquet file or a folder of them; a folder written
            by `datasets.Dataset.save_to_disk`; or the name of a data set on the Hub, `owner/name`. Lines of text
            files are stripped and blank lines skipped. All other prompts are used unchanged, including empty ones.
        column: key of JSON lines, or column of a table, that contains the prompt.
        split: split to use if the data set has several.
    """
    path = Path(source)
    if path.suffix in _LINES:
        return LinePrompts(path, column)
    if path.suffix == ".parquet":
        return ParquetPrompts([_existing(path)], column)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return DatasetPrompts(_load_from_disk(path, split), column, str(path))
        files = sorted(path.rglob("*.parquet"))
        if files:
            return ParquetPrompts(files, column)
        raise ValueError(f"The folder {path} holds no *.parquet file and nothing that datasets saved; give another.")
    # owner/name, unless a local folder `owner` exists: then the source means a file in that folder.
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and not path.parent.is_dir():
        return DatasetPrompts(_import_datasets().load_dataset(str(source), split=split), column, str(source))
    raise ValueError(
        "Prompts are read from .txt, .jsonl and .parquet files, folders that datasets saved and data sets on the Hub "
        f"(owner/name), got {source}; rename or convert it."
    )


def read_prompts(path: str | Path) -> list[str]:
    """Read all prompts into a list, from any source that `open_prompts` accepts."""
    return list(open_prompts(path))


class StoredPrompts(Sequence[str], ABC):
    """Prompts that stay in their files. One block of them is in memory at a time.

    A subclass implements `_read`. Its constructor calls `_settle` with all prompts once `_read` can be called.
    """

    sha256: str
    _count: int

    def _settle(self, source: str, prompts: Iterable[str]) -> None:
        """Compute the number and checksum of the prompts. `source` names them in the error if there are none."""
        self._count, self._number, self._block = 0, -1, []
        digest = hashlib.sha256()
        for prompt in prompts:
            digest.update(_line(prompt))
            self._count += 1
        self.sha256 = digest.hexdigest()
        if not self._count:
            raise ValueError(f"{source} holds no prompt; write at least one, one a line.")

    @abstractmethod
    def _read(self, first: int, count: int) -> list[str]:
        """Return `count` prompts starting at index `first`, a multiple of the block size."""

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"Prompts are numbered from 0 to {self._count - 1}, got {index}.")
        number, place = divmod(index % self._count, _BLOCK)
        if number != self._number:
            first = number * _BLOCK
            self._block, self._number = self._read(first, min(_BLOCK, self._count - first)), number
        return self._block[place]


class LinePrompts(StoredPrompts):
    """Prompts of a text or JSON Lines file. Keeps the file position of every 1024th prompt."""

    def __init__(self, path: Path, key: str = "prompt") -> None:
        self.path, self.key = _existing(path), key
        self._state = _state_of(path)
        self._offsets, self._numbers = array("Q"), array("Q")  # byte and line of the first prompt of each block
        self._settle(str(path), self._scan())

    def _scan(self) -> Iterator[str]:
        for index, (offset, number, prompt) in enumerate(self._prompts(0, 1)):
            if index % _BLOCK == 0:
                self._offsets.append(offset)
                self._numbers.append(number)
            yield prompt

    def _read(self, first: int, count: int) -> list[str]:
        if _state_of(self.path) != self._state:
            raise ValueError(f"{self.path} was changed after it was opened; run the same again to read it.")
        block = first // _BLOCK
        found = self._prompts(self._offsets[block], self._numbers[block])
        return [prompt for (_, _, prompt), _ in zip(found, range(count), strict=False)]

    def _prompts(self, offset: int, number: int) -> Iterator[tuple[int, int, str]]:
        """Yield offset, line number and text of each prompt, starting with the line at `offset`."""
        for start, line, text in read_lines(self.path, offset, number):
            prompt = text if self.path.suffix == ".txt" else read_object(self.path, line, text, self.key)[self.key]
            require_unicode(f"{self.path}, line {line}", prompt)
            yield start, line, prompt


class ParquetPrompts(StoredPrompts):
    """Prompts of a column of parquet files. One row group of that column is in memory at a time."""

    def __init__(self, paths: Sequence[Path], column: str = "prompt") -> None:
        try:
            from pyarrow import ArrowInvalid
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ImportError(
                f'Parquet files need the package pyarrow: pip install "rectified_diffusers[datasets]" ({error}).'
            ) from error
        self.column = column
        self._groups: list[tuple[Path, int]] = []
        rows = [0]
        for path in paths:
            try:
                with ParquetFile(path) as file:
                    names = file.schema_arrow.names
                    sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            except ArrowInvalid as error:
                raise ValueError(f"{path} is not a complete parquet file ({error}). Write it again.") from error
            _require_column(str(path), column, names)
            self._groups += [(path, number) for number in range(len(sizes))]
            rows += sizes
        self._starts = list(accumulate(rows))
        self._open_group: tuple[int, Any] = (-1, None)
        everything = (prompt for group in range(len(self._groups)) for prompt in self._rows(group, 0, None))
        self._settle(" ".join(map(str, paths[:1])), everything)

    def _read(self, first: int, count: int) -> list[str]:
        prompts: list[str] = []
        while len(prompts) < count:
            place = first + len(prompts)
            group = bisect_right(self._starts, place) - 1
            prompts += self._rows(group, place - self._starts[group], count - len(prompts))
        return prompts

    def _rows(self, group: int, start: int, count: int | None) -> Iterator[str]:
        """Yield prompts of one row group. Its column stays in memory as bytes until another row group is read."""
        from pyarrow.parquet import ParquetFile

        path, number = self._groups[group]
        if self._open_group[0] != group:
            with ParquetFile(path) as file:
                self._open_group = group, file.read_row_group(number, [self.column]).column(0)
        for row, value in enumerate(self._open_group[1].slice(start, count), start=start):
            yield _require_text(value.as_py(), f"{path}, row {row} of row group {number}")


class DatasetPrompts(StoredPrompts):
    """Prompts of a column of a data set from the `datasets` library, which memory-maps its files."""

    def __init__(self, dataset: Any, column: str = "prompt", source: str = "The data set") -> None:
        _require_column(source, column, dataset.column_names)
        self.dataset, self.column, self.source = dataset.select_columns([column]), column, source
        self._settle(source, (prompt for first in range(0, len(dataset), _BLOCK) for prompt in self._read(first)))

    def _read(self, first: int, count: int = _BLOCK) -> list[str]:
        rows = self.dataset[first : first + count][self.column]
        return [_require_text(value, f"{self.source}, row {row}") for row, value in enumerate(rows, start=first)]


def check_prompts(prompts: Iterable[str]) -> Sequence[str]:
    """Return valid prompts, as a list unless they are `StoredPrompts`; "" selects the unconditional model.

    Raises:
        TypeError: `prompts` is a string, or not an iterable of strings.
        ValueError: there are no prompts.
    """
    if isinstance(prompts, StoredPrompts):
        return prompts
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of texts, got the text {prompts!r}; pass [{prompts!r}].")
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a list of texts, got {prompts!r}; read a file with read_prompts.")
    prompts = list(prompts)
    if not prompts:
        raise ValueError('prompts must hold at least one prompt, got none; pass [""] for unconditional triplets.')
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be texts, got {type(prompt).__name__} {prompt!r} at index {index}.")
        require_unicode(f"prompts, index {index}", prompt)
    return prompts


def prompts_sha256(prompts: Sequence[str]) -> str:
    """Return the SHA-256 that identifies the prompts, independent of how they are stored."""
    if isinstance(prompts, StoredPrompts):
        return prompts.sha256
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(_line(prompt))
    return digest.hexdigest()


def _line(prompt: str) -> bytes:
    return json.dumps(prompt).encode() + b"\n"


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompt file {path}; give a text file with one prompt a line.")
    return path


def _state_of(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _require_column(source: str, column: str, names: Sequence[str]) -> None:
    if column not in names:
        raise ValueError(f"{source} has no column {column!r}; name the one with the prompts: {', '.join(names)}.")


def _require_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: expected a text, got {value!r}; leave such rows out.")
    require_unicode(place, value)
    return value


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'Data sets need the package datasets: pip install "rectified_diffusers[datasets]" ({error}).'
        ) from error
    return datasets


def _load_from_disk(path: Path, split: str) -> Any:
    """Load a data set written by `save_to_disk`, or one split if it has several."""
    loaded = _import_datasets().load_from_disk(str(path))
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"{path} has no split {split!r}; choose one of {', '.join(map(repr, loaded))}.")
    return loaded[split]
