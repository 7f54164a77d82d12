"""Random generators as functions of what they are for: equal on every machine, in every process and after a resume."""

import hashlib

import torch


def generator_of(*key: object) -> torch.Generator:
    """Return a CPU generator that is a function of its key alone, such as (seed, step) or (seed, shard).

    Args:
        key: what the numbers are for; the parts are compared as text.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
