"""Check what a wheel holds: the package, its type marker, the licences and the bundled checkpoint, at most 40 MB.

python .ci/check_wheel.py dist/rectified_diffusers-0.2.0-py3-none-any.whl
"""

import sys
import zipfile
from pathlib import Path

MAX_ASSETS = 40 * 10**6  # bytes, the promise of the README about the download
ASSETS = "rectified_diffusers/assets/"
CHECKPOINT = ASSETS + "emoji-one-step/"


def main(path: str) -> int:
    with zipfile.ZipFile(path) as wheel:
        sizes = {info.filename: info.file_size for info in wheel.infolist()}
    source = Path("src")
    expected = {
        file.relative_to(source).as_posix() for file in source.glob("rectified_diffusers/**/*") if file.is_file()
    }
    expected = {name for name in expected if "__pycache__" not in name}
    expected |= {CHECKPOINT + "model_index.json", CHECKPOINT + "unet/diffusion_pytorch_model.safetensors"}
    faults = [f"missing: {name}" for name in sorted(expected - sizes.keys())]
    if not any(name.endswith("licenses/NOTICE") for name in sizes):
        faults.append("missing: NOTICE among the licences")
    packages = {name.split("/")[0] for name in sizes}
    faults += [f"not ours: {name}/" for name in sorted(packages) if not name.startswith("rectified_diffusers")]
    assets = sum(size for name, size in sizes.items() if name.startswith(ASSETS))
    if assets > MAX_ASSETS:
        faults.append(f"the assets are {assets / 1e6:.1f} MB, more than {MAX_ASSETS / 1e6:.0f} MB")
    print(f"{Path(path).name}: {len(sizes)} files, assets {assets / 1e6:.1f} MB")
    print(*faults, sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
