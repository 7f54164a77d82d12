"""Prompt embeddings for training, from a pipeline's own frozen text encoder."""

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from rectified_diffusers.data.triplets import TripletDataset

TABLE_BYTES = 2**30
_TOGETHER = 64


class PromptEncoder:
    """Embed prompts, and remember all prompts of a dataset if their embeddings fit into `TABLE_BYTES` of memory.

    An embedding differs in its last bits with the prompts that are encoded beside it. So that a step does not depend
    on the steps that this process did before it, nothing is remembered on the way: the table is made once, in one
    order, and what is not in it is encoded anew with its micro-batch.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, device: torch.device) -> None:
        self.pipeline, self.device = pipeline, device
        pipeline.text_encoder.to(device).eval()
        self.table: dict[str, Tensor] = {}

    def remember(self, dataset: TripletDataset) -> None:
        """Make the table of a dataset's prompts and the empty one, or leave it empty if it would be too large."""
        self.table = {}
        empty = self.encode([""])
        # Triplet i has prompt i % num_prompts, so that the first num_prompts triplets have them all.
        count = min(dataset.manifest["num_prompts"], len(dataset))
        if count * empty.numel() * empty.element_size() > TABLE_BYTES:
            return
        chunks = torch.arange(count).split(1024)
        prompts = sorted({"", *(prompt for chunk in chunks for prompt in dataset.rows(chunk.tolist()).prompts)})
        for start in range(0, len(prompts), _TOGETHER):
            together = prompts[start : start + _TOGETHER]
            self.table.update(zip(together, self.encode(together).cpu().clone(), strict=True))

    def __call__(self, prompts: list[str]) -> Tensor:
        """Give the embeddings of prompts, `(B, L, D)` in float32 on the device."""
        if all(prompt in self.table for prompt in prompts):
            return torch.stack([self.table[prompt] for prompt in prompts]).to(self.device)
        return self.encode(prompts)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Run the text encoder on prompts, `(B, L, D)` in float32."""
        embeds = self.pipeline.encode_prompt(
            prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        return embeds.float()
