"""Two tabs of the page: few steps beside the comparison, and images that follow a photo or the camera."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from rectified_diffusers.demo import markup
from rectified_diffusers.demo.components import PHONE_COLUMN, drawing_area, html, image_view, shown_errors
from rectified_diffusers.demo.requests import MIN_STRENGTH, Generation, ImageRequest
from rectified_diffusers.demo.session import Session
from rectified_diffusers.demo.sketches import photo_of
from rectified_diffusers.demo.tasks import Requests
from rectified_diffusers.demo.worker import AnyStudio

FEW_STEPS = (1, 2, 4)
FEW_STEPS_HEIGHT = 260  # screen pixels of each of the images


class StepsTab:
    """One prompt and seed with 1, 2 and 4 steps, beside the comparison."""

    def __init__(self, studio: AnyStudio, requests: Requests) -> None:
        self._studio = studio
        self._requests = requests
        self.generate = gr.Button("Generate with 1, 2 and 4 steps", variant="primary", elem_id="few-steps")
        captions = ["One step", *(f"{steps} steps" for steps in FEW_STEPS[1:])]
        texts = [*map(markup.caption, captions), markup.comparison_caption(studio.comparison)]
        self.images, self.captions = [], []
        with gr.Row():
            for slot, text in enumerate(texts):
                with gr.Column(min_width=PHONE_COLUMN):
                    self.captions.append(html(text, f"few-{slot}-caption"))
                    self.images.append(image_view(f"few-{slot}", FEW_STEPS_HEIGHT))

    def connect(self, screen: Sequence[Any], **options: Any) -> None:
        self.generate.click(self.show, screen, [*self.images, *self.captions], **options)

    def show(self, session: Session, visit: gr.Request, *screen: Any) -> Iterator[list[Any]]:
        """Yield updates of the images and captions: each image when it is generated, and the comparison's progress."""
        with shown_errors():
            request, _ = session.request(*screen)
            shown = self._requests.while_current(str(visit.session_hash), self._generations(request))
            for slot, generation, caption in shown:
                updates: list[Any] = [gr.skip()] * 2 * len(self.images)
                if generation.image is not None:
                    updates[slot] = generation.image
                updates[len(self.images) + slot] = caption
                yield updates

    def _generations(self, request: ImageRequest) -> Iterator[tuple[int, Generation, str]]:
        """Yield the position, the generation and its caption."""
        seconds = 0.0
        for slot, steps in enumerate(FEW_STEPS):
            generation = self._studio.generate(replace(request, steps=steps))
            seconds = seconds or generation.seconds  # of one step
            yield slot, generation, markup.own_caption(generation, request.prompt)
        comparison = self._studio.comparison
        for generation in self._studio.compare(request):
            yield (
                len(FEW_STEPS),
                generation,
                markup.comparison_caption(comparison, generation, seconds, request.prompt),
            )


class PhotoTab:
    """An image that follows a photo or the camera: image-to-image."""

    def __init__(self, studio: AnyStudio) -> None:
        self._studio = studio
        with gr.Row():
            with gr.Column(min_width=PHONE_COLUMN):
                html(markup.caption("Photo", "the image follows it"), "photo-title")
                self.photo = drawing_area("photo")
            with gr.Column(min_width=PHONE_COLUMN):
                self.caption = html(markup.own_caption(), "photo-caption")
                self.image = image_view("photo-picture")
        self.strength = gr.Slider(MIN_STRENGTH, 1, 0.7, step=0.05, label="Strength of the change", elem_id="change")
        self.events = [self.photo.change, self.strength.input]

    def connect(self, screen: Sequence[Any], typing: Sequence[Any], **options: Any) -> None:
        """Generate for each new photo or frame, and for each change of the settings."""
        gr.on(
            [*self.events, *typing],
            self.show,
            [*screen, self.photo, self.strength],
            [self.image, self.caption],
            trigger_mode="always_last",
            **options,
        )

    def show(self, session: Session, *values: Any) -> tuple[Any, str]:
        *screen, photo, strength = values
        if not photo or not screen[0].strip():  # without a photo, the tab is not in use
            return gr.skip(), markup.own_caption()
        with shown_errors():
            request, _ = session.request(*screen)
            generation = self._studio.generate_from_photo(request, photo_of(photo, self._studio.size()), strength)
        return generation.image, markup.own_caption(generation, request.prompt)
