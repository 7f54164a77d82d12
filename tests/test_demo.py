"""The parts of the demo, without the page: requests, history, work that can be stopped, styles, the studio."""

import base64
import copy
import io
import json
import struct
import threading
import zlib
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rectified_diffusers.demo.markup import caption, comparison_caption, own_caption, seconds
from rectified_diffusers.demo.requests import MAX_CHARACTERS, OWN_STEPS, ImageRequest, comparison_with, cut_prompt
from rectified_diffusers.demo.session import (
    LENGTH,
    SLOTS,
    THUMBNAIL,
    Session,
    other_prompt,
    pack,
    remember,
    unpack,
    unread_remark,
)
from rectified_diffusers.demo.sketches import lines_of
from rectified_diffusers.demo.studio import Studio, _Watched, generate, with_controlnet
from rectified_diffusers.demo.styles import Styles, style_kind
from rectified_diffusers.demo.tasks import Requests, Stopped, watch
from rectified_diffusers.demo.worker import LoadingStudio
from tests.marks import slow_but
from tests.tiny import make_tiny_controlnet, make_tiny_pipeline

WAIT = 300  # seconds, for what happens in another thread


@pytest.fixture
def studio() -> Studio:
    return Studio(make_tiny_pipeline("flow"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """Return a LoRA file of a tiny pipeline."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = make_tiny_pipeline("flow")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    return (folder / "pytorch_lora_weights.safetensors").rename(folder / "wobble.safetensors")


@pytest.fixture(scope="module")
def delta(tmp_path_factory):
    """Return a plain delta file of a tiny pipeline's U-Net."""
    generator = torch.Generator().manual_seed(2)
    weights = make_tiny_pipeline("flow").unet.state_dict()
    file = tmp_path_factory.mktemp("delta") / "shake.safetensors"
    save_file({key: 0.1 * torch.randn(x.shape, generator=generator) for key, x in weights.items()}, file)
    return file


def pixels(generation) -> bytes:
    return generation.image.tobytes()


# ---------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "a" * (MAX_CHARACTERS + 1)}, "Shorten it"),
        ({"seed": -1}, "seed is a whole number"),
        ({"seed": 0.5}, "seed is a whole number"),
        ({"seed": None}, "seed is a whole number"),
        ({"steps": 0}, "steps is a whole number"),
        ({"steps": 10_000}, "steps is a whole number"),
        ({"guidance_scale": float("nan")}, "guidance scale is a number"),
        ({"guidance_scale": "7"}, "guidance scale is a number"),
        ({"styles": ((None, 50.0),)}, "scale of a style"),
    ],
)
def test_an_order_that_cannot_be_drawn_says_why(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageRequest(**{"prompt": "a fox", **settings})


def test_a_prompt_of_100_000_characters_is_cut_and_said_so():
    text, remark = cut_prompt("fox " * 25_000)
    assert len(text) == MAX_CHARACTERS
    assert remark == "Only the first 2,000 of 100,000 characters are read."
    assert cut_prompt("a fox") == ("a fox", "")
    with pytest.raises(TypeError, match="is a text"):
        cut_prompt(["a fox"])


# ---------------------------------------------------------------------------------------------- history


def test_history_is_newest_first_without_repetition_and_bounded():
    entries: list = []
    for seed in [*range(LENGTH + 5), 7]:
        entries = remember(entries, ImageRequest("a fox", seed), Image.new("RGB", (512, 256)))
    assert len(entries) == LENGTH
    assert [entry.request.seed for entry in entries[:3]] == [7, LENGTH + 4, LENGTH + 3]
    assert entries[0].thumbnail.size == (THUMBNAIL, THUMBNAIL // 2)


def test_history_comes_back_from_the_browser():
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    entries = remember(
        remember([], ImageRequest("a fox", 1), picture), ImageRequest('sun, „°"<b>', 2, 4, 1.5), picture
    )
    back = unpack(json.loads(json.dumps(pack(entries))))
    assert [entry.request for entry in back] == [entry.request for entry in entries]
    assert back[0].thumbnail.tobytes() == entries[0].thumbnail.tobytes()
    assert back[0].caption == 'sun, „°"<b> · seed 2, 4 steps'


def test_history_leaves_out_what_a_browser_made_up():
    good = pack(remember([], ImageRequest("a fox"), Image.new("RGB", (8, 8))))[0]
    large = io.BytesIO()
    Image.new("1", (THUMBNAIL + 1, 8)).save(large, format="PNG")
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    bad = [
        {**good, "seed": -1},
        {**good, "prompt": ["a"]},
        {**good, "steps": True},
        {**good, "thumbnail": "%"},
        {**good, "thumbnail": base64.b64encode(b"GIF89a").decode()},
        {**good, "thumbnail": base64.b64encode(large.getvalue()).decode()},
        {**good, "thumbnail": base64.b64encode(bomb).decode()},
        {**good, "thumbnail": good["thumbnail"][:40]},
        {"prompt": "a fox"},
        None,
        7,
    ]
    assert len(unpack([*bad, good])) == 1
    assert len(unpack([good] * 1000)) == LENGTH
    assert unpack(None) == unpack({"a": 1}) == unpack("text") == []


# ---------------------------------------------------------------------------------------------- background


def test_watch_yields_what_is_emitted_and_raises_its_error():
    def work(emit):
        emit(1)
        emit(2)
        raise KeyError("broken")

    items = watch(work)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(KeyError, match="broken"):
        next(items)


def test_closing_stops_the_work():
    ended, go_on = threading.Event(), threading.Event()

    def work(emit):
        try:
            emit(0)
            go_on.wait(WAIT)
            emit(1)
        except Stopped:
            ended.set()
            raise

    items = watch(work)
    assert next(items) == 0
    items.close()
    go_on.set()
    assert ended.wait(WAIT)


def test_a_newer_wish_ends_the_older_of_the_same_visitor():
    requests = Requests(visitors=3)
    requests.record("a")
    mine, other = requests.while_current("a", range(9)), requests.while_current("b", range(3))
    assert next(mine) == next(other) == 0
    requests.record("a")
    assert list(mine) == []
    assert list(other) == [1, 2]
    for visitor in "cdefgh":
        requests.record(visitor)
    assert len(requests._counts) == 3


# ---------------------------------------------------------------------------------------------- generation


def test_equal_orders_give_equal_pictures_and_a_file_that_says_them(studio):
    request = ImageRequest("a red apple", seed=3)
    first, other, again = (
        studio.generate(request),
        studio.generate(ImageRequest("a red apple", seed=4)),
        studio.generate(request),
    )
    assert pixels(first) == pixels(again) != pixels(other)
    assert first.done
    assert first.seconds > 0
    told = json.loads(first.image.info["rectified_diffusers"])
    assert told == {"prompt": "a red apple", "seed": 3, "steps": 1, "guidance_scale": 1.0, "styles": {}}


def test_comparison_shows_every_step_and_ends_with_the_picture(studio):
    generations = list(studio.compare(ImageRequest("a red apple", seed=3)))
    assert [generation.step for generation in generations] == [*range(1, OWN_STEPS), OWN_STEPS]
    assert pixels(generations[-1]) == pixels(studio.generate(ImageRequest("a red apple", seed=3, steps=OWN_STEPS)))
    assert any(generation.image is not None and not generation.done for generation in generations)
    assert studio.comparison.remark == "The image on the right is from the same model, with more steps."


def test_a_diffusion_teacher_draws_beside_with_its_own_steps_and_guidance():
    teacher = make_tiny_pipeline("diffusion")
    studio = Studio(make_tiny_pipeline("flow"), teacher=teacher, teacher_steps=5, teacher_guidance_scale=3.0)
    *_, last = studio.compare(ImageRequest("a red apple", seed=3))
    expected = generate(teacher, ImageRequest("a red apple", seed=3, steps=5, guidance_scale=3.0))
    assert (pixels(last), last.steps) == (pixels(expected), 5)
    assert studio.comparison.remark == ""


def test_stopping_a_comparison_frees_the_model(studio):
    generations = studio.compare(ImageRequest("a red apple"))
    next(generations)
    generations.close()
    assert studio.generate(ImageRequest("a red apple")).done  # would wait for ever if the comparison kept its turn


def test_a_watched_pipeline_is_the_pipeline_in_all_but_its_own():
    pipeline = make_tiny_pipeline()
    watched = _Watched(pipeline, lambda picture: None)
    assert watched.unet is pipeline.unet
    assert copy.copy(watched).unet is pipeline.unet  # a copy is asked for `__setstate__` before it has attributes
    assert not hasattr(watched, "_execution_device")


def test_morph_goes_from_one_picture_to_the_other(studio):
    start, end = ImageRequest("a red apple", seed=1), ImageRequest("red", seed=2)
    pictures = list(studio.morph(start, end, 4, loop=False))
    assert len(pictures) == 5
    assert pictures[0].tobytes() == pixels(studio.generate(start))
    assert pictures[-1].tobytes() == pixels(studio.generate(end))
    assert len(list(studio.morph(start, end, 3, loop=True))) == 6
    with pytest.raises(ValueError, match="number of frames is a whole number from 1 to 60"):
        studio.morph(start, end, 10**9, loop=True)


def test_what_the_text_encoder_has_no_room_for_is_named(studio):
    assert studio.unread("the red") == ""
    prompt = "red " * 80
    assert studio.unread(prompt).split() == ["red"] * (80 - 75)
    assert "red" in unread_remark(studio, prompt)
    assert unread_remark(studio, "red") == ""


def test_about_names_the_model(studio):
    assert studio.about().startswith("this model · ")
    assert "32×32 · cpu, float32" in studio.about()


# ---------------------------------------------------------------------------------------------- styles


def test_styles_are_worn_mixed_and_taken_off_bit_for_bit(studio, lora, delta):
    def drawn(*styles):
        return pixels(studio.generate(ImageRequest("a red apple", styles=styles)))

    plain = drawn()
    with_lora, with_delta = drawn((lora, 1.0)), drawn((delta, 1.0))
    both = drawn((delta, 1.0), (lora, 1.0))
    assert len({plain, with_lora, with_delta, both, drawn((lora, 0.5)), drawn((delta, -0.5))}) == 6
    assert drawn((lora, 0.0), (delta, 0)) == plain
    assert drawn((lora, 1.0)) == with_lora
    assert drawn((lora, 1.0), (delta, 1.0)) == both
    assert drawn() == plain


def test_kinds_of_styles(lora, delta, tmp_path):
    assert style_kind(lora) == "lora"
    assert style_kind(delta) == "delta"
    with pytest.raises(ValueError, match=r"a \.safetensors file, got 'model.ckpt'"):
        style_kind(tmp_path / "model.ckpt")
    (tmp_path / "torn.safetensors").write_bytes(delta.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        style_kind(tmp_path / "torn.safetensors")
    with pytest.raises(ValueError, match="Upload it again"):
        style_kind(tmp_path / "gone.safetensors")


def _foreign(tmp_path, kind):
    file = tmp_path / f"{kind}.safetensors"
    down, up = torch.ones(2, 7), torch.ones(7, 2)
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    if kind == "keys":
        save_file({"unet.nowhere.to_q.lora_A.weight": down, "unet.nowhere.to_q.lora_B.weight": up}, file)
    elif kind == "shapes":
        save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, file)
    elif kind == "nan":
        save_file({f"{layer}.lora_A.weight": down * torch.nan, f"{layer}.lora_B.weight": up}, file)
    else:
        save_file({"weight": down}, file)
    return file


@pytest.mark.parametrize("kind", slow_but(["nan", "delta"], ["keys", "shapes", "nan", "delta"]))
def test_a_file_for_another_model_is_refused_and_leaves_nothing_behind(studio, lora, delta, tmp_path, kind):
    plain = pixels(studio.generate(ImageRequest("a red apple")))
    worn = pixels(studio.generate(ImageRequest("a red apple", styles=((delta, 1.0), (lora, 1.0)))))
    with pytest.raises(ValueError, match="cannot be applied to this model"):
        studio.apply_styles(ImageRequest("a red apple", styles=((lora, 1.0), (_foreign(tmp_path, kind), 1.0))))
    assert pixels(studio.generate(ImageRequest("a red apple"))) == plain
    assert pixels(studio.generate(ImageRequest("a red apple", styles=((delta, 1.0), (lora, 1.0))))) == worn


def test_only_a_few_loras_stay_loaded(lora, tmp_path, monkeypatch):
    monkeypatch.setattr("rectified_diffusers.demo.styles.MAX_LOADED", 2)
    pipeline = make_tiny_pipeline("flow")
    styles = Styles(pipeline)
    for i in range(4):
        file = tmp_path / f"{i}.safetensors"
        file.write_bytes(lora.read_bytes())
        styles.apply([(file, 1.0)])
        assert sum(map(len, pipeline.get_list_adapters().values())) <= 2


# ---------------------------------------------------------------------------------------------- waiting


def coming(studio: Future[Studio]) -> LoadingStudio:
    return LoadingStudio("a model", comparison_with(True, 5, 3.0), studio, can_sketch=False)


def test_a_studio_is_waited_for():
    future: Future[Studio] = Future()
    studio, request, pictures = coming(future), ImageRequest("a red apple"), []
    waiting = threading.Thread(target=lambda: pictures.append(studio.generate(request)), daemon=True)
    waiting.start()
    assert studio.about() == "a model · loading"
    assert studio.comparison.steps == 5
    made = Studio(make_tiny_pipeline("flow"))
    future.set_result(made)
    waiting.join(WAIT)
    assert pixels(pictures[0]) == pixels(made.generate(request))
    assert studio.about() == made.about()


def test_who_waits_for_a_studio_that_fails_is_told():
    future: Future[Studio] = Future()
    studio, errors = coming(future), []

    def wait() -> None:
        try:
            studio.generate(ImageRequest("a red apple"))
        except OSError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    future.set_exception(OSError("no weights"))
    waiting.join(WAIT)
    assert errors == ["no weights"]
    with pytest.raises(AttributeError, match="_private"):
        _ = studio._private


# ---------------------------------------------------------------------------------------------- sketches


def test_lines_are_white_on_black_in_the_size_of_the_picture():
    picture = np.asarray(lines_of(json.dumps([[[0, 0.5], [1, 0.5]]]), (64, 32)))
    assert picture.shape == (32, 64, 3)
    assert set(np.unique(picture)) == {0, 255}
    assert (picture[:, :, 0] == 255).sum() == 64  # one pixel high, from edge to edge
    assert np.asarray(lines_of(json.dumps([[[0.5, 0.5]]]), (64, 64))).any()  # a dot
    assert lines_of("", (64, 64)) is lines_of(None, (64, 64)) is lines_of("[]", (64, 64)) is None


@pytest.mark.parametrize(
    "sketch",
    [
        "{",
        "7",
        "[7]",
        "[[7]]",
        "[[[0.5]]]",
        "[[[0, 2]]]",
        "[[[0, NaN]]]",
        '[[["a", 0]]]',
        pytest.param("[" * 100_000, id="deep"),
        pytest.param("[[[0,0],[0,0]]" + ",[]" * 60_000 + "]", id="long"),
    ],
)
def test_what_is_no_sketch_is_refused(sketch):
    with pytest.raises(ValueError, match="A sketch is a list of lines"):
        lines_of(sketch, (64, 64))


def test_the_picture_follows_the_lines():
    pipeline = make_tiny_pipeline("flow")
    studio = Studio(pipeline, controlnet=make_tiny_controlnet(pipeline.unet))
    lines = lines_of("[[[0.1, 0.1], [0.9, 0.9]]]", studio.size())
    request = ImageRequest("a red apple")
    followed, loosely = (
        studio.generate_from_sketch(request, lines, 1.0),
        studio.generate_from_sketch(request, lines, 0.0),
    )
    assert pixels(followed) != pixels(loosely)
    assert pixels(loosely) == pixels(studio.generate(request))


def test_sketches_need_a_controlnet_and_a_model_of_ours(studio):
    assert not studio.can_sketch
    with pytest.raises(ValueError, match="--controlnet"):
        studio.generate_from_sketch(ImageRequest("a fox"), Image.new("RGB", (32, 32)), 1.0)
    diffusion = make_tiny_pipeline("diffusion")
    with pytest.raises(ValueError, match="got StableDiffusionPipeline"):
        with_controlnet(diffusion, make_tiny_controlnet(diffusion.unet))


# ---------------------------------------------------------------------------------------------- a visit


def test_a_visit_has_room_for_a_few_styles(lora, tmp_path):
    visit = Session().add_style(lora).add_style(str(lora))
    assert visit.styles == (lora,)
    for i in range(SLOTS - 1):
        visit = visit.add_style(tmp_path / f"{i}.safetensors")
    with pytest.raises(ValueError, match="room for 6 styles"):
        visit.add_style(tmp_path / "more.safetensors")
    request, remark = Session(styles=(lora,)).request("a fox", 1, 2, 1.5, 0.5, 1, 1, 1, 1, 1)
    assert (request, remark) == (ImageRequest("a fox", 1, 2, 1.5, ((lora, 0.5),)), "")


def test_only_what_was_asked_for_is_kept(studio):
    request = ImageRequest("a fox")
    generation = studio.generate(request)
    assert Session().with_generation(request, generation, keep=False).entries == ()
    visit = Session().with_generation(request, generation, keep=True)
    assert [entry.request for entry in visit.entries] == [request]
    assert visit.own_seconds == generation.seconds
    assert other_prompt("a red apple") != "a red apple"


def test_captions_escape_what_visitors_write(studio):
    assert seconds(0.0784) == "78 ms"
    assert seconds(1.94) == "1.9 s"
    assert "<b>One step</b>" in own_caption(studio.generate(ImageRequest("<script>")))
    assert "<script>" not in caption("<script>", "<script>", tooltip="<script>")
    beside = studio.comparison
    *_, last = studio.compare(ImageRequest("a fox"))
    assert "× as long" in comparison_caption(beside, last, own_seconds=0.01)
    assert "press Enter" in comparison_caption(beside)
