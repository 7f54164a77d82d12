"""Compare what this environment draws with stored pictures: of the bundled model, and of folders that others wrote.

    python .ci/releases.py write FOLDER           # save_pretrained, a trainer's output, export diffusers
    python .ci/releases.py compare [FOLDER ...]   # the bundled model, and all that `write` wrote in each FOLDER
    python .ci/releases.py keep                   # after a change of the bundled weights: store the new picture

Run with the newest releases and with the lowest supported ones, each reading what the other wrote, it says whether a
model is the same model on both. Random weights, a foreign tokenizer or another scheduler draw another picture.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import transformers
from PIL import Image

from rectified_diffusers import RectifiedFlowPipeline, bundled_checkpoint, export_diffusers
from rectified_diffusers.cli import main as command

# Levels of 255. One step's rounding differs between releases and processors; a wrong model is at 40 and more.
TOLERANCE = 3
REFERENCE = Path(__file__).parent / "references" / "apple.png"
PROMPT = "a red apple"
# Folders that each have to generate that image: the stock solver of the export takes our step.
WRITTEN = ("saved", "trained", "exported")


def draw(model: Path, picture: Path) -> None:
    sampling = ["--steps", "1", "--guidance-scale", "1", "--seed", "0", "--device", "cpu"]
    if command(["generate", PROMPT, "--model", str(model), "-o", str(picture), *sampling]) != 0:
        sys.exit(f"{model} draws nothing")


def write(folder: Path) -> None:
    """Write the bundled model in each way that the package saves a pipeline."""
    pipeline = RectifiedFlowPipeline.from_pretrained(bundled_checkpoint())
    pipeline.save_pretrained(folder / "saved")
    export_diffusers(pipeline, folder / "exported")
    model = str(bundled_checkpoint())
    prompts = folder / "prompts.txt"
    prompts.write_text(PROMPT + "\n", encoding="utf-8")
    triplets = ["triplets", "--teacher", model, "--prompts", str(prompts), "--output-dir", str(folder / "triplets")]
    # A step that is too small to be seen: what is compared is the saving.
    train = ["reflow", "--model", model, "--triplets", str(folder / "triplets")]
    train += ["--output-dir", str(folder / "trained")]
    if command([*triplets, "--num-triplets", "2", "--num-inference-steps", "1", "--guidance-scale", "1"]) or command(
        [*train, "--max-steps", "1", "--batch-size", "2", "--learning-rate", "1e-12"]
    ):
        sys.exit("a command failed")


def compare(folders: list[Path]) -> int:
    models = {"the bundled model": bundled_checkpoint()}
    models |= {str(folder / name): folder / name for folder in folders for name in WRITTEN}
    worst = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name, model in models.items():
            drawn = Path(temporary) / "drawn.png"
            draw(model, drawn)
            files = (drawn, REFERENCE)
            found, expected = (np.asarray(Image.open(file).convert("RGB"), int) for file in files)
            difference = int(abs(found - expected).max()) if found.shape == expected.shape else 255
            print(f"{name}: {difference} levels of 255 from {REFERENCE.name}")
            worst = max(worst, difference)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("action", choices=("write", "compare", "keep"))
    parser.add_argument("folders", type=Path, nargs="*")
    args = parser.parse_args()
    print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}")
    if args.action == "write":
        for folder in args.folders:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder)
    elif args.action == "keep":
        draw(bundled_checkpoint(), REFERENCE)
    elif (worst := compare(args.folders)) > TOLERANCE:
        sys.exit(f"{worst} levels, at most {TOLERANCE} are the same picture")


if __name__ == "__main__":
    main()
