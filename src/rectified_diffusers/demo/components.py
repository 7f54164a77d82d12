"""Components of the page that several of its tabs have."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import gradio as gr
from PIL import Image

from rectified_diffusers.demo import markup
from rectified_diffusers.demo.session import Entry

IMAGE_HEIGHT = 380  # screen pixels
PHONE_COLUMN = 140  # least width of an image, so that two are side by side on a phone


def html(text: str, name: str | None = None) -> gr.HTML:
    return gr.HTML(text, elem_id=name, padding=False)


def drawing_area(name: str) -> gr.HTML:
    """Return the component of the files NAME.html and NAME.js: its value is what the visitor drew or chose."""
    template, script = markup.packaged(f"{name}.html"), markup.packaged(f"{name}.js")
    return gr.HTML("", html_template=template, js_on_load=script, padding=False, elem_id=name)


def image_view(name: str, height: int = IMAGE_HEIGHT) -> gr.Image:
    return gr.Image(
        type="pil",
        format="png",
        show_label=False,
        interactive=False,
        height=height,
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes="image",
    )


def thumbnails(entries: Sequence[Entry]) -> list[tuple[Image.Image, str]]:
    return [(entry.thumbnail, entry.caption) for entry in entries]


@contextmanager
def shown_errors() -> Iterator[None]:
    """Show the visitor the errors of an invalid request. Other errors are internal and go to the terminal."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from error
