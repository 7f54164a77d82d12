"""Train the judge of "does the picture show its caption" on real emoji, and judge it on a style it has never seen.

    python examples/emoji/alignment.py --data work/data --weights work/weights --output work/alignment

Frozen MobileNetV2 features of the pictures, frozen MiniLM features of their labels, a linear layer each. It knows the
captions that the generator never saw, since it is the judge; the style "noto" it does not know. What is written:
`alignment.safetensors`, and `alignment.json` with its figures on that style. Image features are kept in the folder.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from text import read_rows
from tqdm import tqdm

from rectified_diffusers.evaluation.alignment import AlignmentConfig, SentenceFeatures, retrieval, train_alignment
from rectified_diffusers.evaluation.features import MobileNetV2Features

UNSEEN_STYLE = "noto"


def image_features(data: Path, weights: Path, output: Path, size: int) -> torch.Tensor:
    """MobileNetV2 features (N, 1280) of every picture, computed once and kept in `output`."""
    path = output / f"features-{size}.safetensors"
    if not path.exists():
        network = MobileNetV2Features(weights / "mobilenet_v2.safetensors", size)
        images = load_file(data / "images.safetensors")["images"]
        features = torch.cat([network(batch) for batch in tqdm(images.split(32), desc="image features")])
        temporary = path.with_suffix(".tmp")
        save_file({"features": features}, temporary)
        temporary.replace(path)
    return load_file(path)["features"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--weights", type=Path, required=True, help="folder that weights.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the judge")
    parser.add_argument("--image-size", type=int, default=128, help="pixels at which MobileNetV2 sees the pictures")
    parser.add_argument("--max-steps", type=int, default=AlignmentConfig.max_steps)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    rows = read_rows(args.data)
    labels = sorted({row["label"] for row in rows})
    number = {label: i for i, label in enumerate(labels)}
    captions = torch.tensor([number[row["label"]] for row in rows])
    images = image_features(args.data, args.weights, args.output, args.image_size)
    texts = SentenceFeatures(args.weights / "minilm")(labels)

    unseen = torch.tensor([row["style"] == UNSEEN_STYLE for row in rows])
    config = AlignmentConfig(max_steps=args.max_steps)
    model = train_alignment(images[~unseen], texts, captions[~unseen], config)
    model.save(args.output / "alignment.safetensors")
    with torch.no_grad():
        text_embeds = model.embed_texts(texts)
        scores = retrieval(model.embed_images(images[unseen]), text_embeds, captions[unseen])
    card = {"image_size": args.image_size, "unseen_style": UNSEEN_STYLE, "pictures": int(unseen.sum())}
    card |= {"texts": len(labels), "recall_at_1": scores.recall_at_1, "r_precision": scores.r_precision}
    (args.output / "alignment.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(f"unseen style {UNSEEN_STYLE}: R@1 {scores.recall_at_1:.3f} among {len(labels)} captions")
    print(f"R-precision (1 of {scores.candidates}) {scores.r_precision:.3f}")


if __name__ == "__main__":
    main()
