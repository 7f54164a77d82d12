"""Prompt embeddings for training, from a pipeline's own frozen text encoders."""

from collections import ChainMap

import torch
from torch import Tensor, nn

from rectified_diffusers.data.dataset import TripletDataset, Triplets
from rectified_diffusers.models.denoiser import Conditioning, Denoiser

TABLE_BYTES = 2**30
_TOGETHER = 64
_ROUNDING = 0.1  # rounding error of a float16 or bfloat16 text encoder against float32


class PromptEncoder:
    """Embed prompts, and cache all prompts of a dataset if their embeddings fit into `TABLE_BYTES` of memory.

    The last bits of an embedding depend on the other prompts in its batch. A step must not depend on earlier steps of
    the process, so nothing is cached during training: the table is built once, in one order, and prompts that it does
    not contain are encoded again with their micro-batch. Embeddings stored with the triplets, set by `use_stored`,
    take precedence over both.
    """

    def __init__(self, denoiser: Denoiser, device: torch.device) -> None:
        self.denoiser, self.device = denoiser, device
        for name, part in denoiser.pipeline.components.items():
            if name.startswith("text_encoder") and isinstance(part, nn.Module):
                part.to(device).eval()
        self.table: dict[str, Conditioning] = {}
        self.stored: dict[str, Conditioning] = {}

    def remember(self, dataset: TripletDataset) -> None:
        """Build the table of a dataset's prompts and the empty prompt, or leave it empty if it would be too large."""
        self.table = {}
        empty = self.encode([""])
        if dataset.manifest.text_embeddings:
            self._require_same_encoder(dataset.rows([0]))
            self.table = {"": {name: part[0].cpu() for name, part in empty.items()}}
            return
        rows = dataset.prompt_rows()
        if len(rows) * sum(part.numel() * part.element_size() for part in empty.values()) > TABLE_BYTES:
            return
        prompts = sorted(
            {"", *(prompt for chunk in rows.split(1024) for prompt in dataset.rows(chunk.tolist()).prompts)}
        )
        for start in range(0, len(prompts), _TOGETHER):
            together = prompts[start : start + _TOGETHER]
            encoded = {name: part.cpu() for name, part in self.encode(together).items()}
            for i, prompt in enumerate(together):
                self.table[prompt] = {name: part[i].clone() for name, part in encoded.items()}

    def _require_same_encoder(self, triplets: Triplets) -> None:
        """Raise if stored embeddings differ from those of this pipeline's text encoders for the same prompts."""
        here = self.encode(triplets.prompts)
        for name, stored in triplets.text_embeddings.items():
            own = here[name].cpu() if name in here else stored.new_empty(0)
            if own.shape != stored.shape or (own - stored).norm() > _ROUNDING * stored.norm():
                raise ValueError(
                    f"The triplets have text embeddings of other text encoders than this pipeline's: {name} of prompt "
                    f"{triplets.prompts[0]!r} differs. Train a pipeline with the teacher's text encoders, or make the "
                    "triplets again without store_text_embeddings."
                )

    def use_stored(self, batch: Triplets) -> None:
        """Use the text embeddings that are stored with a batch, if any, until the next batch."""
        rows = {name: part.unbind() for name, part in batch.text_embeddings.items()}
        self.stored = {
            prompt: {name: parts[i] for name, parts in rows.items()} for i, prompt in enumerate(batch.prompts) if rows
        }

    def __call__(self, prompts: list[str]) -> Conditioning:
        """Return the conditioning of the network for the prompts: tensors `(B, ...)` in float32 on the device."""
        known = ChainMap(self.stored, self.table)
        if not all(prompt in known for prompt in prompts):
            return self.encode(prompts)
        rows = [known[prompt] for prompt in prompts]
        return {name: self._stack([row[name] for row in rows]) for name in rows[0]}

    def _stack(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).to(self.device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts with the text encoders."""
        return {name: part.float() for name, part in self.denoiser.encode(prompts, self.device).items()}
