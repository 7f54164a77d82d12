"""Write the prompts of the triplets: one of the many captions of a training picture per line.

python examples/emoji/prompts.py --data work/data --count 20000 --output work/prompts.txt
"""

import argparse
from pathlib import Path

import torch
from text import describe, read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="text file, a prompt a line")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # Captions that are held out stay unseen in every stage.
    rows = [row for row in read_rows(args.data) if row["split"] != "caption"]
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randint(len(rows), (args.count,), generator=generator).tolist()
    args.output.write_text("".join(describe(rows[i], generator) + "\n" for i in chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
