"""One model, or two side by side, that draw what visitors order: one at a time, each with the time it took."""

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rectified_diffusers.demo.requests import Drawing, Order, check_frames, comparison_with
from rectified_diffusers.demo.styles import Styles
from rectified_diffusers.demo.tasks import watch
from rectified_diffusers.editing.interpolation import interpolate
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowControlNetPipeline, RectifiedFlowPipeline
from rectified_diffusers.pipelines.stable_diffusion_xl import (
    RectifiedFlowXLControlNetPipeline,
    RectifiedFlowXLPipeline,
)


class Studio:
    """Draws with one model, and with its teacher for comparison. Thread-safe: one picture is drawn at a time.

    Args:
        pipeline: text to image, of the Stable Diffusion or SDXL family.
        teacher: any text-to-image pipeline; without one, the model itself with OWN_STEPS steps.
        teacher_steps, teacher_guidance_scale: how the teacher draws.
        controlnet: a ControlNetModel for sketches, of a model of ours.
        own_name: of the model, for the page.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        teacher: Any = None,
        teacher_steps: int = 25,
        teacher_guidance_scale: float = 5.0,
        controlnet: Any = None,
        own_name: str = "this model",
    ) -> None:
        self.name = own_name
        self._pipeline = pipeline
        self._turn = threading.Lock()
        self._styles = Styles(pipeline)
        self._sketcher = None if controlnet is None else with_controlnet(pipeline, controlnet)
        self._teacher = pipeline if teacher is None else teacher
        self.comparison = comparison_with(teacher is not None, teacher_steps, teacher_guidance_scale)
        for each in (pipeline, teacher, self._sketcher):
            if each is not None:
                each.set_progress_bar_config(disable=True)

    @property
    def can_sketch(self) -> bool:
        return self._sketcher is not None

    def size(self) -> tuple[int, int]:
        """Width and height of the pictures."""
        size, factor = self._pipeline.unet.config.sample_size, self._pipeline.vae_scale_factor
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return width * factor, height * factor

    def about(self) -> str:
        """Say in a line what draws: name, number of weights, size, device and precision."""
        models = [part for part in self._pipeline.components.values() if isinstance(part, torch.nn.Module)]
        millions = sum(weight.numel() for model in models for weight in model.parameters()) / 1e6
        precision = str(self._pipeline.dtype).removeprefix("torch.")
        width, height = self.size()
        return f"{self.name} · {millions:,.0f} M weights · {width}×{height} · {self._pipeline.device}, {precision}"

    def unread(self, prompt: str) -> str:
        """Give the end of a prompt that the text encoder has no room for."""
        tokenizer = self._pipeline.tokenizer
        ids = tokenizer(prompt, verbose=False).input_ids
        room = tokenizer.model_max_length - 1  # the last token it reads is the end of the text
        return tokenizer.decode(ids[room:-1]).strip() if len(ids) > tokenizer.model_max_length else ""

    def draw(self, order: Order) -> Drawing:
        """Draw with the model. Equal orders give equal pictures, whatever was drawn in between."""
        with self._turn_wearing(order):
            return draw(self._pipeline, order)

    def draw_along(self, order: Order, lines: Image.Image, strength: float) -> Drawing:
        """Draw along the lines of a sketch, white on black as `lines_of` gives them."""
        if self._sketcher is None:
            raise ValueError("Sketches need a ControlNet: start the page with --controlnet.")
        with self._turn_wearing(order):
            return draw(self._sketcher, order, image=lines, controlnet_conditioning_scale=strength)

    def compare(self, order: Order) -> Iterator[Drawing]:
        """Draw the same prompt from the same noise with the teacher; how far it is comes in between."""
        beside = self.comparison
        order = order.with_steps(beside.steps, beside.guidance_scale)

        def work(emit: Callable[[Drawing], None]) -> None:
            with self._turn_wearing(order) if self._teacher is self._pipeline else self._turn:
                emit(draw(self._teacher, order, watch_steps=emit))

        return watch(work)

    def morph(self, start: Order, end: Order, frames: int, *, loop: bool) -> Iterator[Image.Image]:
        """Draw the way from one picture to another, picture by picture; steps, guidance and styles are the first's."""
        check_frames(frames)

        def work(emit: Callable[[Image.Image], None]) -> None:
            with self._turn_wearing(start):
                interpolate(
                    _Watched(self._pipeline, emit),
                    [start.prompt, end.prompt],
                    [start.seed, end.seed],
                    frames,
                    loop=loop,
                    num_inference_steps=start.steps,
                    guidance_scale=start.guidance_scale,
                    progress=False,
                )

        return watch(work)

    def try_on(self, order: Order) -> None:
        """Find out whether the model can wear the styles of an order, and leave it as it is then."""
        with self._turn_wearing(order):
            pass

    @contextmanager
    def _turn_wearing(self, order: Order) -> Iterator[None]:
        with self._turn:
            self._styles.wear(order.styles)
            yield


class _Watched:
    """A pipeline that shows each picture as it is drawn, by which `interpolate` can be watched and stopped."""

    def __init__(self, pipeline: Any, emit: Callable[[Image.Image], None]) -> None:
        self._pipeline = pipeline
        self._emit = emit

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self._pipeline, name)

    def __call__(self, **arguments: Any) -> Any:
        result = self._pipeline(**arguments)
        self._emit(result.images[0])
        return result


def with_controlnet(pipeline: Any, controlnet: Any) -> Any:
    """Build the pipeline that has the same models, not copies of them, and a ControlNet of the same dtype."""
    kinds = {
        RectifiedFlowPipeline: (RectifiedFlowControlNetPipeline, {"requires_safety_checker": False}),
        RectifiedFlowXLPipeline: (RectifiedFlowXLControlNetPipeline, {"add_watermarker": False}),
    }
    if type(pipeline) not in kinds:
        known = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"A ControlNet for sketches goes with {known}, got {type(pipeline).__name__}.")
    kind, settings = kinds[type(pipeline)]
    return kind(**{**pipeline.components, "controlnet": controlnet.to(pipeline.device)}, **settings)


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
