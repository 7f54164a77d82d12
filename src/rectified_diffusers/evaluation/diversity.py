"""How different the pictures of one prompt are: what a model that knows one picture per prompt loses."""

import torch
from torch import Tensor
from torch.nn import functional as F


def diversity(features: Tensor) -> float:
    """Mean cosine distance between pictures of one prompt, over all pairs of them and all prompts; in [0, 2].

    0 is one picture over and over. Compare it with the figure of real pictures, not with 1: a model can be too
    diverse, too, and noise is.

    Args:
        features: of `M` pictures of each of `P` prompts, `(P, M, D)`.
    """
    if features.ndim != 3 or features.shape[1] < 2 or len(features) == 0:
        raise ValueError(f"features must be (P, M, D) with at least 2 pictures a prompt, got {tuple(features.shape)}.")
    unit = F.normalize(features.double(), dim=-1)
    cosine = unit @ unit.transpose(1, 2)  # (P, M, M)
    first, second = torch.triu_indices(features.shape[1], features.shape[1], offset=1)
    return (1 - cosine[:, first, second]).mean().item()
