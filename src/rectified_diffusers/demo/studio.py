"""Generate the images that visitors request with one model or two, one image at a time, and measure the duration."""

import inspect
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rectified_diffusers.demo.requests import (
    MAX_STEPS,
    PROMPTS,
    Generation,
    ImageRequest,
    check_frames,
    check_strength,
    comparison_with,
)
from rectified_diffusers.demo.styles import Styles
from rectified_diffusers.demo.tasks import watch
from rectified_diffusers.editing.interpolation import interpolate
from rectified_diffusers.models.latents import unscale
from rectified_diffusers.pipelines.mixin import StartFromImage
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowControlNetPipeline, RectifiedFlowPipeline
from rectified_diffusers.pipelines.stable_diffusion_xl import (
    RectifiedFlowXLControlNetPipeline,
    RectifiedFlowXLPipeline,
)


class Studio:
    """Generate images with one model, and with its teacher for comparison. Thread-safe: one image at a time.

    Args:
        pipeline: any text-to-image pipeline of diffusers.
        teacher: any text-to-image pipeline. If None, the model itself with OWN_STEPS steps is the comparison.
        teacher_steps, teacher_guidance_scale: the teacher's generation settings.
        controlnet: a ControlNetModel for sketches. It requires one of this package's pipelines.
        own_name: name of the model on the page.
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
        self._lock = threading.Lock()
        self._styles = Styles(pipeline)
        self._sketch_pipeline = None if controlnet is None else with_controlnet(pipeline, controlnet)
        self._teacher = pipeline if teacher is None else teacher
        self.comparison = comparison_with(teacher is not None, teacher_steps, teacher_guidance_scale)
        self._size: tuple[int, int] | None = None  # of the last image of `generate`
        self._photo_pipeline: Any = None  # created on the first use: not every family has one
        for each in (pipeline, teacher, self._sketch_pipeline):
            if each is not None:
                each.set_progress_bar_config(disable=True)

    @property
    def can_sketch(self) -> bool:
        return self._sketch_pipeline is not None

    def size(self) -> tuple[int, int]:
        """Return width and height of the images in pixels: those of the last one."""
        if self._size is None:
            self.generate(ImageRequest(PROMPTS[0]))
        return cast("tuple[int, int]", self._size)

    def about(self) -> str:
        """Return a one-line description of the model: name, number of weights, image size, device and precision."""
        models = [part for part in self._pipeline.components.values() if isinstance(part, torch.nn.Module)]
        millions = sum(weight.numel() for model in models for weight in model.parameters()) / 1e6
        precision = str(self._pipeline.dtype).removeprefix("torch.")
        width, height = self.size()
        return f"{self.name} · {millions:,.0f} M weights · {width}×{height} · {self._pipeline.device}, {precision}"

    def unread(self, prompt: str) -> str:
        """Return the end of a prompt that exceeds the maximum length of every text encoder."""
        parts = self._pipeline.components.values()
        tokenizers = [part for part in parts if isinstance(part, PreTrainedTokenizerBase)]
        tokenizer: Any = max(tokenizers, key=lambda each: each.model_max_length)
        ids = tokenizer(prompt, verbose=False).input_ids
        room = tokenizer.model_max_length - 1  # the last token it reads is the end-of-text token
        return tokenizer.decode(ids[room:-1]).strip() if len(ids) > tokenizer.model_max_length else ""

    def generate(self, request: ImageRequest) -> Generation:
        """Generate an image with the model. Equal requests produce equal images, regardless of earlier ones."""
        with self._locked(request):
            generation = generate(self._pipeline, request)
        self._size = cast(Image.Image, generation.image).size
        return generation

    def generate_from_sketch(self, request: ImageRequest, lines: Image.Image, strength: float) -> Generation:
        """Generate an image that follows the lines of a sketch, white on black as returned by `lines_of`."""
        if self._sketch_pipeline is None:
            raise ValueError("Sketches need a ControlNet: start the page with --controlnet.")
        with self._locked(request):
            return generate(self._sketch_pipeline, request, image=lines, controlnet_conditioning_scale=strength)

    def generate_from_photo(self, request: ImageRequest, photo: Image.Image, strength: float) -> Generation:
        """Generate an image from a photo of the model's size: image-to-image at a strength in (0, 1].

        Pipelines of this package spend all steps of the request after the strength. Others skip the first steps of the
        grid: they get a grid of which the request's steps remain, and at least one is skipped.
        """
        check_strength(strength)
        with self._locked(request):
            if self._photo_pipeline is None:
                self._photo_pipeline = with_image(self._pipeline)
            if not isinstance(self._photo_pipeline, StartFromImage) and strength < 1:
                steps = math.ceil(max(request.steps / strength, 1 / (1 - strength)))
                request = replace(request, steps=min(steps, MAX_STEPS))
            return generate(self._photo_pipeline, request, image=photo, strength=strength)

    def compare(self, request: ImageRequest) -> Iterator[Generation]:
        """Generate the same prompt from the same noise with the teacher. Yields the progress, then the result."""
        request = replace(request, steps=self.comparison.steps, guidance_scale=self.comparison.guidance_scale)

        def work(emit: Callable[[Generation], None]) -> None:
            with self._locked(request) if self._teacher is self._pipeline else self._lock:
                emit(generate(self._teacher, request, watch_steps=emit))

        return watch(work)

    def morph(self, start: ImageRequest, end: ImageRequest, frames: int, *, loop: bool) -> Iterator[Image.Image]:
        """Yield the images from one request to another. Steps, guidance and styles are those of the first."""
        check_frames(frames)

        def work(emit: Callable[[Image.Image], None]) -> None:
            with self._locked(start):
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

    def apply_styles(self, request: ImageRequest) -> None:
        """Apply the styles of a request to the model and leave them applied; raise ValueError if they do not fit."""
        with self._locked(request):
            pass

    @contextmanager
    def _locked(self, request: ImageRequest) -> Iterator[None]:
        with self._lock:
            self._styles.apply(request.styles)
            yield


class _Watched:
    """A pipeline that emits each generated image, so that `interpolate` can be observed and stopped."""

    def __init__(self, pipeline: Any, emit: Callable[[Image.Image], None]) -> None:
        self._pipeline = pipeline
        self._emit = emit

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # looked up on a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self._pipeline, name)

    def __call__(self, **arguments: Any) -> Any:
        result = self._pipeline(**arguments)
        self._emit(result.images[0])
        return result


def with_controlnet(pipeline: Any, controlnet: Any) -> Any:
    """Return a pipeline that shares the models of `pipeline` and has a ControlNet of the same dtype."""
    kinds = {
        RectifiedFlowPipeline: (RectifiedFlowControlNetPipeline, {"requires_safety_checker": False}),
        RectifiedFlowXLPipeline: (RectifiedFlowXLControlNetPipeline, {"add_watermarker": False}),
    }
    if type(pipeline) not in kinds:
        known = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"A ControlNet for sketches goes with {known}, got {type(pipeline).__name__}.")
    kind, settings = kinds[type(pipeline)]
    return kind(**{**pipeline.components, "controlnet": controlnet.to(pipeline.device)}, **settings)


def with_image(pipeline: Any) -> Any:
    """Return the image-to-image pipeline of the same family, which shares the models of `pipeline`."""
    try:
        found = AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError as error:
        name = type(pipeline).__name__
        raise ValueError(f"diffusers has no image-to-image pipeline for {name}. Use the other tabs.") from error
    found.set_progress_bar_config(disable=True)
    return found


PREVIEW_SHARE = 0.25  # maximum time for previews, relative to the generation time


def generate(
    pipeline: Any, request: ImageRequest, *, watch_steps: Callable[[Generation], None] | None = None, **more: Any
) -> Generation:
    """Generate the image of a request with any diffusers text-to-image pipeline.

    Args:
        watch_steps: called with a `Generation` after each step except the last. It can stop the generation by raising.
        more: further arguments of the pipeline call.
    """
    watch = _Stopwatch()
    parameters = inspect.signature(pipeline.__call__).parameters
    if watch_steps is not None and "callback_on_step_end" in parameters:

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            with watch.paused():
                if step + 1 < request.steps:
                    image = _decode(pipeline, tensors.get("latents")) if watch.allows_preview() else None
                    watch_steps(Generation(image, watch.seconds, step + 1, request.steps))
            return {}

        more["callback_on_step_end"] = on_step_end
    if "guidance_scale" in parameters:
        more["guidance_scale"] = request.guidance_scale
    result = pipeline(
        prompt=request.prompt,
        num_inference_steps=request.steps,
        generator=torch.Generator().manual_seed(request.seed),  # on the CPU: the same noise on every device
        **more,
    )
    seconds = watch.seconds
    image: Image.Image = result.images[0]
    image.info["rectified_diffusers"] = request.describe()
    return Generation(image, seconds, request.steps, request.steps)


class _Stopwatch:
    """Measures the time of generation, and separately the time of previews."""

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
    """Decode the first latents of a step, including noise; None if they are not VAE latents `(B, C, H, W)`."""
    vae = getattr(pipeline, "vae", None)
    if latents is None or latents.ndim != 4 or vae is None or latents.shape[1] != vae.config.get("latent_channels"):
        return None
    decoded = vae.decode(unscale(vae, latents[:1]).to(vae.dtype), return_dict=False)[0]
    return pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
