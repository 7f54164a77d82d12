"""The tabs of few steps and of photos, without a browser, and the studio with pipelines of other families."""

import base64
import io
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason='the page needs gradio: pip install "rectified_diffusers[demo]"')
import gradio as gr

from rectified_diffusers.demo.requests import ImageRequest
from rectified_diffusers.demo.session import Session
from rectified_diffusers.demo.sketches import PHOTO_PREFIX, PHOTO_SIDE, photo_of
from rectified_diffusers.demo.studio import Studio
from tests.test_demo_handlers import REQUEST, make_page, screen
from tests.tiny import make_tiny_pipeline, make_tiny_xl_pipeline


def data_url(image: Image.Image, kind: str = "JPEG") -> str:
    file = io.BytesIO()
    image.save(file, format=kind, quality=100)
    return PHOTO_PREFIX + base64.b64encode(file.getvalue()).decode()


def test_a_photo_is_cropped_at_the_center():
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("blue", (32, 0, 64, 32))
    photo = photo_of(data_url(wide), (16, 16))
    assert photo.size == (16, 16)
    pixel: Any = photo.getpixel((8, 8))
    red, _, blue = pixel
    assert (red < 20, blue > 230) == (True, True)


@pytest.mark.parametrize(
    "photo",
    [
        3,
        "http://example.com/a.jpg",
        PHOTO_PREFIX + "?",
        PHOTO_PREFIX + "aGVsbG8=",
        data_url(Image.new("L", (2, 2)), "PNG"),
    ],
)
def test_what_is_no_photo_is_refused(photo):
    with pytest.raises(ValueError, match="A photo is a JPEG of at most 1024 pixels a side"):
        photo_of(photo, (16, 16))


def test_a_photo_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="A photo is a JPEG"):
        photo_of(data_url(Image.new("L", (PHOTO_SIDE + 1, 8))), (16, 16))


def steps_run(pipeline: Any) -> list[Any]:
    """Return a list that gets an item for each evaluation of the network."""
    evaluations: list[Any] = []
    network = pipeline.unet if getattr(pipeline, "unet", None) is not None else pipeline.transformer
    network.register_forward_hook(lambda *_: evaluations.append(1))
    return evaluations


@pytest.mark.parametrize("make", [lambda: make_tiny_pipeline("flow"), make_tiny_xl_pipeline], ids=["1.5", "XL"])
def test_the_steps_of_our_pipelines_follow_the_strength(make):
    pipeline = make()
    studio, evaluations = Studio(pipeline), steps_run(pipeline)
    photo = Image.new("RGB", studio.size(), "orange")
    for steps in (1, 3):
        evaluations.clear()
        generation = studio.generate_from_photo(ImageRequest("red", steps=steps), photo, 0.4)
        assert len(evaluations) == steps
        assert generation.image is not None
        assert generation.image.size == photo.size
    for strength in (0, 1.5, "x"):
        with pytest.raises(ValueError, match=r"strength is a number from 0\.1 to 1"):
            studio.generate_from_photo(ImageRequest("red"), photo, strength)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diffusion", "sd3", "flux"])
def test_other_pipelines_start_from_the_photo_too(kind):
    pipeline = make_tiny_pipeline(kind)
    studio, evaluations = Studio(pipeline), steps_run(pipeline)
    photos = [Image.new("RGB", studio.size(), color) for color in ("orange", "blue")]
    evaluations.clear()
    images: list[Any] = [studio.generate_from_photo(ImageRequest("red"), photo, 0.6).image for photo in photos]
    assert 1 <= len(evaluations) // 2 <= 3
    assert images[0].tobytes() != images[1].tobytes()
    assert studio.unread("red " * 60) == ""
    assert "M weights" in studio.about()


def test_a_family_without_image_to_image_says_so(monkeypatch):
    class Lonely(type(make_tiny_pipeline("diffusion"))):
        pass

    pipeline = make_tiny_pipeline("diffusion")
    pipeline.__class__ = Lonely
    studio = Studio(pipeline)
    with pytest.raises(ValueError, match="no image-to-image pipeline for Lonely"):
        studio.generate_from_photo(ImageRequest("red"), Image.new("RGB", studio.size()), 0.5)


def test_few_steps_come_one_by_one():
    page = make_page(Studio(make_tiny_pipeline("flow")))
    page._record_new(REQUEST)
    updates = list(page.few_steps.show(Session(), REQUEST, *screen()))
    shown = [[image for image in update[:4] if image != gr.skip()] for update in updates]
    assert [len(images) for images in shown[:3]] == [1, 1, 1]
    assert updates[2][2] == shown[2][0]
    assert "4 steps" in updates[2][6]
    assert "× as long" in updates[-1][7]
    one: Any = page.studio.generate(ImageRequest("a red apple")).image
    assert shown[0][0].tobytes() == one.tobytes()


def test_few_steps_stop_for_a_newer_request():
    page = make_page(Studio(make_tiny_pipeline("flow")))
    updates = page.few_steps.show(Session(), SimpleNamespace(session_hash="a visitor"), *screen())
    next(updates)
    page._record_new(REQUEST)
    assert len(list(updates)) == 0


def test_the_photo_tab_draws_only_with_a_photo_and_a_prompt():
    page = make_page(Studio(make_tiny_pipeline("flow")))
    photo = data_url(Image.new("RGB", (40, 40), "orange"))
    image, caption = page.photo.show(Session(), *screen("red"), photo, 0.5)
    assert image.size == page.studio.size()
    assert "red" in caption
    for prompt, given in (("red", ""), (" ", photo)):
        assert page.photo.show(Session(), *screen(prompt), given, 0.5)[0] == gr.skip()
    with pytest.raises(gr.Error, match="A photo is a JPEG"):
        page.photo.show(Session(), *screen("red"), "nonsense", 0.5)
