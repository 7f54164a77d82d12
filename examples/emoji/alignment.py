"""Train the alignment scorer, which measures whether an image shows its caption, on real emoji.

    python examples/emoji/alignment.py --data work/data --weights work/weights --output work/alignment

It is one linear layer on frozen MobileNetV2 features of the images, and one on frozen MiniLM features of their labels.
The scorer is trained on all captions, including those held out from the generator, but never on the style "noto", on
which it is measured here. Writes `alignment.safetensors`, and `alignment.json` with the metrics on that style. The
image features are cached in the folder.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from text import read_rows
from torch import Tensor
from tqdm import tqdm

from rectified_diffusers.evaluation.alignment import AlignmentModel, SentenceFeatures, retrieval
from rectified_diffusers.evaluation.features import MobileNetV2Features

UNSEEN_STYLE = "noto"
MAX_STEPS = 400


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, captions: Tensor, log_scale: Tensor) -> Tensor:
    """Return the symmetric InfoNCE loss of the pairs (image i, text i), one value per pair `(B,)`.

    Two images with the same caption are not negatives of each other: both softmaxes exclude these entries.

    Args:
        image_embeds, text_embeds: unit vectors `(B, J)`.
        captions: index of each pair's caption `(B,)`, equal for images with the same caption.
        log_scale: logarithm of the inverse temperature.
    """
    # CLIP's bound (arXiv:2103.00020, section 2.5): logits are never scaled by more than 100.
    logits = image_embeds @ text_embeds.T * log_scale.exp().clamp(max=100)
    same = captions[:, None] == captions[None, :]
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -torch.inf)
    pairs = logits.diagonal()
    return (logits.logsumexp(dim=0) + logits.logsumexp(dim=1)) / 2 - pairs


def train_alignment(
    image_features: Tensor,
    text_features: Tensor,
    captions: Tensor,
    *,
    joint_dimensions: int = 256,
    max_steps: int = MAX_STEPS,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> AlignmentModel:
    """Train the two linear layers with AdamW on images and their captions and return the model.

    Args:
        image_features: one row per image `(N, Di)`.
        text_features: one row per caption `(M, Dt)`.
        captions: for each image, the row of `text_features` with its caption `(N,)`, integers.
        learning_rate: falls to 0 along a cosine.
        seed: seed of the weights and of the images of each step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AlignmentModel(image_features.shape[1], text_features.shape[1], joint_dimensions)
    model.to(image_features.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(max_steps), desc="alignment", disable=not progress)
    for step in bar:
        rows = torch.randint(len(captions), (batch_size,), generator=generator).to(captions.device)
        image_embeds = model.embed_images(image_features[rows])
        text_embeds = model.embed_texts(text_features[captions[rows]])
        loss = contrastive_loss(image_embeds, text_embeds, captions[rows], model.log_scale).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def image_features(data: Path, weights: Path, output: Path, size: int) -> Tensor:
    """Return MobileNetV2 features `(N, 1280)` of every image, which are computed once and cached in `output`."""
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
    parser.add_argument("--output", type=Path, required=True, help="folder of the scorer")
    parser.add_argument("--image-size", type=int, default=128, help="size in pixels of the images for MobileNetV2")
    parser.add_argument("--max-steps", type=int, default=MAX_STEPS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    rows = read_rows(args.data)
    labels = sorted({row["label"] for row in rows})
    number = {label: i for i, label in enumerate(labels)}
    captions = torch.tensor([number[row["label"]] for row in rows])
    images = image_features(args.data, args.weights, args.output, args.image_size)
    texts = SentenceFeatures(args.weights / "minilm")(labels)

    unseen = torch.tensor([row["style"] == UNSEEN_STYLE for row in rows])
    model = train_alignment(images[~unseen], texts, captions[~unseen], max_steps=args.max_steps)
    model.save(args.output / "alignment.safetensors")
    with torch.no_grad():
        scores = retrieval(model.embed_images(images[unseen]), model.embed_texts(texts), captions[unseen])
    card = {"image_size": args.image_size, "unseen_style": UNSEEN_STYLE, "pictures": int(unseen.sum())}
    card |= {"texts": len(labels), "recall_at_1": scores.recall_at_1, "r_precision": scores.r_precision}
    (args.output / "alignment.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(f"unseen style {UNSEEN_STYLE}: R@1 {scores.recall_at_1:.3f} among {len(labels)} captions")
    print(f"R-precision (1 of {scores.candidates}) {scores.r_precision:.3f}")


if __name__ == "__main__":
    main()
