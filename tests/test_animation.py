"""Great circles, the pictures along them, the files they are written to, and the command."""

import builtins
import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rectified_diffusers import cli
from rectified_diffusers.cli import interpolate as command
from rectified_diffusers.editing.animation import save_animation
from rectified_diffusers.editing.interpolation import check_keys, interpolate, slerp
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
from tests.tiny import make_tiny_pipeline, make_xl_components

SIZE = 32  # pixels of the tiny pipeline's pictures


@pytest.fixture(scope="module")
def pipeline():
    return make_tiny_pipeline("flow")


@pytest.fixture(scope="module")
def model(tmp_path_factory, pipeline) -> str:
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------------------------------------- slerp


def pair(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 4, 4, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 2**31), weight=st.floats(0, 1), scale=st.floats(0.1, 10))
def test_slerp_goes_linearly_in_norm_and_evenly_in_angle(seed, weight, scale):
    start, end = pair(seed)
    end = end * scale
    between = slerp(start, end, weight, dim=(1, 2, 3))
    norms = [x.flatten(1).norm(dim=1) for x in (start, between, end)]
    torch.testing.assert_close(norms[1], (1 - weight) * norms[0] + weight * norms[2])

    def angle(a, b):
        a, b = (torch.nn.functional.normalize(x.flatten(1)) for x in (a, b))
        return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))

    torch.testing.assert_close(angle(start, between), weight * angle(start, end), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(angle(between, end), (1 - weight) * angle(start, end), atol=1e-9, rtol=1e-7)


@given(seed=st.integers(0, 2**31), weight=st.floats(0, 1))
def test_slerp_is_the_same_from_either_end(seed, weight):
    start, end = pair(seed)
    torch.testing.assert_close(slerp(start, end, weight), slerp(end, start, 1 - weight))


def test_slerp_keeps_the_norm_of_noise_where_a_straight_line_loses_it():
    start, end = torch.randn(2, 1, 4, 64, 64).unbind()
    middle = slerp(start, end, 0.5, dim=(1, 2, 3))
    assert middle.std().item() == pytest.approx(1, abs=0.02)
    assert ((start + end) / 2).std().item() == pytest.approx(0.5**0.5, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_slerp_ends_at_its_ends_bit_for_bit(dtype):
    start, end = pair(0, dtype)
    assert torch.equal(slerp(start, end, 0), start)
    assert torch.equal(slerp(start, end, 1), end)
    assert slerp(start, end, 0.5).dtype == dtype


def test_slerp_along_one_direction_is_a_straight_line():
    start = pair(0)[0]
    for factor in (0.0, 1.0, 1 + 1e-9, 3.0):  # zeros as Stable Diffusion XL's embedding of no negative prompt
        torch.testing.assert_close(slerp(start, factor * start, 0.3), (0.7 + 0.3 * factor) * start)
    nearly = start + 1e-5 * pair(1)[0]
    torch.testing.assert_close(slerp(start, nearly, 0.3), 0.7 * start + 0.3 * nearly)
    assert not slerp(0 * start, 0 * start, 0.3).any()


def test_slerp_refuses():
    start, end = pair(0)
    with pytest.raises(ValueError, match=r"one shape, got \(4, 4, 4, 4\) and \(4, 4, 4\)"):
        slerp(start, end[0], 0.5)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        slerp(start, end, 1.5)
    with pytest.raises(ValueError, match="opposite vectors"):
        slerp(start, -start, 0.5)


# ---------------------------------------------------------------------------------------------- interpolate


def drawn(pipeline, prompt: str, seed: int, **arguments) -> np.ndarray:
    return np.asarray(pipeline(prompt, generator=torch.Generator().manual_seed(seed), **arguments).images[0])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_inference_steps": 2, "guidance_scale": 2.0, "negative_prompt": "red", "height": 64, "width": 48}],
    ids=["one step", "guided"],
)
def test_the_keys_are_the_pictures_of_the_pipeline(pipeline, arguments):
    images = interpolate(pipeline, ["a fox", "an owl"], [3, 4], frames=2, progress=False, **arguments)
    assert len(images) == 3
    first, middle, last = map(np.asarray, images)
    np.testing.assert_array_equal(first, drawn(pipeline, "a fox", 3, **arguments))
    np.testing.assert_array_equal(last, drawn(pipeline, "an owl", 4, **arguments))
    assert (middle != first).any()
    assert (middle != last).any()


def test_what_is_single_is_held(pipeline):
    by_seed = interpolate(pipeline, "a fox", [3, 4], frames=1, progress=False)
    np.testing.assert_array_equal(by_seed[1], drawn(pipeline, "a fox", 4))
    by_prompt = interpolate(pipeline, ["a fox", "an owl"], 3, frames=1, progress=False)
    np.testing.assert_array_equal(by_prompt[1], drawn(pipeline, "an owl", 3))


def test_a_loop_goes_back_to_where_it_began(pipeline):
    loop = interpolate(pipeline, "a fox", [0, 1, 2], frames=2, loop=True, progress=False)
    assert len(loop) == 6
    back = interpolate(pipeline, "a fox", [2, 0], frames=2, progress=False)
    np.testing.assert_array_equal(loop[5], back[1])
    np.testing.assert_array_equal(loop[0], back[2])


def test_neighbours_are_nearer_than_keys(pipeline):
    images = np.stack([*interpolate(pipeline, ["a fox", "an owl"], [0, 1], 8, progress=False)]).astype(float)
    steps = np.abs(np.diff(images, axis=0)).mean(axis=(1, 2, 3))
    assert steps.max() < np.abs(images[-1] - images[0]).mean() / 2


def test_the_pipeline_is_left_as_it_was(pipeline):
    before = dict(pipeline._progress_bar_config)
    interpolate(pipeline, "a fox", [0, 1], 1, progress=False)
    assert pipeline._progress_bar_config == before


def test_stable_diffusion_xl_has_its_pooled_embeddings_turned_too():
    pipeline = StableDiffusionXLPipeline(**make_xl_components(), scheduler=RectifiedFlowEulerScheduler())
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 1, "guidance_scale": 2.0}
    images = interpolate(pipeline, ["a fox", "an owl"], [3, 4], frames=2, progress=False, **arguments)
    np.testing.assert_array_equal(images[0], drawn(pipeline, "a fox", 3, **arguments))
    np.testing.assert_array_equal(images[2], drawn(pipeline, "an owl", 4, **arguments))


@pytest.mark.parametrize(
    ("prompts", "seeds", "frames", "message"),
    [
        ("a fox", 0, 2, "got 1 prompts and 1 seeds"),
        ([], [], 2, "got 0 prompts and 0 seeds"),
        (["a", "b", "c"], [0, 1], 2, "got 3 prompts and 2 seeds"),
        (["a", "b"], [], 2, "got 2 prompts and 0 seeds"),
        ("a", [0, -1], 2, "a seed must be at least 0, got -1"),
        ("a", [0, 1], 0, "frames must be at least 1, got 0"),
    ],
)
def test_interpolate_refuses(pipeline, prompts, seeds, frames, message):
    with pytest.raises(ValueError, match=message):
        interpolate(pipeline, prompts, seeds, frames)


def test_interpolate_refuses_a_size_that_is_no_whole_number_of_latents(pipeline):
    with pytest.raises(ValueError, match="width must be a multiple of 4 for this VAE, got 33"):
        interpolate(pipeline, "a fox", [0, 1], width=33)


def test_check_keys_pairs_them():
    assert check_keys("a", [1, 2]) == [("a", 1), ("a", 2)]
    assert check_keys(["a", "b"], [1, 2]) == [("a", 1), ("b", 2)]


# ---------------------------------------------------------------------------------------------- files


def colours(count: int, size: tuple[int, int] = (34, 18)) -> list[Image.Image]:
    return [Image.new("RGB", size, (40 * i + 20, 128, 235 - 40 * i)) for i in range(count)]


def test_a_gif_has_every_picture_for_its_time_and_repeats(tmp_path):
    images = colours(4)
    save_animation(images, tmp_path / "a.gif", frames_per_second=15)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 4
        assert gif.info["loop"] == 0
        for i, image in enumerate(images):
            gif.seek(i)
            assert gif.info["duration"] == 70  # the nearest to 1000 / 15 that a GIF can say
            assert np.abs(np.asarray(gif.convert("RGB"), dtype=int) - np.asarray(image)).max() <= 4


def test_an_mp4_has_every_picture(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    images = colours(4)
    save_animation(images, tmp_path / "a.mp4", frames_per_second=12.5)
    frames = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    about = next(frames)
    assert (about["size"], about["fps"], about["codec"]) == ((34, 18), 12.5, "h264")  # no stretching to blocks of 16
    seen = [np.frombuffer(frame, np.uint8).reshape(18, 34, 3) for frame in frames]
    assert len(seen) == 4
    for frame, image in zip(seen, images, strict=True):
        assert np.abs(frame.astype(int) - np.asarray(image)).mean() < 10


def test_save_animation_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"a .gif or an .mp4, got 'a.png'"):
        save_animation(colours(2), tmp_path / "a.png")
    with pytest.raises(ValueError, match="images of one size, got sizes"):
        save_animation([*colours(1), *colours(1, (8, 8))], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="images of one size"):
        save_animation([], tmp_path / "a.gif")
    for speed in (0, 51, math.nan):
        with pytest.raises(ValueError, match="frames_per_second must be in"):
            save_animation(colours(2), tmp_path / "a.gif", speed)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_ffmpeg(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "imageio_ffmpeg":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)


def test_without_ffmpeg_the_error_says_what_to_install(tmp_path, no_ffmpeg):
    with pytest.raises(ImportError, match=r"pip install \"rectified_diffusers\[video\]\"; or write a .gif"):
        save_animation(colours(2), tmp_path / "a.mp4")


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_writes_an_animation_and_a_contact_sheet(model, tmp_path, capsys):
    gif, sheet = tmp_path / "a.gif", tmp_path / "a.png"
    given_ = ["interpolate", "a fox", "an owl", "--seeds", "0", "1", "--frames", "3", "--loop", "--columns", "3"]
    assert cli.main([*given_, "-o", str(gif), "-o", str(sheet), "--model", model, "--device", "cpu"]) == 0
    with Image.open(gif) as animation:
        assert animation.n_frames == 6
    with Image.open(sheet) as picture:
        assert picture.size == (3 * SIZE, 2 * SIZE)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [f"{gif}: 6 images", f"{sheet}: 6 images"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a fox"], "got 1 prompts and 1 seeds"),
        (["a", "b", "--seeds", "1", "2", "3"], "got 2 prompts and 3 seeds"),
        (["a", " "], "a prompt is empty"),
        (["a", "b", "--frames", "0"], "--frames must be at least 1, got 0"),
        (["a", "b", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["a", "b", "--fps", "0"], "--fps must be above 0"),
        (["a", "b", "--guidance-scale", "nan"], "--guidance-scale must be finite"),
        (["a", "b", "--negative-prompt", "red"], "--negative-prompt has no effect without guidance"),
        (["a", "b", "-o", "a.xyz"], "cannot write an image with the suffix '.xyz'"),
        (["a", "b", "-o", "no/a.mp4"], "does not exist; make it first"),
        (["a", "b", "-o", "."], "is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_command_refuses_before_the_work(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load_pipeline", lambda *_: pytest.fail("the arguments come first"))
    assert cli.main(["interpolate", *arguments, "-o", "a.gif"]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_an_mp4_that_cannot_be_written(tmp_path, no_ffmpeg, capsys):
    (tmp_path / "folder.mp4").mkdir()
    assert cli.main(["interpolate", "a", "b", "-o", str(tmp_path / "a.mp4")]) == 2
    assert 'pip install "rectified_diffusers[video]"' in capsys.readouterr().err


def test_the_command_refuses_an_mp4_that_is_a_folder(tmp_path, capsys):
    pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "folder.mp4").mkdir()
    assert cli.main(["interpolate", "a", "b", "-o", str(tmp_path / "folder.mp4")]) == 2
    assert "is a folder; give the name of a file" in capsys.readouterr().err
