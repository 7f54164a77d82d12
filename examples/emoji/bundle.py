"""Put trained pipelines where they are kept: float16, model card, notice of the images' licenses.

    python examples/emoji/bundle.py --model work/bundled --figures benchmarks/results/emoji_bundled.md
    python examples/emoji/bundle.py --teacher work/teacher

The first puts a one-step model into the package. The second puts its teacher into this folder, for users who start
from a trained teacher.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from rectified_diffusers import RectifiedFlowPipeline
from rectified_diffusers.loading.saving import save_pipeline
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler

ASSETS = Path(__file__).parents[2] / "src" / "rectified_diffusers" / "assets" / "emoji-one-step"
HERE = Path(__file__).parent

NOTICE = """\
The weights in this folder were trained on pictures from the sets below. None of the pictures is included.

Noto Emoji, (c) Google LLC, Apache-2.0
  https://github.com/googlefonts/noto-emoji (npm: @iconify-json/noto 1.2.9)
Noto Emoji version 1, "blobs", (c) Google LLC, Apache-2.0
  https://github.com/googlefonts/noto-emoji (npm: @iconify-json/noto-v1 1.2.5)
Twemoji, (c) Twitter, Inc. and other contributors, CC-BY-4.0
  https://github.com/jdecked/twemoji (npm: @iconify-json/twemoji 1.2.5)
Emoji One version 2, (c) Ranks.com Inc., CC-BY-4.0
  https://github.com/EmojiTwo/emojitwo (npm: @iconify-json/emojione 1.2.3)
Fluent Emoji, (c) Microsoft Corporation, MIT
  https://github.com/microsoft/fluentui-emoji
  (npm: @iconify-json/fluent-emoji 1.2.7, @iconify-json/fluent-emoji-flat 1.2.6, @lobehub/fluent-emoji-3d 1.1.0)
Firefox OS Emoji, (c) Mozilla Foundation, Apache-2.0
  https://github.com/mozilla/fxemoji (npm: @iconify-json/fxemoji 1.2.2)
Streamline Emojis, (c) Webalys LLC, CC-BY-4.0
  https://github.com/webalys-hq/streamline-vectors (npm: @iconify-json/streamline-emojis 1.2.4)
Labels and tags: Emojibase, (c) Miles Johnson, MIT
  https://github.com/milesj/emojibase (npm: emojibase-data 17.0.0)

Changes: rasterised to 64x64 pixels on white; used as training data.
CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/   Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0
"""

CARD = """\
---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [rectified-flow, instaflow, one-step, text-to-image]
---
# Emoji in one step

This small model generates a 64x64 emoji from text with one evaluation of a U-Net, or a better one with two. It is
included in rectified_diffusers after 0.2.0. It was trained with that package: by the three stages of InstaFlow
(arXiv:2309.06380), triplets of a latent diffusion teacher, reflow and distillation; by distribution matching (DMD2,
arXiv:2405.14867); and by further training with LPIPS for one and two steps. It is meant for first tries, tests,
demonstrations and benchmarks.

```python
from rectified_diffusers import RectifiedFlowPipeline, bundled_checkpoint

pipeline = RectifiedFlowPipeline.from_pretrained(bundled_checkpoint())
pipeline("a red apple").images[0]
pipeline("a red apple", num_inference_steps=2).images[0]
```

**Data.** 9,863 images with 1,419 captions, from nine emoji sets, without flags, symbols and skin tones. Captions are
an emoji's label and tags, in English; `", 3d style"` (flat, fluent, noto, blob, twemoji, emojione, fxemoji,
streamline) selects the style of a set.

**Recipe.** `examples/emoji/README.md`, step 5 of "How the files in the repository were made". {training}

**Results.** The rows `distilled: work/{name}` are this model.

{figures}

**Limits.** It was trained on emoji only. It ignores counts and relations, and most words that are not in their labels
or tags. Small parts (faces of people, text, clock hands) are blurred.

**License.** CC-BY-4.0, the strictest of the images' licenses. NOTICE names their authors.
"""


TEACHER_CARD = """\
---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
---
# The diffusion teacher of the emoji model

A small Stable Diffusion of 64x64 emoji that predicts v, trained as described in `examples/emoji/README.md`. It is a
teacher for reflow and distillation that needs no download. Its VAE and its text encoder are those of the bundled
one-step model. Sample it with 25 steps of DPM-Solver++ and guidance 3:

```python
from diffusers import StableDiffusionPipeline

teacher = StableDiffusionPipeline.from_pretrained("examples/emoji/{folder}")
teacher("a red apple", num_inference_steps=25, guidance_scale=3).images[0]
```

**License.** CC-BY-4.0, the strictest of the images' licenses. NOTICE names their authors.
"""


def describe_training(model: Path) -> str:
    """Return what the trainer, or average.py, recorded beside the pipeline."""
    record = json.loads((model / "training.json").read_text(encoding="utf-8"))
    if "average" in record:
        shares = ", ".join(f"{share:g} `{name}`" for name, share in record["average"].items())
        return f"The weights are an average: {shares}."
    kept = ("trainer", "steps", "batch_size", "learning_rate", "loss", "ema_decay", "seed")
    return "Last stage: " + ", ".join(f"{name} {record[name]}" for name in kept if name in record) + "."


def mend_configs(folder: Path) -> None:
    """Take out where the parts lay on the machine that trained them, and have all of them loaded in one dtype.

    Unasked, diffusers loads its models in float32, but transformers 5 loads its own in the dtype of their config.
    """
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if "dtype" in config:
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def keep(pipeline: Any, output: Path, card: str) -> None:
    """Write a pipeline in float16 for any diffusers and transformers, in place of what is there."""
    shutil.rmtree(output, ignore_errors=True)
    save_pipeline(pipeline.to(torch.float16), output)
    mend_configs(output)
    (output / "README.md").write_text(card, encoding="utf-8")
    (output / "NOTICE").write_text(NOTICE, encoding="utf-8")
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of the one-step pipeline")
    parser.add_argument("--figures", type=Path, help="Markdown table that benchmarks/emoji_table.py wrote")
    parser.add_argument("--teacher", type=Path, help="folder of the teacher")
    parser.add_argument("--keep-as", default="teacher", help="the teacher's folder beside this script")
    args = parser.parse_args()
    if bool(args.model) != bool(args.figures) or not (args.model or args.teacher):
        parser.error("give --model and --figures, or --teacher, or all three.")
    if args.teacher:
        pipeline = StableDiffusionPipeline.from_pretrained(args.teacher)
        keep(pipeline, HERE / args.keep_as, TEACHER_CARD.format(folder=args.keep_as))
    if args.model:
        card = CARD.format(
            name=args.model.name,
            training=describe_training(args.model),
            figures=args.figures.read_text(encoding="utf-8").partition("\n")[2].strip(),  # without its title
        )
        pipeline = RectifiedFlowPipeline.from_pretrained(args.model)
        pipeline.scheduler = RectifiedFlowEulerScheduler()  # one step by default, whatever the training had
        keep(pipeline, ASSETS, card)


if __name__ == "__main__":
    main()
