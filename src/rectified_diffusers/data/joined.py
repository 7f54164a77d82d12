"""Several folders of triplets as one dataset, such as those of generated and of real pictures."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.arguments import require_type
from rectified_diffusers.data.triplets import TripletDataset, Triplets

_SHARED = ("latent_shape", "text_embeddings", "vae_scaling_factor", "vae_shift_factor")


def open_triplets(folders: Sequence[str | Path]) -> TripletDataset:
    """Open a folder of triplets, or several as one."""
    return TripletDataset(folders[0]) if len(folders) == 1 else JoinedTriplets(folders)


class JoinedTriplets(TripletDataset):
    """The triplets of several folders, one folder after the other.

    A folder has the share of a training that it has of all triplets; one that is given twice counts twice. The
    folders may have been made with other teachers and guidance, but have to be of one VAE and of one size.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        require_type("folders", folders, (list, tuple), "Give the folders of triplets as a list.")
        if not folders:
            raise ValueError("folders must name at least one folder of triplets, got none.")
        self.parts = [TripletDataset(folder) for folder in folders]
        self.manifest = _joined(self.parts)
        *self._starts, _ = accumulate(map(len, self.parts), initial=0)

    def rows(self, indices: Sequence[int] | Tensor) -> Triplets:
        """Read the triplets with the given indices, in that order, as float32."""
        positions: list[list[int]] = [[] for _ in self.parts]
        for position, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"Indices must be in [0, {len(self)}), got {int(index)} for the joined triplets.")
            positions[bisect_right(self._starts, int(index)) - 1].append(position)
        read = [
            part.rows([int(indices[position]) - start for position in own])
            for part, start, own in zip(self.parts, self._starts, positions, strict=True)
        ]
        order = torch.tensor([position for own in positions for position in own], dtype=torch.long).argsort()
        prompts = [prompt for part in read for prompt in part.prompts]
        embeddings = {
            name: _sorted([part.text_embeddings[name] for part in read], order)
            for name in self.manifest["text_embeddings"] or {}
        }
        noise, data = _sorted([part.noise for part in read], order), _sorted([part.data for part in read], order)
        return Triplets([prompts[i] for i in order.tolist()], noise, data, embeddings)

    def prompt_rows(self) -> Tensor:
        """Number triplets that together have every prompt there is."""
        return torch.cat([start + part.prompt_rows() for part, start in zip(self.parts, self._starts, strict=True)])


def _joined(parts: Sequence[TripletDataset]) -> dict[str, Any]:
    """Say of all parts what a manifest says of one, as far as reading and training need it; raise if they differ."""
    first = parts[0]
    for part in parts[1:]:
        for name in _SHARED:
            expected, found = first.manifest.get(name), part.manifest.get(name)
            if found != expected:
                raise ValueError(
                    f"The triplets in {part.folder} do not go with those in {first.folder}: expected {name} "
                    f"{expected!r}, got {found!r}. Make them again with the same VAE, size and store_text_embeddings."
                )
    made_by = [{key: value for key, value in part.manifest.items() if key != "made_with"} for part in parts]
    joined = {name: first.manifest.get(name) for name in _SHARED if name in first.manifest}
    return {
        **joined,
        "text_embeddings": joined.get("text_embeddings"),
        "num_triplets": sum(map(len, parts)),
        "guidance_scale": first.manifest.get("guidance_scale", 1.0),
        "parts": made_by,
    }


def _sorted(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    return torch.cat(list(parts))[order]
