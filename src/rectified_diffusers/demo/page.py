"""The page: its gradio components and their event handlers."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from rectified_diffusers.demo import markup
from rectified_diffusers.demo.components import PHONE_COLUMN, drawing_area, html, image_view, shown_errors, thumbnails
from rectified_diffusers.demo.guard import GuardedBlocks
from rectified_diffusers.demo.requests import (
    MAX_CHARACTERS,
    MAX_FRAMES,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_STEPS,
    PROMPTS,
    STYLE_SCALES,
    Generation,
)
from rectified_diffusers.demo.session import (
    LENGTH,
    SLOTS,
    Session,
    other_prompt,
    other_seed,
    pack,
    unpack,
    unread_remark,
)
from rectified_diffusers.demo.sketches import lines_of
from rectified_diffusers.demo.tabs import PhotoTab, StepsTab
from rectified_diffusers.demo.tasks import Requests
from rectified_diffusers.demo.worker import AnyStudio
from rectified_diffusers.editing.animation import save_animation

QUEUE_LENGTH = 256  # further visitors get the message that the queue is full
CACHE_SECONDS = (600, 4 * 3600)  # interval of the search for old image files, and the age at which they are old
FRAMES_PER_SECOND = 15


def build_page(studio: AnyStudio, styles: Sequence[tuple[Path, float]] = ()) -> gr.Blocks:
    """Return the page with its components and event handlers.

    Args:
        studio: generates images for all visitors, in the order of their requests.
        styles: files available to every visitor, each with the initial scale of its slider.
    """
    with GuardedBlocks(title="rectified-diffusers", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        _Page(studio, styles).connect(page)
    page.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1)
    return page


class _Page:
    """The components by name, and their handlers. The inputs of a handler start with `self.screen`."""

    def __init__(self, studio: AnyStudio, styles: Sequence[tuple[Path, float]]) -> None:
        self.studio = studio
        self.styles = styles
        self.requests = Requests()
        self.session = gr.State(Session(styles=tuple(path for path, _ in styles)), time_to_live=CACHE_SECONDS[1])
        self.browser = gr.BrowserState([], storage_key="rectified-diffusers")
        self.title = gr.HTML(markup.title(studio.about()), elem_id="title", padding=False)
        self.typed = gr.HTML("", js_on_load=markup.packaged("typing.js"), visible="hidden")
        with gr.Row(equal_height=True):
            self.prompt = gr.Textbox(
                PROMPTS[0],
                label="Prompt",
                placeholder="Describe an image",
                max_length=MAX_CHARACTERS,
                max_lines=4,
                container=False,
                autofocus=True,
                scale=6,
                elem_id="prompt",
            )
            self.generate = gr.Button("Generate", variant="primary", scale=0, min_width=120, elem_id="draw")
            self.surprise = gr.Button("Surprise me", scale=0, min_width=150, elem_id="surprise")
            self.stop = gr.Button("Stop", scale=0, min_width=90, elem_id="stop")
        with gr.Row():
            with gr.Column(scale=4, min_width=600), gr.Tabs():
                with gr.Tab("Generate"):
                    self._lay_out_images()
                with gr.Tab("Steps"):
                    self.few_steps = StepsTab(studio, self.requests)
                with gr.Tab("Photo"):
                    self.photo = PhotoTab(studio)
                if studio.can_sketch:
                    with gr.Tab("Sketch"):
                        self._lay_out_sketch()
                with gr.Tab("Morph"):
                    self._lay_out_morph()
            with gr.Column(scale=1, min_width=230):
                self._lay_out_settings()
        self.screen = [self.session, self.prompt, self.seed, self.steps, self.guidance, *self.sliders]

    def _lay_out_images(self) -> None:
        with gr.Row():
            with gr.Column(min_width=PHONE_COLUMN):
                self.caption = html(markup.own_caption(), "own-caption")
                self.image = image_view("picture")
            with gr.Column(min_width=PHONE_COLUMN):
                self.comparison_caption = html(markup.comparison_caption(self.studio.comparison), "beside-caption")
                self.comparison = image_view("beside")
        self.remark = html(markup.remark(self.studio.comparison.remark), "remark")
        self.history = gr.Gallery(
            show_label=False,
            columns=LENGTH // 2,
            rows=2,
            height="auto",
            object_fit="contain",
            fit_columns=False,
            allow_preview=False,
            buttons=[],
            format="png",
            elem_id="history",
        )

    def _lay_out_sketch(self) -> None:
        with gr.Row():
            with gr.Column():
                html(markup.caption("Sketch", "the image follows its lines"))
                self.sketch = drawing_area("sketch")
                self.strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the sketch")
            with gr.Column():
                self.sketch_caption = html(markup.own_caption(), "sketch-caption")
                self.sketch_image = image_view("sketch-picture")

    def _lay_out_morph(self) -> None:
        with gr.Row():
            with gr.Column():
                html(markup.caption("Interpolate", "from the prompt and seed above to these"))
                self.end_prompt = gr.Textbox(PROMPTS[1], label="Second prompt", max_length=MAX_CHARACTERS)
                with gr.Row():
                    self.end_seed = gr.Number(1, label="Second seed", precision=0, minimum=0, maximum=MAX_SEED)
                    self.frames = gr.Slider(2, MAX_FRAMES, 16, step=1, label="Frames", buttons=[])
                self.loop = gr.Checkbox(True, label="Loop back to the start")
                self.animate = gr.Button("Animate", variant="primary", elem_id="animate")
            with gr.Column():
                self.morph_caption = html(markup.caption("Animation"), "morph-caption")
                self.morph_image = image_view("morph-picture")

    def _lay_out_settings(self) -> None:
        self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
        self.new_seed = gr.Button("New seed", size="sm", elem_id="new-seed")
        self.steps = gr.Slider(1, MAX_STEPS, 1, step=1, label="Steps", buttons=["reset"], elem_id="steps")
        self.guidance = gr.Slider(1, MAX_GUIDANCE, 1, step=0.5, label="Guidance", buttons=["reset"])
        with gr.Accordion("Styles", open=True, elem_id="styles"):
            self.sliders = []
            for slot in range(SLOTS):
                path, scale = self.styles[slot] if slot < len(self.styles) else (None, 1.0)
                label = path.stem if path else f"style {slot + 1}"
                self.sliders.append(
                    gr.Slider(*STYLE_SCALES, scale, step=0.05, label=label, visible=path is not None, buttons=[])
                )
            self.upload = gr.UploadButton(
                "Add a LoRA or weight delta", file_types=[".safetensors"], size="sm", elem_id="upload"
            )

    def connect(self, page: gr.Blocks) -> None:
        """Connect the events to their handlers. All image generation goes through one queue, in request order.

        An event that makes an older request of the same visitor obsolete is recorded outside the queue, where it would
        have to wait for that request. Its handler is registered first, because the browser calls the handlers of one
        event one after the other.
        """
        model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        private: dict[str, Any] = {**model, "api_visibility": "private"}
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        own = [self.session, self.image, self.caption, self.remark]
        live = [*own, self.comparison_caption]
        settings = [self.prompt, self.seed, self.steps, self.guidance]
        typing: list[Any] = [self.typed.input, self.seed.input, self.steps.input, self.guidance.input]
        typing += [slider.input for slider in self.sliders]

        newer = [self.prompt.submit, self.generate.click, self.surprise.click, self.new_seed.click]
        newer += [self.few_steps.generate.click, *self.photo.events]
        ended = [self.animate.click, self.history.select, self.stop.click]
        gr.on(typing, self._record_typing, self.screen[1:], trigger_mode="multiple", **at_once)
        gr.on([*newer, *ended], self._record_new, self.screen[1:], trigger_mode="multiple", **at_once)
        surprised = self.surprise.click(other_prompt, self.prompt, self.prompt, **at_once)
        reseeded = self.new_seed.click(other_seed, None, self.seed, **at_once)
        for requested in (self.prompt.submit, self.generate.click, surprised.then, reseeded.then):
            kept = requested(self._generate_and_keep, self.screen, [*live, self.history, self.browser], **private)
            kept.success(self._compare, self.screen, [self.comparison, self.comparison_caption], **private)
        gr.on(typing, self._generate_live, self.screen, live, trigger_mode="always_last", api_name="draw", **model)
        ends = [self.end_prompt, self.end_seed, self.frames, self.loop]
        self.animate.click(self._morph, [*self.screen, *ends], [self.morph_image, self.morph_caption], **private)
        restored = self.history.select(self._restore, self.session, settings, **at_once)
        restored.then(self._generate_live, self.screen, live, **private)
        self.upload.upload(self._add_style, [*self.screen, self.upload], [self.session, *self.sliders], **private)
        self.few_steps.connect(self.screen, **private)
        self.photo.connect(self.screen, typing, **private)
        if self.studio.can_sketch:
            gr.on(
                [self.sketch.change, self.strength.input, *typing],
                self._generate_from_sketch,
                [*self.screen, self.sketch, self.strength],
                [self.sketch_image, self.sketch_caption],
                trigger_mode="always_last",
                **private,
            )
        page.unload(self._record_new)
        page.load(self._open, [self.browser, *self.screen], [*own, *settings, self.history, self.title], **private)

    # ------------------------------------------------------------------------------------------ event handlers

    def _record_typing(self, request: gr.Request, *settings: Any) -> None:
        """Record a request from typing, which may be a repetition.

        With "always_last", the browser repeats the request of a key press when its image is generated, which may be
        after Enter.
        """
        self.requests.record(str(request.session_hash), settings, may_repeat=True)

    def _record_new(self, request: gr.Request, *settings: Any) -> None:
        self.requests.record(str(request.session_hash), settings)

    def _generate_live(self, session: Session, *screen: Any) -> tuple[Any, ...]:
        """Generate an image while the visitor types. The comparison then belongs to an older prompt."""
        prompt, seed = screen[:2]
        outdated = markup.comparison_caption(self.studio.comparison)
        if not prompt.strip() or seed is None:  # the visitor is still typing
            return replace(session, shown=None), gr.skip(), markup.own_caption(), gr.skip(), outdated
        with shown_errors():
            if session.request(*screen)[0] == session.shown:  # Enter came first: the comparison is of this prompt
                return tuple(gr.skip() for _ in range(5))
        return *self._generate(session, *screen, keep=False), outdated

    def _generate_and_keep(self, session: Session, *screen: Any) -> tuple[Any, ...]:
        session, *shown = self._generate(session, *screen, keep=True)
        waiting = markup.comparison_caption(
            self.studio.comparison, Generation(None, 0, 0, self.studio.comparison.steps)
        )
        return session, *shown, waiting, thumbnails(session.entries), pack(session.entries)

    def _generate(self, session: Session, *screen: Any, keep: bool) -> tuple[Session, Any, str, str]:
        """Return the session, image, caption and remark after generating an image."""
        with shown_errors():
            request, cut = session.request(*screen)
            generation = self.studio.generate(request)
        session = session.with_generation(request, generation, keep=keep)
        remark = markup.remark(cut, unread_remark(self.studio, request.prompt), self.studio.comparison.remark)
        return session, generation.image, markup.own_caption(generation, request.prompt), remark

    def _compare(self, session: Session, request: gr.Request, *screen: Any) -> Iterator[tuple[Any, str]]:
        comparison = self.studio.comparison
        with shown_errors():
            image_request, _ = session.request(*screen)
            prompt = image_request.prompt
            # Yield once at the start: otherwise a request that is immediately obsolete would leave blanks.
            yield gr.skip(), markup.comparison_caption(comparison, Generation(None, 0, 0, comparison.steps))
            generations = self.studio.compare(image_request)
            for generation in self.requests.while_current(str(request.session_hash), generations):
                image = gr.skip() if generation.image is None else generation.image
                yield image, markup.comparison_caption(comparison, generation, session.own_seconds, prompt)

    def _generate_from_sketch(self, session: Session, *values: Any) -> tuple[Any, str]:
        *screen, sketch, strength = values
        with shown_errors():
            lines = lines_of(sketch, self.studio.size())
            if lines is None or not screen[0].strip():
                return gr.skip(), markup.own_caption()
            request, _ = session.request(*screen)
            generation = self.studio.generate_from_sketch(request, lines, float(strength))
        return generation.image, markup.own_caption(generation, request.prompt)

    def _morph(self, session: Session, request: gr.Request, *values: Any) -> Iterator[tuple[Any, str]]:
        *screen, end_prompt, end_seed, frames, loop = values
        images: list[Image.Image] = []
        with shown_errors(), tempfile.TemporaryDirectory() as folder:
            start, _ = session.request(*screen)
            end, _ = session.request(end_prompt, end_seed, start.steps, start.guidance_scale)
            total = 2 * frames if loop else frames + 1
            ends = f"{start.prompt} → {end.prompt}"
            generated = self.studio.morph(start, end, frames, loop=loop)
            for image in self.requests.while_current(str(request.session_hash), generated):
                images.append(image)
                yield image, markup.caption(f"Frame {len(images)}", f"of {total}", tooltip=ends)
            if len(images) < total:  # stopped
                return
            file = Path(folder, "morph.gif")
            save_animation(images, file, FRAMES_PER_SECOND)
            # gradio copies the file before it requests the next item.
            shown = f"{start.prompt[:40]} → {end.prompt[:40]}"
            yield file, markup.caption(f"{len(images)} frames", shown, tooltip=ends)

    def _add_style(self, session: Session, *values: Any) -> tuple[Any, ...]:
        *screen, file = values
        with shown_errors():
            session = session.add_style(file)
            request, _ = session.request(PROMPTS[0], 0, 1, 1.0, *screen[4:])
            self.studio.apply_styles(request)
        sliders: list[Any] = [gr.Slider(visible=True, label=path.stem) for path in session.styles]
        return session, *sliders, *[gr.skip()] * (SLOTS - len(sliders))

    def _restore(self, session: Session, selected: gr.SelectData) -> tuple[Any, ...]:
        index = selected.index
        if not isinstance(index, int) or not 0 <= index < len(session.entries):
            raise gr.Error("This image is no longer in the history.")
        return session.entries[index].settings

    def _open(self, kept: Any, session: Session, *screen: Any) -> tuple[Any, ...]:
        """Generate the first image: the last one of this browser if it has a history."""
        settings = list(screen)
        session = replace(session, entries=tuple(unpack(kept)))
        if session.entries:
            settings[:4] = session.entries[0].settings
        shown = self._generate(session, *settings, keep=not session.entries)
        return *shown, *settings[:4], thumbnails(shown[0].entries), markup.title(self.studio.about())
