"""Write the address of the repository into the metadata and the README of a checkout, before its archives are built.

    python .ci/address.py https://github.com/OWNER/rectified_diffusers v0.2.0

The index shows the README without the repository, so that relative links and images need an address there. The release
workflow runs this in its own checkout; nothing of it is committed, and a fork names itself.
"""

import re
import sys
from pathlib import Path

LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s#:]+)(#[^)\s]*)?\)")
PAPER = "    Paper = "


def absolute(markdown: str, address: str, tag: str) -> str:
    """Return the text with relative links as links to the tag: images as they are, other files as their page."""

    def replace(match: re.Match[str]) -> str:
        kind = "raw" if match[1].startswith("!") else "blob"
        return f"{match[1]}({address}/{kind}/{tag}/{match[2]}{match[3] or ''})"

    return LINK.sub(replace, markdown)


def with_addresses(config: str, address: str, tag: str) -> str:
    """Return setup.cfg with the addresses of the repository in front of the paper's."""
    pages = {
        "Repository": address,
        "Documentation": f"{address}/blob/{tag}/docs/index.md",
        "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    if config.count(PAPER) != 1 or "    Repository = " in config:
        raise SystemExit("Expected setup.cfg with the paper's address alone; take a fresh checkout.")
    return config.replace(PAPER, "".join(f"    {name} = {page}\n" for name, page in pages.items()) + PAPER)


def main(address: str, tag: str) -> None:
    for name, change in (("README.md", absolute), ("setup.cfg", with_addresses)):
        file = Path(name)
        file.write_text(change(file.read_text(encoding="utf-8"), address.rstrip("/"), tag), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3])
