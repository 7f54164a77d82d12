"""torch.compile for the models of a pipeline: with CUDA graphs by default, and few recompilations."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rectified_diffusers.speed.patching import replaced


class Compiled:
    """A compiled function of tensors that is compiled only once more when their sizes change.

    The first version is compiled for the first sizes exactly, which is fastest. When other sizes come, height, width
    and the number of images become variables of one second version. torch.compile treats a single image as a separate
    case: going from one image to several is a separate compilation from going from one size to others.
    """

    def __init__(self, function: Any, **options: Any) -> None:
        self._compiled = torch.compile(function, **options)
        self._first: tuple[int, ...] | None = None

    def __call__(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._first is None:
            self._first = tuple(sample.shape)
        if tuple(sample.shape) != self._first:
            batch = len(sample)
            for value in (sample, *args, *kwargs.values()):
                if isinstance(value, Tensor) and value.ndim and len(value) == batch:
                    torch._dynamo.maybe_mark_dynamic(value, 0)
            for dimension in range(2, sample.ndim):
                torch._dynamo.maybe_mark_dynamic(sample, dimension)
        torch.compiler.cudagraph_mark_step_begin()
        # A CUDA graph always writes its result to the same memory, so the result is copied immediately.
        return tree_map_only(Tensor, torch.clone, self._compiled(sample, *args, **kwargs))


@contextmanager
def compiled(pipeline: Any, **options: Any) -> Iterator[None]:
    """Compile the U-Net, the decoder of the VAE and the text encoders, at their first calls.

    Args:
        pipeline: with `unet` and `vae`.
        options: of `torch.compile`: mode, backend.
    """
    models: list[nn.Module] = [pipeline.unet, pipeline.vae.decoder]
    models += [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]  # pyright: ignore
    with ExitStack() as stack:
        for model in models:
            if model is not None:
                stack.enter_context(replaced(model, "forward", Compiled(model.forward, **options)))
        yield
