"""Hooks of mkdocs: the pages that are made from the code, so that they cannot go out of date.

- Below reference/api/ a page for each public module, from its docstrings, and a list of the public names.
- reference/commands.md: every command with its options, from the parser itself.
- reference/errors.md: every error that the package raises, from its `raise` statements.
- Below source/ a page for each file of the repository that a page links to, an example or a test, say.
"""

import argparse
import ast
import importlib
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "rectified_diffusers"
sys.path.insert(0, str(PACKAGE.parent))

LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
PICTURES = (".png", ".svg", ".gif")
MORE_MODULES = [  # public by their own names, which the package does not repeat
    "flow.interpolation",
    "flow.prediction",
    "flow.time_density",
    "flow.loss",
    "flow.ode",
    "evaluation.straightness",
    "evaluation.metrics",
    "evaluation.alignment",
]

origins: dict[str, Path] = {}
"""The file in the repository that a page of the site was made from, by the address of the page."""


def on_config(config: Any) -> Any:
    """Put the modules' pages behind the list of names."""
    reference = next(part["Reference"] for part in config["nav"] if "Reference" in part)
    reference[-1] = {"Python": [reference[-1]["Python"], *({name: api_page(name)} for name in public_modules())]}
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the modules, and of the files that pages link to, and those that these link to."""
    for module in public_modules():
        title = f"# {module}\n\n::: rectified_diffusers.{module}\n"
        files.append(File.generated(config, api_page(module), content=title))
    origins.clear()
    waiting = [(page.src_uri, DOCS / page.src_uri) for page in files.documentation_pages() if page.abs_src_path]
    origins.update(waiting)
    while waiting:
        _, origin = waiting.pop()
        for target in linked_files(origin):
            page = source_page(target)
            if page not in origins:
                origins[page] = target
                if target.suffix in PICTURES:
                    files.append(File.generated(config, page, abs_src_path=str(target)))
                    continue
                files.append(File.generated(config, page, content=source_text(target)))
                if target.suffix == ".md":
                    waiting.append((page, target))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is made from the code, and let links to files of the repository lead to their pages."""
    for mark, make in (("commands", commands), ("errors", errors), ("names", names)):
        if f"<!-- {mark} -->" in markdown:
            markdown = markdown.replace(f"<!-- {mark} -->", make())
    origin = origins.get(page.file.src_uri)
    return markdown if origin is None else rewrite_links(markdown, origin, page.file.src_uri)


# ------------------------------------------------------------------------------------------ files of the repository


def linked_files(origin: Path) -> Iterator[Path]:
    """Give the files and folders of the repository, outside docs/, that a Markdown file links to."""
    if origin.suffix == ".md" and origin.is_file():
        for match in LINK.finditer(origin.read_text(encoding="utf-8")):
            target = resolve(origin, match[2])
            if target is not None and not is_on_site(target):
                yield target


def resolve(origin: Path, link: str) -> Path | None:
    """Give the existing file of the repository that a relative link means, or None."""
    if ":" in link or link.startswith("/"):
        return None
    target = Path(posixpath.normpath((origin.parent / link).as_posix()))
    return target if target.exists() and ROOT in target.parents else None


def is_on_site(target: Path) -> bool:
    return DOCS in target.parents and DOCS / "scripts" not in target.parents


def source_page(target: Path) -> str:
    """Name the page that shows a file; a picture is itself."""
    name = f"source/{target.relative_to(ROOT).as_posix()}"
    return name if target.suffix in PICTURES else f"{name}.md"


def source_text(target: Path) -> str:
    """Give a page that shows a file, or lists a folder; Markdown files are pages already."""
    name = target.relative_to(ROOT).as_posix()
    if target.is_dir():
        entries = sorted(path.name for path in target.iterdir() if not path.name.startswith(("_", ".")))
        return f"# {name}\n\n" + "\n".join(f"- `{entry}`" for entry in entries) + "\n"
    text = target.read_text(encoding="utf-8")
    if target.suffix == ".md":
        return text
    language = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".patch": "diff"}.get(target.suffix, "text")
    return f"# {name}\n\n````{language}\n{text.rstrip()}\n````\n"


def rewrite_links(markdown: str, origin: Path, page: str) -> str:
    """Make relative links of a file in the repository those of its page on the site."""

    def replace(match: re.Match[str]) -> str:
        target = resolve(origin, match[2])
        if target is None:
            return match[0]
        there = target.relative_to(DOCS).as_posix() if is_on_site(target) else source_page(target)
        return f"{match[1]}{posixpath.relpath(there, posixpath.dirname(page) or '.')}{match[3] or ''}{match[4]}"

    return LINK.sub(replace, markdown)


# ------------------------------------------------------------------------------------------ Python


def modules_of_names() -> dict[str, str]:
    """Read the modules of the public names off the package's stub, which its lazy loading follows."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = (node for node in stub.body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def public_modules() -> list[str]:
    """Return the modules that public names come from, and those that are public by themselves."""
    return sorted({*modules_of_names().values(), *MORE_MODULES})


def api_page(module: str) -> str:
    return f"reference/api/{module}.md"


def names() -> str:
    """List the public names of the package with the modules they come from."""
    package = importlib.import_module("rectified_diffusers")
    rows, modules = ["| name | module |", "|---|---|"], modules_of_names()
    for name in sorted(package.__all__, key=str.lower):
        if module := modules.get(name):
            link = f"api/{module}.md#rectified_diffusers.{module}.{name}"
            rows.append(f"| [`{name}`]({link}) | [{module}](api/{module}.md) |")
    return "\n".join(rows)


# ------------------------------------------------------------------------------------------ commands


def commands() -> str:
    """Describe every command and its options, as `--help` does."""
    parser = importlib.import_module("rectified_diffusers.cli").build_parser()
    parts = []
    for name, command in subcommands(parser):
        parts.append(f"## {name}\n\n{command.description or ''}\n\n{options(command)}")
        parts += [
            f"### {name} {inner}\n\n{sub.description or ''}\n\n{options(sub)}" for inner, sub in subcommands(command)
        ]
    return "\n".join(parts)


def subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def options(parser: argparse.ArgumentParser) -> str:
    rows = ["| option | what it is |", "|---|---|"]
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)) or action.help == argparse.SUPPRESS:
            continue
        shown = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        values = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
        values = f" {values}" if action.option_strings and values else ""
        text = (action.help or "") % {"default": action.default, "prog": parser.prog}
        rows.append(f"| `{escape(shown + str(values))}` | {escape(text)} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else ""


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# ------------------------------------------------------------------------------------------ errors


def errors() -> str:
    """List what the package raises, by module: kind and text, with an ellipsis where a value stands."""
    parts = []
    for file in sorted(PACKAGE.rglob("*.py")):
        found = [error for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if (error := raised(node))]
        if found:
            module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
            rows = [f"| {kind} | {escape(text)} |" for kind, text in dict.fromkeys(found)]
            parts.append("\n".join([f"## {module}\n", "| error | text |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def raised(node: ast.AST) -> tuple[str, str] | None:
    """Give kind and text of a `raise X("text")` or of a function's `return X("text")`; None for any other node."""
    call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.endswith("Error")):
        return None
    text = "".join(piece for argument in call.args[:1] for piece in pieces(argument))
    return (call.func.id, " ".join(text.split())) if text.strip(". ") else None


def pieces(node: ast.AST) -> Iterator[str]:
    """Give the text of a string expression, with an ellipsis for what is only known when it happens."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield from pieces(value)
    elif isinstance(node, ast.BinOp):
        yield from pieces(node.left)
        yield from pieces(node.right)
    else:
        yield "…"
