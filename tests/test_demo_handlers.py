"""What the demo page does with what a visitor typed, without a server: each handler called as gradio would."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install "rectified_diffusers[demo]"')
import gradio as gr
import torch
from safetensors.torch import save_file

from rectified_diffusers.demo.page import _Page, build_page
from rectified_diffusers.demo.server import _free_port
from rectified_diffusers.demo.session import SLOTS, Session, pack
from rectified_diffusers.demo.studio import Studio
from tests.tiny import make_tiny_controlnet, make_tiny_pipeline

REQUEST: Any = SimpleNamespace(session_hash="a visitor")
SLIDERS = [1.0] * SLOTS


def make_page(studio: Studio) -> _Page:
    with gr.Blocks():
        return _Page(studio, ())


@pytest.fixture
def page() -> _Page:
    return make_page(Studio(make_tiny_pipeline("flow")))


def screen(prompt: Any = "a red apple", seed: Any = 0, steps: Any = 1) -> list[Any]:
    return [prompt, seed, steps, 1, *SLIDERS]


def test_drawing_is_kept_or_not(page):
    visit, live, *_ = page._generate_live(Session(), *screen())
    assert not visit.entries
    visit, kept, caption, _, _, thumbnails, packed = page._generate_and_keep(visit, *screen())
    assert live.tobytes() == kept.tobytes()
    assert "a red apple" in caption
    assert len(visit.entries) == len(thumbnails) == len(packed) == 1


@pytest.mark.parametrize("unfinished", [{"prompt": "  "}, {"seed": None}])
def test_half_a_wish_draws_nothing(page, unfinished):
    same, picture, *_ = page._generate_live(Session(), *screen(**unfinished))
    assert same == Session()
    assert picture == gr.skip()


def test_what_is_shown_is_not_drawn_again(page):
    """The last key before Enter may be answered after Enter, and must not take the comparison off the screen."""
    visit, *_ = page._generate_and_keep(Session(), *screen())
    assert page._generate_live(visit, *screen()) == (gr.skip(),) * 5
    assert page._generate_live(visit, *screen(seed=1))[1] != gr.skip()
    visit, *_ = page._generate_live(visit, *screen(prompt=""))
    assert page._generate_live(visit, *screen())[1] != gr.skip()


@pytest.mark.parametrize("wrong", [{"prompt": 3}, {"seed": -1}, {"steps": 10**9}])
def test_a_wrong_wish_is_told_to_the_visitor(page, wrong):
    with pytest.raises(gr.Error):
        page._generate_and_keep(Session(), *screen(**wrong))


def test_the_comparison_comes_step_by_step(page):
    page._record_new(REQUEST)
    shown = list(page._compare(Session(), REQUEST, *screen()))
    assert shown[-1][0].size == page.studio.size()


def test_a_comparison_that_is_obsolete_at_once_leaves_no_blanks(page, monkeypatch):
    monkeypatch.setattr(page.requests, "while_current", lambda visitor, items: iter(()))
    ((picture, caption),) = page._compare(Session(), REQUEST, *screen())
    assert picture == gr.skip()
    assert "step 0" in caption


def test_a_newer_wish_is_told_before_anything_is_drawn(page):
    """Of one event's functions the browser calls the next when the last is done: a wish told last comes too late."""
    functions = build_page(page.studio).fns.values()
    first: dict[Any, Any] = {}
    for function in functions:
        for target in function.targets:
            first.setdefault(target, function.name)
    heard = {name for (_, event), name in first.items() if event in ("input", "submit", "click", "select")}
    assert heard == {"_record_new", "_record_typing"}


@pytest.mark.parametrize("loop", [False, True])
def test_a_morph_ends_in_an_animation(page, loop):
    shown = list(page._morph(Session(), REQUEST, *screen(), "red", 1, 2, loop))
    assert len(shown) == (5 if loop else 4)
    assert str(shown[-1][0]).endswith("morph.gif")


def test_a_stopped_morph_leaves_no_animation(page):
    morph = page._morph(Session(), REQUEST, *screen(), "red", 1, 8, False)
    shown = [next(morph)]
    page._record_new(REQUEST)
    shown += list(morph)
    assert not any(str(picture).endswith(".gif") for picture, _ in shown)


def test_a_key_that_is_told_again_after_enter_ends_nothing(page):
    page._record_typing(REQUEST, *screen())
    page._record_new(REQUEST, *screen())
    shown = page.requests.while_current("a visitor", range(4))
    assert next(shown) == 0
    page._record_typing(REQUEST, *screen())
    assert next(shown) == 1
    page._record_typing(REQUEST, *screen(seed=1))
    assert list(shown) == []


def test_a_picture_is_restored_or_said_to_be_gone(page):
    visit, *_ = page._generate_and_keep(Session(), *screen(seed=7))
    assert page._restore(visit, SimpleNamespace(index=0)) == ("a red apple", 7, 1, 1)
    for index in (1, -1, None):
        with pytest.raises(gr.Error, match="no longer in the history"):
            page._restore(visit, SimpleNamespace(index=index))


def test_a_browser_that_comes_back_finds_its_pictures(page):
    visit, *_, shown, title = page._open([], Session(), *screen())
    assert len(visit.entries) == len(shown) == 1
    assert "M weights" in title
    visit, *_ = page._generate_and_keep(visit, *screen("red", seed=3))
    again, _, _, _, prompt, seed, *_ = page._open(pack(visit.entries), Session(), *screen())
    assert (prompt, seed, len(again.entries)) == ("red", 3, 2)


def test_a_file_that_is_no_style_is_told(page, tmp_path):
    (tmp_path / "cat.safetensors").write_bytes(b"no weights")
    with pytest.raises(gr.Error):
        page._add_style(Session(), *screen(), str(tmp_path / "cat.safetensors"))


def test_a_style_gets_a_slider(page, tmp_path):
    file = tmp_path / "shake.safetensors"
    weights = make_tiny_pipeline("flow").unet.state_dict()
    save_file({name: torch.full(weight.shape, 0.01) for name, weight in weights.items()}, file)
    visit, first, second, *_ = page._add_style(Session(), *screen(), str(file))
    assert len(visit.styles) == 1
    assert first.label == "shake"
    assert second == gr.skip()


def test_a_sketch_is_followed():
    pipeline = make_tiny_pipeline("flow")
    page = make_page(Studio(pipeline, controlnet=make_tiny_controlnet(pipeline.unet)))
    lines = json.dumps([[[0.1, 0.1], [0.9, 0.9]]])
    picture, _ = page._generate_from_sketch(Session(), *screen(), lines, 1.0)
    assert picture.size == page.studio.size()
    assert page._generate_from_sketch(Session(), *screen(), "", 1.0)[0] == gr.skip()
    assert page._generate_from_sketch(Session(), *screen(" "), lines, 1.0)[0] == gr.skip()
    with pytest.raises(gr.Error, match="A sketch is a list of lines"):
        page._generate_from_sketch(Session(), *screen(), "[3]", 1.0)


def test_the_page_is_laid_out(tmp_path):
    assert build_page(Studio(make_tiny_pipeline("flow")), [(tmp_path / "a.safetensors", 0.5)]).fns
    assert 0 < _free_port("127.0.0.1") < 2**16
