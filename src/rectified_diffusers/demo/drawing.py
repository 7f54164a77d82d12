"""One picture: drawn, timed, and if asked shown on its way."""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rectified_diffusers.demo.answers import Drawing
from rectified_diffusers.demo.orders import Order

PREVIEW_SHARE = 0.25  # previews may take so much longer than the drawing


def draw(pipeline: Any, order: Order, *, watch_steps: Callable[[Drawing], None] | None = None, **more: Any) -> Drawing:
    """Draw an order with any text-to-image pipeline of diffusers.

    Args:
        watch_steps: is given a `Drawing` after each step but the last, and can stop it all by raising.
        more: further arguments of the pipeline's call.
    """
    watch = _Stopwatch()
    if watch_steps is not None and "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            with watch.paused():
                if step + 1 < order.steps:
                    image = _decode(pipeline, tensors.get("latents")) if watch.allows_preview() else None
                    watch_steps(Drawing(image, watch.seconds, step + 1, order.steps))
            return {}

        more["callback_on_step_end"] = on_step_end
    result = pipeline(
        order.prompt,
        num_inference_steps=order.steps,
        guidance_scale=order.guidance_scale,
        generator=torch.Generator().manual_seed(order.seed),  # on the CPU: the same noise everywhere
        **more,
    )
    seconds = watch.seconds
    image: Image.Image = result.images[0]
    image.info["rectified_diffusers"] = order.describe()
    return Drawing(image, seconds, order.steps, order.steps)


class _Stopwatch:
    """Counts the seconds of drawing, and apart from them those of showing it."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._paused = 0.0
        self._paused_at: float | None = None

    @property
    def seconds(self) -> float:
        now = time.perf_counter() if self._paused_at is None else self._paused_at
        return now - self._began - self._paused

    def allows_preview(self) -> bool:
        return self._paused <= PREVIEW_SHARE * self.seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused_at = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - self._paused_at
            self._paused_at = None


@torch.no_grad()
def _decode(pipeline: Any, latents: Tensor | None) -> Image.Image | None:
    """Decode the latents of a step, noise and all; None for a model whose latents are no small picture."""
    vae = getattr(pipeline, "vae", None)
    if latents is None or latents.ndim != 4 or vae is None or latents.shape[1] != vae.config.get("latent_channels"):
        return None
    scaled = latents[:1] / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0.0)
    decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    return pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
