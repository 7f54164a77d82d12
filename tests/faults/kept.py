"""What long runs found, kept in a JSON file beside their table so that a stopped run goes on, and the table itself."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import now, provenance


@dataclass
class Found:
    """Of what source and when it was found."""

    commits: list[str] = field(default_factory=list, kw_only=True)
    dates: list[str] = field(default_factory=list, kw_only=True)

    def note(self, commit: str) -> None:
        self.commits = sorted({*self.commits, commit})
        self.dates = [*self.dates[:1], now()]


def read(table: Path | None) -> Any:
    """Return what is kept beside a table, or None."""
    file = table.with_suffix(".json") if table else None
    return json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else None


def save(table: Path | None, found: list[Any] | Mapping[str, Any]) -> None:
    if table:
        items = list(map(asdict, found)) if isinstance(found, list) else {name: asdict(x) for name, x in found.items()}
        partial = table.with_suffix(".partial")
        partial.write_text(json.dumps(items, indent=1) + "\n", encoding="utf-8")
        partial.replace(table.with_suffix(".json"))


def render(title: str, text: str, rows: list[str], command: str, found: Iterable[Found]) -> str:
    """Return a Markdown table, its first row being the header, with the date and environment."""
    machine, found = provenance(), list(found)
    dates = sorted(date for each in found for date in each.dates) or ["none"]
    commits = sorted({commit for each in found for commit in each.commits})
    line = "|" + "---|" * (rows[0].count("|") - 1)
    end = f"commit {', '.join(commits)}; hardware {machine['hardware']}; threads 1; "
    end += f"date {dates[0]} to {dates[-1]}; versions {machine['versions']}."
    return "\n".join([f"# {title}", "", text, "", rows[0], line, *rows[1:], "", f"    {command}", "", end]) + "\n"
