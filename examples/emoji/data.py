"""Fetch nine emoji sets, rasterise them to 64x64 pixels and give each picture its captions.

    python examples/emoji/data.py --output work/data

The sets come from npm, pinned by version and SHA-256; nothing of them is kept in this repository. What is
written: `images.safetensors` with `images` (N, 3, 64, 64) uint8, and `rows.jsonl`, a line per image with its style,
label, tags, group and split. Run it again and it does nothing; it takes about two minutes on two cores.
"""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image
from safetensors.numpy import save_file
from tqdm import tqdm

SIZE = 64
RENDER_SIZE = 128
EMOJIBASE = "emojibase-data-17.0.0.tgz"
PACKAGES = {  # tarball that `npm pack` writes -> (package, SHA-256)
    "emojibase-data-17.0.0.tgz": (
        "emojibase-data@17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    "iconify-json-noto-1.2.9.tgz": (
        "@iconify-json/noto@1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "iconify-json-noto-v1-1.2.5.tgz": (
        "@iconify-json/noto-v1@1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "iconify-json-twemoji-1.2.5.tgz": (
        "@iconify-json/twemoji@1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "iconify-json-emojione-1.2.3.tgz": (
        "@iconify-json/emojione@1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    ),
    "iconify-json-fluent-emoji-1.2.7.tgz": (
        "@iconify-json/fluent-emoji@1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "iconify-json-fluent-emoji-flat-1.2.6.tgz": (
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "iconify-json-fxemoji-1.2.2.tgz": (
        "@iconify-json/fxemoji@1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    ),
    "iconify-json-streamline-emojis-1.2.4.tgz": (
        "@iconify-json/streamline-emojis@1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
    ),
    "lobehub-fluent-emoji-3d-1.1.0.tgz": (
        "@lobehub/fluent-emoji-3d@1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
}
STYLES = {  # tarball -> the name of its style in captions
    "iconify-json-noto-1.2.9.tgz": "noto",
    "iconify-json-noto-v1-1.2.5.tgz": "blob",
    "iconify-json-twemoji-1.2.5.tgz": "twemoji",
    "iconify-json-emojione-1.2.3.tgz": "emojione",
    "iconify-json-fluent-emoji-1.2.7.tgz": "fluent",
    "iconify-json-fluent-emoji-flat-1.2.6.tgz": "flat",
    "iconify-json-fxemoji-1.2.2.tgz": "fxemoji",
    "iconify-json-streamline-emojis-1.2.4.tgz": "streamline",
    "lobehub-fluent-emoji-3d-1.1.0.tgz": "3d",
}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{body}</svg>'
LEFT_OUT_GROUPS = {"component", "symbols", "flags"}
HELD_OUT_CAPTIONS = 0.04
HELD_OUT_PAIRS = 0.03


@dataclass(frozen=True)
class Row:
    """One picture. `split` is "train", "pair" (a style of a known caption) or "caption" (an unknown caption)."""

    style: str
    hexcode: str
    label: str
    tags: list[str]
    group: str
    split: str


def fetch(folder: Path) -> None:
    """Download the npm tarballs into `folder` and check each against its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [package for name, (package, _) in PACKAGES.items() if not (folder / name).exists()]
    if missing:
        subprocess.run(["npm", "pack", *missing], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    for name, (package, expected) in PACKAGES.items():
        actual = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if actual != expected:
            raise ValueError(f"{package}: SHA-256 is {actual}, expected {expected}. Delete {folder / name} and retry.")


def read_member(tarball: Path, member: str) -> bytes:
    with tarfile.open(tarball) as archive:
        extracted = archive.extractfile(f"package/{member}")
        assert extracted is not None
        return extracted.read()


def normalise_hexcode(hexcode: str) -> str:
    """Upper case, without the variation selector FE0F that only some sets write."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def normalise_name(name: str) -> str:
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", ascii_name.lower())


def unicode_name(hexcode: str) -> str:
    """The character's name in the Unicode database; empty for sequences and unnamed characters."""
    return "" if "-" in hexcode else unicodedata.name(chr(int(hexcode, 16)), "")


def read_emoji(folder: Path) -> dict[str, dict]:
    """Emoji by hexcode, without skin tones, flags, symbols and components."""
    tarball = folder / EMOJIBASE
    groups = {g["order"]: g["key"] for g in json.loads(read_member(tarball, "en/messages.json"))["groups"]}
    emoji = {}
    for entry in json.loads(read_member(tarball, "en/data.json")):
        group = groups.get(entry.get("group"), "component")
        if group not in LEFT_OUT_GROUPS:
            emoji[normalise_hexcode(entry["hexcode"])] = {
                "label": entry["label"].replace("“", "").replace("”", "").replace("’", "'").lower(),
                "tags": [tag.lower() for tag in entry.get("tags", [])],
                "group": group,
            }
    return emoji


def names_of(emoji: dict[str, dict], folder: Path) -> dict[str, str]:
    """Every known normalised name -> hexcode: labels, the sets' own names, shortcodes and Unicode names."""
    names: dict[str, str] = {}
    for tarball in STYLES:
        if "iconify" in tarball:
            for hexcode, name in json.loads(read_member(folder / tarball, "chars.json")).items():
                names.setdefault(normalise_name(name), normalise_hexcode(hexcode))
    for file in ("emojibase", "github", "joypixels", "cldr"):
        for hexcode, shortcodes in json.loads(read_member(folder / EMOJIBASE, f"en/shortcodes/{file}.json")).items():
            for shortcode in [shortcodes] if isinstance(shortcodes, str) else shortcodes:
                names.setdefault(normalise_name(shortcode), normalise_hexcode(hexcode))
    names.update({normalise_name(unicode_name(hexcode)): hexcode for hexcode in emoji if unicode_name(hexcode)})
    names.update({normalise_name(entry["label"]): hexcode for hexcode, entry in emoji.items()})
    return names


def pictures_of(tarball: Path, names: dict[str, str]) -> Iterator[tuple[str, str | bytes]]:
    """(hexcode, SVG text or WebP bytes) of one set; the first picture of a hexcode counts."""
    if "iconify" not in tarball.name:
        with tarfile.open(tarball) as archive:
            for member in archive:
                if member.name.endswith(".webp"):
                    file = archive.extractfile(member)
                    assert file is not None
                    yield normalise_hexcode(Path(member.name).stem), file.read()
        return
    icons = json.loads(read_member(tarball, "icons.json"))
    by_char = {name: normalise_hexcode(h) for h, name in json.loads(read_member(tarball, "chars.json")).items()}
    seen = set()
    for name, icon in icons["icons"].items():
        numberless = re.sub(r"-\d+$", "", name)
        hexcode = by_char.get(name) or names.get(normalise_name(name)) or names.get(normalise_name(numberless))
        if hexcode is None or hexcode in seen:
            continue
        seen.add(hexcode)
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        yield hexcode, SVG.format(box=box, body=icon["body"])


def rasterise(picture: str | bytes) -> np.ndarray:
    """Draw at 128 pixels, composite on white, reduce to 64 with Lanczos: (3, 64, 64) uint8."""
    if isinstance(picture, str):
        drawn = resvg_py.svg_to_bytes(svg_string=picture, width=RENDER_SIZE, height=RENDER_SIZE)
        picture = bytes(drawn)
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    image = image.resize((RENDER_SIZE, RENDER_SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    small = Image.alpha_composite(white, image).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(small).transpose(2, 0, 1)


def share(text: str) -> float:
    """A fixed pseudo-random number in [0, 1) for a text: the split must not depend on order or machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def split_of(label: str, style: str) -> str:
    if share(label) < HELD_OUT_CAPTIONS:
        return "caption"
    # The three Fluent renderings are one design: a held-out pair holds out all of them.
    design = "fluent" if style in ("fluent", "flat", "3d") else style
    return "pair" if share(f"{label}/{design}") < HELD_OUT_PAIRS else "train"


def build(folder: Path, output: Path) -> None:
    """Rasterise every captioned picture of the nine sets and write the data set to `output`."""
    emoji = read_emoji(folder)
    names = names_of(emoji, folder)
    rows, pictures = [], []
    for tarball, style in STYLES.items():
        for hexcode, picture in pictures_of(folder / tarball, names):
            if hexcode in emoji:
                entry = emoji[hexcode]
                rows.append(Row(style, hexcode, **entry, split=split_of(entry["label"], style)))
                pictures.append(picture)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = tqdm(pool.map(rasterise, pictures, chunksize=32), total=len(pictures), desc="rasterise")
        images = np.stack(list(drawn))
    seen: set[bytes] = set()
    kept = [i for i, image in enumerate(images) if not (image.tobytes() in seen or seen.add(image.tobytes()))]
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / "images.safetensors.tmp"
    lines = "".join(json.dumps(asdict(rows[i])) + "\n" for i in kept)
    (output / "rows.jsonl").write_text(lines, encoding="utf-8")
    save_file({"images": images[kept]}, temporary)
    temporary.replace(output / "images.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--downloads", type=Path, help="folder of the npm tarballs (default: OUTPUT/npm)")
    args = parser.parse_args()
    if (args.output / "images.safetensors").exists():
        print(f"{args.output} is there already.")
        return
    downloads = args.downloads or args.output / "npm"
    fetch(downloads)
    build(downloads, args.output)


if __name__ == "__main__":
    main()
