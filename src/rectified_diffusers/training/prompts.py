"""Prompt embeddings for training, from a pipeline's own frozen text encoders."""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rectified_diffusers.data.dataset import TripletDataset, Triplets
from rectified_diffusers.models.calibration import PROMPTS
from rectified_diffusers.models.conditioning import PromptConditioning
from rectified_diffusers.models.denoiser import Conditioning, Denoiser

TABLE_BYTES = 2**30
IDLE = torch.device("cpu")
_TOGETHER = 64
_ROUNDING = 0.1  # rounding error of a float16 or bfloat16 text encoder against float32


class PromptEncoder:
    """Embed prompts, and cache all prompts of a dataset if their embeddings fit into `TABLE_BYTES` of memory.

    The last bits of an embedding depend on the other prompts in its batch. A step must not depend on earlier steps of
    the process, so nothing is cached during training: the table is built once, in one order, and prompts that it does
    not contain are encoded again with their micro-batch. Embeddings stored with the triplets, set by `use_stored`,
    take precedence over both.

    Unless steps have to encode prompts, `released` moves the text encoders off the device meanwhile.
    """

    def __init__(self, denoiser: Denoiser, device: torch.device) -> None:
        self.denoiser, self.device = denoiser, device
        self.encoders: dict[Any, torch.device] = {}  # with their places before the training
        for name, part in denoiser.pipeline.components.items():
            if name.startswith("text_encoder") and isinstance(part, nn.Module):
                self.encoders[part.eval()] = part.device  # pyright: ignore[reportArgumentType]
        self.complete = False  # whether no step encodes prompts
        self.table: dict[str, Any] = {}
        self.stored: dict[str, Any] = {}

    def remember(self, dataset: TripletDataset) -> None:
        """Build the table of a dataset's prompts and the empty prompt, or leave it empty if it would be too large."""
        self.table, self.complete = {}, False
        empty = self.encode([""])
        if dataset.manifest.text_embeddings:
            self._require_same_encoder(dataset.rows([0]))
            self.table = {"": _rows_on_cpu(empty)[0]}
            self.complete = self._template is not None or not isinstance(empty, PromptConditioning)
            return
        rows = dataset.prompt_rows()
        if len(rows) * _nbytes(empty) > TABLE_BYTES:
            return
        prompts = sorted(
            {"", *(prompt for chunk in rows.split(1024) for prompt in dataset.rows(chunk.tolist()).prompts)}
        )
        for start in range(0, len(prompts), _TOGETHER):
            together = prompts[start : start + _TOGETHER]
            self.table |= dict(zip(together, _rows_on_cpu(self.encode(together)), strict=True))
        self.complete = True

    @contextmanager
    def released(self) -> Iterator[None]:
        """Have the text encoders off the device in the block, unless steps encode, and after it where they were."""
        if self.complete:
            self._move(IDLE)
        try:
            yield
        finally:
            for part, place in self.encoders.items():
                part.to(place)

    @contextmanager
    def with_encoders(self) -> Iterator[None]:
        """Have the text encoders on the device until the end of the block, in which the pipeline runs."""
        places = [part.device for part in self.encoders]
        self._move(self.device)
        try:
            yield
        finally:
            for part, place in zip(self.encoders, places, strict=True):
                part.to(place)

    def _move(self, device: torch.device) -> None:
        for part in self.encoders:
            part.to(device)

    def _require_same_encoder(self, triplets: Triplets) -> None:
        """Raise if stored embeddings differ from those of this pipeline's text encoders for the same prompts."""
        encoded = self.encode(triplets.prompts)
        here = encoded.stack() if isinstance(encoded, PromptConditioning) else encoded
        for name, stored in triplets.text_embeddings.items():
            own = here[name].cpu().to(stored.dtype) if name in here else stored.new_empty(0)
            if own.shape != stored.shape or (own - stored).norm() > _ROUNDING * stored.norm():
                raise ValueError(
                    f"The triplets have text embeddings of other text encoders than this pipeline's: {name} of prompt "
                    f"{triplets.prompts[0]!r} differs. Train a pipeline with the teacher's text encoders, or make the "
                    "triplets again without store_text_embeddings."
                )

    def use_stored(self, batch: Triplets) -> None:
        """Use the text embeddings that are stored with a batch, if any, until the next batch."""
        self.stored = {}
        if batch.text_embeddings:
            rows: Any = _unbind(batch.text_embeddings)
            if self._template is not None:
                rows = self._template.unstack(batch.text_embeddings)
            self.stored = dict(zip(batch.prompts, rows, strict=True))

    @cached_property
    def _template(self) -> PromptConditioning | None:
        """A conditioning that has all that prompts share; None for tensors by name, which share nothing."""
        encoded = self.encode(list(PROMPTS[:1]))
        return encoded.to("cpu") if isinstance(encoded, PromptConditioning) else None

    def __call__(self, prompts: list[str]) -> Conditioning:
        """Return the conditioning of the network for the prompts, on the device; tensors by name are in float32."""
        known = ChainMap(self.stored, self.table)
        if not all(prompt in known for prompt in prompts):
            return self.encode(prompts)
        rows = [known[prompt] for prompt in prompts]
        if isinstance(rows[0], PromptConditioning):
            return PromptConditioning.concat(rows).to(self.device)
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts with the text encoders, which are on the device from then on."""
        self._move(self.device)
        encoded = self.denoiser.encode(prompts, self.device)
        if isinstance(encoded, PromptConditioning):  # the adapter converts it to the precision of the network
            return encoded
        return {name: part.float() for name, part in encoded.items()}


def _unbind(conditioning: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split tensors by name into those of each prompt."""
    parts = {name: part.unbind() for name, part in conditioning.items()}
    return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]


def _rows_on_cpu(conditioning: Conditioning) -> list[Any]:
    """Return the conditioning of each prompt, on the CPU."""
    if isinstance(conditioning, PromptConditioning):
        rows = conditioning.to("cpu")
        return [rows.select([i]) for i in range(len(rows))]
    on_cpu = {name: part.cpu() for name, part in conditioning.items()}
    return [{name: part.clone() for name, part in row.items()} for row in _unbind(on_cpu)]


def _nbytes(conditioning: Conditioning) -> int:
    if isinstance(conditioning, PromptConditioning):
        return conditioning.nbytes
    return sum(part.nbytes for part in conditioning.values())
