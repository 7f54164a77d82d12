"""The page: its gradio components and their event handlers."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from rectified_diffusers.demo import markup
from rectified_diffusers.demo.requests import (
    MAX_CHARACTERS,
    MAX_FRAMES,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_STEPS,
    PROMPTS,
    STYLE_SCALES,
    Drawing,
)
from rectified_diffusers.demo.session import (
    LENGTH,
    SLOTS,
    Entry,
    Visit,
    other_prompt,
    other_seed,
    pack,
    unpack,
    unread_remark,
)
from rectified_diffusers.demo.sketches import CANVAS, CANVAS_SCRIPT, lines_of
from rectified_diffusers.demo.tasks import Wishes
from rectified_diffusers.demo.worker import AnyStudio
from rectified_diffusers.editing.animation import save_animation

QUEUE_LENGTH = 256  # further visitors get the message that the queue is full
CACHE_SECONDS = (600, 4 * 3600)  # interval of the search for old image files, and the age at which they are old
FRAMES_PER_SECOND = 15
PICTURE_HEIGHT = 380  # screen pixels


def build_page(studio: AnyStudio, styles: Sequence[tuple[Path, float]] = ()) -> gr.Blocks:
    """Return the page with its components and event handlers.

    Args:
        studio: generates images for all visitors, in the order of their requests.
        styles: files available to every visitor, each with the initial scale of its slider.
    """
    with gr.Blocks(title="rectified-diffusers", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        _Page(studio, styles).connect(page)
    page.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1)
    return page


class _Page:
    """The components by name, and their handlers. The inputs of a handler start with `self.screen`."""

    def __init__(self, studio: AnyStudio, styles: Sequence[tuple[Path, float]]) -> None:
        self.studio = studio
        self.given = styles
        self.wishes = Wishes()
        self.visit = gr.State(Visit(styles=tuple(path for path, _ in styles)), time_to_live=CACHE_SECONDS[1])
        self.browser = gr.BrowserState([], storage_key="rectified-diffusers")
        self.title = gr.HTML(markup.title(studio.about()), elem_id="title", padding=False)
        self.typed = gr.HTML("", js_on_load=markup.TYPING_SCRIPT, visible="hidden")
        with gr.Row(equal_height=True):
            self.prompt = gr.Textbox(
                PROMPTS[0],
                placeholder="Say what to draw",
                max_length=MAX_CHARACTERS,
                max_lines=4,
                container=False,
                autofocus=True,
                scale=6,
                elem_id="prompt",
            )
            self.draw = gr.Button("Draw", variant="primary", scale=0, min_width=120, elem_id="draw")
            self.surprise = gr.Button("Surprise me", scale=0, min_width=150, elem_id="surprise")
            self.stop = gr.Button("Stop", scale=0, min_width=90, elem_id="stop")
        with gr.Row():
            with gr.Column(scale=4, min_width=600), gr.Tabs():
                with gr.Tab("Draw"):
                    self._lay_out_pictures()
                if studio.can_sketch:
                    with gr.Tab("Sketch"):
                        self._lay_out_sketch()
                with gr.Tab("Morph"):
                    self._lay_out_morph()
            with gr.Column(scale=1, min_width=230):
                self._lay_out_settings()
        self.screen = [self.visit, self.prompt, self.seed, self.steps, self.guidance, *self.sliders]

    def _lay_out_pictures(self) -> None:
        with gr.Row():
            with gr.Column():
                self.caption = _html(markup.own_caption(None), "own-caption")
                self.picture = _picture("picture")
            with gr.Column():
                self.beside_caption = _html(markup.comparison_caption(self.studio.comparison), "beside-caption")
                self.beside = _picture("beside")
        self.remark = _html(markup.remark(self.studio.comparison.remark), "remark")
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
                _html(markup.own_caption(None, "Draw lines", "the picture follows them"))
                self.sketch = gr.HTML(
                    "", html_template=CANVAS, js_on_load=CANVAS_SCRIPT, padding=False, elem_id="sketch"
                )
                self.strength = gr.Slider(0, 2, 1, step=0.05, label="How closely")
            with gr.Column():
                self.sketch_caption = _html(markup.own_caption(None), "sketch-caption")
                self.sketch_picture = _picture("sketch-picture")

    def _lay_out_morph(self) -> None:
        with gr.Row():
            with gr.Column():
                _html(markup.own_caption(None, "Travel", "from the sentence and seed above to these"))
                self.end_prompt = gr.Textbox(PROMPTS[1], label="Sentence", max_length=MAX_CHARACTERS)
                with gr.Row():
                    self.end_seed = gr.Number(1, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                    self.frames = gr.Slider(2, MAX_FRAMES, 16, step=1, label="Pictures on the way", buttons=[])
                self.loop = gr.Checkbox(True, label="and back, without a seam")
                self.animate = gr.Button("Animate", variant="primary", elem_id="animate")
            with gr.Column():
                self.morph_caption = _html(markup.own_caption(None, "The way", ""), "morph-caption")
                self.morph_picture = _picture("morph-picture")

    def _lay_out_settings(self) -> None:
        self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
        self.new_seed = gr.Button("Another seed", size="sm", elem_id="new-seed")
        self.steps = gr.Slider(1, MAX_STEPS, 1, step=1, label="Steps", buttons=["reset"], elem_id="steps")
        self.guidance = gr.Slider(1, MAX_GUIDANCE, 1, step=0.5, label="Guidance", buttons=["reset"])
        with gr.Accordion("Styles", open=True, elem_id="styles"):
            self.sliders = []
            for slot in range(SLOTS):
                path, scale = self.given[slot] if slot < len(self.given) else (None, 1.0)
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
        own = [self.visit, self.picture, self.caption, self.remark]
        beside = [self.beside, self.beside_caption]
        kept = [self.history, self.browser]
        settings = [self.prompt, self.seed, self.steps, self.guidance]
        typing: list[Any] = [self.typed.input, self.seed.input, self.steps.input, self.guidance.input]
        typing += [slider.input for slider in self.sliders]

        newer = [self.prompt.submit, self.draw.click, self.surprise.click, self.new_seed.click]
        ended = [self.animate.click, self.history.select, self.stop.click]
        gr.on(typing, self._wish_typing, self.screen[1:], trigger_mode="multiple", **at_once)
        gr.on([*newer, *ended], self._wish_anew, self.screen[1:], trigger_mode="multiple", **at_once)
        surprised = self.surprise.click(other_prompt, self.prompt, self.prompt, **at_once)
        reseeded = self.new_seed.click(other_seed, None, self.seed, **at_once)
        for asked in (self.prompt.submit, self.draw.click, surprised.then, reseeded.then):
            drawn = asked(self._draw_and_keep, self.screen, [*own, self.beside_caption, *kept], **private)
            drawn.success(self._compare, self.screen, beside, **private)
        gr.on(
            typing,
            self._draw_live,
            self.screen,
            [*own, self.beside_caption],
            trigger_mode="always_last",
            api_name="draw",
            **model,
        )
        ends = [self.end_prompt, self.end_seed, self.frames, self.loop]
        morphed = [self.morph_picture, self.morph_caption]
        self.animate.click(self._morph, [*self.screen, *ends], morphed, **private)
        restored = self.history.select(self._restore, self.visit, settings, **at_once)
        restored.then(self._draw_live, self.screen, [*own, self.beside_caption], **private)
        self.upload.upload(self._add_style, [*self.screen, self.upload], [self.visit, *self.sliders], **private)
        if self.studio.can_sketch:
            gr.on(
                [self.sketch.change, self.strength.input, *typing],
                self._draw_sketch,
                [*self.screen, self.sketch, self.strength],
                [self.sketch_picture, self.sketch_caption],
                trigger_mode="always_last",
                **private,
            )
        page.unload(self._wish_anew)
        page.load(self._open, [self.browser, *self.screen], [*own, *settings, self.history, self.title], **private)

    # ------------------------------------------------------------------------------------------ event handlers

    def _wish_typing(self, request: gr.Request, *settings: Any) -> None:
        """Record a request from typing, which may be a repetition.

        With "always_last", the browser repeats the request of a key press when its image is generated, which may be
        after Enter.
        """
        self.wishes.newer(str(request.session_hash), settings, may_repeat=True)

    def _wish_anew(self, request: gr.Request, *settings: Any) -> None:
        self.wishes.newer(str(request.session_hash), settings)

    def _draw_live(self, visit: Visit, prompt: str, *settings: Any) -> tuple[Any, ...]:
        """Generate an image while the visitor types. The comparison then belongs to an older prompt."""
        stale = markup.comparison_caption(self.studio.comparison)
        if not prompt.strip() or settings[0] is None:  # the visitor is still typing
            return replace(visit, shown=None), gr.skip(), markup.own_caption(None), gr.skip(), stale
        if self._is_shown(visit, prompt, *settings):  # Enter came first: the comparison is of this prompt
            return tuple(gr.skip() for _ in range(5))
        visit, drawing, remark = self._drawn(visit, prompt, *settings, keep=False)
        return visit, drawing.image, markup.own_caption(drawing, prompt=prompt[:MAX_CHARACTERS]), remark, stale

    def _is_shown(self, visit: Visit, *screen: Any) -> bool:
        with _told():
            return visit.order(*screen[:4], scales=screen[4:])[0] == visit.shown

    def _draw_and_keep(self, visit: Visit, *screen: Any) -> tuple[Any, ...]:
        visit, drawing, remark = self._drawn(visit, *screen, keep=True)
        waiting = markup.comparison_caption(self.studio.comparison, Drawing(None, 0, 0, self.studio.comparison.steps))
        kept = _thumbnails(visit.entries), pack(visit.entries)
        return visit, drawing.image, markup.own_caption(drawing, prompt=screen[0]), remark, waiting, *kept

    def _drawn(self, visit: Visit, *screen: Any, keep: bool) -> tuple[Visit, Drawing, str]:
        with _told():
            order, cut = visit.order(*screen[:4], scales=screen[4:])
            drawing = self.studio.draw(order)
        visit = visit.drawn(order, drawing, keep=keep)
        return (
            visit,
            drawing,
            markup.remark(cut, unread_remark(self.studio, order.prompt), self.studio.comparison.remark),
        )

    def _compare(self, visit: Visit, request: gr.Request, *screen: Any) -> Iterator[tuple[Any, str]]:
        beside = self.studio.comparison
        with _told():
            order, _ = visit.order(*screen[:4], scales=screen[4:])
            # Yield once at the start: otherwise a request that is immediately obsolete would leave blanks.
            yield gr.skip(), markup.comparison_caption(beside, Drawing(None, 0, 0, beside.steps))
            for drawing in self.wishes.while_current(str(request.session_hash), self.studio.compare(order)):
                picture = gr.skip() if drawing.image is None else drawing.image
                yield picture, markup.comparison_caption(beside, drawing, visit.own_seconds)

    def _draw_sketch(self, visit: Visit, *values: Any) -> tuple[Any, str]:
        *screen, sketch, strength = values
        with _told():
            lines = lines_of(sketch, self.studio.size())
        if lines is None or not screen[0].strip():
            return gr.skip(), markup.own_caption(None)
        with _told():
            order, _ = visit.order(*screen[:4], scales=screen[4:])
            drawing = self.studio.draw_along(order, lines, float(strength))
        return drawing.image, markup.own_caption(drawing, prompt=screen[0])

    def _morph(self, visit: Visit, request: gr.Request, *values: Any) -> Iterator[tuple[Any, str]]:
        *screen, end_prompt, end_seed, frames, loop = values
        pictures: list[Image.Image] = []
        with _told(), tempfile.TemporaryDirectory() as folder:
            start, _ = visit.order(*screen[:4], scales=screen[4:])
            end, _ = visit.order(end_prompt, end_seed, start.steps, start.guidance_scale, ())
            total = 2 * frames if loop else frames + 1
            drawn = self.studio.morph(start, end, frames, loop=loop)
            for picture in self.wishes.while_current(str(request.session_hash), drawn):
                pictures.append(picture)
                yield picture, markup.own_caption(None, f"Picture {len(pictures)}", f"of {total}")
            if len(pictures) < total:  # stopped
                return
            file = Path(folder, "morph.gif")
            save_animation(pictures, file, FRAMES_PER_SECOND)
            # gradio copies the file before it requests the next item.
            yield (
                file,
                markup.own_caption(None, f"{len(pictures)} pictures", f"{start.prompt[:40]} → {end.prompt[:40]}"),
            )

    def _add_style(self, visit: Visit, *values: Any) -> tuple[Any, ...]:
        *screen, file = values
        with _told():
            visit = visit.add_style(file)
            scales = [*screen[4:]][: len(visit.styles)]
            order, _ = visit.order(PROMPTS[0], 0, 1, 1.0, scales)
            self.studio.try_on(order)
        sliders = [
            gr.Slider(visible=slot < len(visit.styles), label=visit.styles[slot].stem)
            if slot < len(visit.styles)
            else gr.skip()
            for slot in range(SLOTS)
        ]
        return visit, *sliders

    def _restore(self, visit: Visit, selected: gr.SelectData) -> tuple[Any, ...]:
        index = selected.index
        if not isinstance(index, int) or not 0 <= index < len(visit.entries):
            raise gr.Error("This picture is no longer remembered.")
        return _settings_of(visit.entries[index])

    def _open(self, kept: Any, visit: Visit, *screen: Any) -> tuple[Any, ...]:
        """Generate the first image: the last one of this browser if it has a history."""
        settings = list(screen)
        visit = replace(visit, entries=tuple(unpack(kept)))
        if visit.entries:
            settings[:4] = _settings_of(visit.entries[0])
        visit, drawing, remark = self._drawn(visit, *settings, keep=not visit.entries)
        shown = visit, drawing.image, markup.own_caption(drawing, prompt=settings[0]), remark
        return *shown, *settings[:4], _thumbnails(visit.entries), markup.title(self.studio.about())


def _html(text: str, name: str | None = None) -> gr.HTML:
    return gr.HTML(text, elem_id=name, padding=False)


def _picture(name: str) -> gr.Image:
    return gr.Image(
        type="pil",
        format="png",
        show_label=False,
        interactive=False,
        height=PICTURE_HEIGHT,
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes="picture",
    )


def _thumbnails(entries: Sequence[Entry]) -> list[tuple[Image.Image, str]]:
    return [(entry.thumbnail, entry.caption) for entry in entries]


def _settings_of(entry: Entry) -> tuple[str, int, int, float]:
    order = entry.order
    return order.prompt, order.seed, order.steps, order.guidance_scale


@contextmanager
def _told() -> Iterator[None]:
    """Show the visitor the errors of an invalid request. Other errors are internal and go to the terminal."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from error
