"""Between pipelines (`from_pipe`), from one file in the original layout (`from_single_file`), and what is damaged."""

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

from rectified_diffusers import (
    RectifiedFlowEulerScheduler,
    RectifiedFlowImg2ImgPipeline,
    RectifiedFlowInpaintPipeline,
    RectifiedFlowPipeline,
)
from rectified_diffusers.loading.errors import _NETWORK, dtype_option, remedies
from tests.hub.client import sample
from tests.original_layout import original_layout
from tests.tiny import make_components, make_tiny_pipeline
from tests.tiny_inputs import settings


@pytest.fixture(scope="module")
def ours():
    return make_tiny_pipeline("flow")


@pytest.fixture(scope="module")
def single_file(ours, tmp_path_factory):
    """One file, as people share fine-tunes of InstaFlow, and a folder that has only the settings, not the weights."""
    folder = tmp_path_factory.mktemp("single")
    save_file(original_layout(ours), folder / "flow.safetensors")
    stock = StableDiffusionPipeline(**make_components(), scheduler=PNDMScheduler(steps_offset=1, skip_prk_steps=True))
    stock.save_pretrained(folder / "settings")
    for weights in (folder / "settings").rglob("*.safetensors"):
        weights.unlink()
    return folder / "flow.safetensors", folder / "settings"


# One file


def from_single_file(pipeline_class: Any, single_file: tuple[Path, Path], **arguments: Any) -> Any:
    file, settings = single_file
    return pipeline_class.from_single_file(
        str(file), config=str(settings), local_files_only=True, safety_checker=None, **arguments
    )


def test_a_single_file_gives_the_same_pictures(single_file, ours, caplog):
    with caplog.at_level(logging.INFO, logger="rectified_diffusers"):
        loaded = from_single_file(RectifiedFlowPipeline, single_file)
    assert type(loaded) is RectifiedFlowPipeline
    assert type(loaded.scheduler) is RectifiedFlowEulerScheduler
    assert "The checkpoint's PNDMScheduler is a diffusion scheduler" in caplog.text
    for name in ("unet", "vae", "text_encoder"):
        theirs, mine = getattr(loaded, name).state_dict(), getattr(ours, name).state_dict()
        assert theirs.keys() == mine.keys()
        assert all(torch.equal(theirs[key], mine[key]) for key in mine)
    # Not to the bit: weights mapped from one file lie at other addresses, and kernels chosen by those round otherwise.
    torch.testing.assert_close(sample(loaded), sample(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pipeline_class", [RectifiedFlowImg2ImgPipeline, RectifiedFlowInpaintPipeline])
def test_a_single_file_for_other_tasks(single_file, pipeline_class):
    loaded = from_single_file(pipeline_class, single_file)
    assert type(loaded) is pipeline_class
    assert type(loaded.scheduler) is RectifiedFlowEulerScheduler


def test_a_single_file_with_a_passed_scheduler(single_file):
    scheduler = RectifiedFlowEulerScheduler(shift=2.0)
    assert from_single_file(RectifiedFlowPipeline, single_file, scheduler=scheduler).scheduler is scheduler
    with pytest.raises(ValueError, match="got DDIMScheduler"):
        from_single_file(RectifiedFlowPipeline, single_file, scheduler=DDIMScheduler(steps_offset=1))


def test_a_single_file_by_the_stock_pipeline_needs_our_scheduler_passed(single_file, ours):
    stock = from_single_file(StableDiffusionPipeline, single_file)
    assert type(stock.scheduler) is PNDMScheduler  # the trap
    stock = from_single_file(StableDiffusionPipeline, single_file, scheduler=RectifiedFlowEulerScheduler())
    torch.testing.assert_close(sample(stock), sample(ours), rtol=1e-4, atol=1e-4)


# From pipe


def test_from_pipe_and_back_share_everything_but_the_scheduler():
    stock = make_tiny_pipeline("diffusion")
    ours = RectifiedFlowPipeline.from_pipe(stock)
    back = StableDiffusionPipeline.from_pipe(ours, scheduler=stock.scheduler)
    for name, component in stock.components.items():
        assert (getattr(ours, name) is component) == (name != "scheduler"), name
        assert getattr(back, name) is component, name
    assert not ours.config.requires_safety_checker
    assert not back.config.requires_safety_checker
    arguments: dict[str, Any] = {"guidance_scale": 5.0, "num_inference_steps": 3}
    assert torch.equal(sample(back, **arguments), sample(stock, **arguments))
    assert not torch.equal(sample(ours, **arguments), sample(stock, **arguments))


def test_from_pipe_back_without_a_scheduler_goes_on_as_a_flow():
    """diffusers carries the scheduler over: whoever wants the diffusion back passes its scheduler, as above."""
    stock = make_tiny_pipeline("diffusion")
    back = StableDiffusionPipeline.from_pipe(RectifiedFlowPipeline.from_pipe(stock))
    assert type(back.scheduler) is RectifiedFlowEulerScheduler


def test_from_pipe_keeps_our_settings_over_every_task():
    scheduler = RectifiedFlowEulerScheduler(shift=2.0)
    ours = RectifiedFlowPipeline(**make_components(), scheduler=scheduler)
    tour = RectifiedFlowPipeline.from_pipe(
        RectifiedFlowInpaintPipeline.from_pipe(RectifiedFlowImg2ImgPipeline.from_pipe(ours))
    )
    assert settings(tour.scheduler) == settings(scheduler)
    assert torch.equal(sample(tour), sample(ours))


# Damage in a folder; the Hub's cache has its tests beside the Hub


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("length", [0, 7, 1000])
def test_a_damaged_file_in_a_folder_is_named(ours, tmp_path, name, length):
    ours.save_pretrained(tmp_path)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(OSError, match=r"cannot be read: .* or copy the complete folder again") as error:
        RectifiedFlowPipeline.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(file))
    assert error.value.__cause__ is not None


def test_a_variant_missing_from_a_folder_and_one_that_is_there(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`variant=fp16`, but .* has none.*Leave variant out"):
        RectifiedFlowPipeline.from_pretrained(tmp_path, variant="fp16")
    half = make_tiny_pipeline("flow").to(dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    loaded = RectifiedFlowPipeline.from_pretrained(tmp_path, variant="fp16").to(torch.float16)
    assert loaded.unet.dtype == torch.float16
    half = RectifiedFlowPipeline.from_pretrained(tmp_path).to(torch.float16)  # the remedy
    assert torch.equal(half.unet.conv_in.weight, loaded.unet.conv_in.weight)


def test_other_errors_stay_what_they_are(ours, tmp_path):
    for error in (ValueError("of something else"), FileNotFoundError(2, "gone"), RuntimeError()):
        with pytest.raises(type(error)) as raised, remedies(tmp_path, variant="fp16"):
            raise error
        assert raised.value is error
    with pytest.raises(ValueError, match="nor a valid repo id"):
        RectifiedFlowPipeline.from_pretrained(os.fspath(tmp_path / "a" / "b"))
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got FlowMatchEulerDiscreteScheduler"):
        RectifiedFlowPipeline.from_pretrained(tmp_path, scheduler=FlowMatchEulerDiscreteScheduler())


def test_a_half_precision_folder_is_loaded_in_float32_throughout_unless_asked(tmp_path):
    make_tiny_pipeline("flow").to(torch.float16).save_pretrained(tmp_path)
    pipeline = RectifiedFlowPipeline.from_pretrained(tmp_path)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    assert sample(pipeline).dtype == torch.float32
    half = RectifiedFlowPipeline.from_pretrained(tmp_path, **dtype_option(torch.float16))
    assert {part.dtype for part in (half.unet, half.vae, half.text_encoder)} == {torch.float16}


def test_a_model_that_is_nowhere_says_how_to_bring_it(tmp_path):
    """diffusers' own text speaks of "the stacktrace above"; the tests' process is offline."""
    with pytest.raises(ConnectionError, match=r"the Hub cannot be reached .* hf download somebody/flow --local-dir"):
        RectifiedFlowPipeline.from_pretrained("somebody/flow", cache_dir=tmp_path)


# What comes from the Hub; through its client, the same is tested beside the Hub


@pytest.mark.parametrize("right", [hashlib.sha1(b"blob 2\0{}"), hashlib.sha256(b"{}")], ids=["git", "sha256"])
@pytest.mark.parametrize("error", [None, OSError("no JSON"), TypeError("no number")], ids=repr)
def test_what_came_into_the_cache_is_compared_with_its_name(tmp_path, right, error):
    """Whether or not the load itself stumbled over it."""
    blob = tmp_path / "models--a--b" / "blobs" / right.hexdigest()
    file = tmp_path / "models--a--b" / "snapshots" / "0" / "unet" / "config.json"
    for path in (blob, file):
        path.parent.mkdir(parents=True)

    def load(content):
        with remedies("a/b", cache_dir=tmp_path):
            if content is not None:
                blob.write_bytes(content)
                file.symlink_to(blob)
            if error is not None:
                raise error

    words = r"a/b: unet/config.json was damaged in the download.*deleted from the cache: load again"
    with pytest.raises(OSError, match=words):
        load(b"[]")
    assert not blob.exists()
    assert not file.is_symlink()
    for content in (b"{}", None):
        with contextlib.suppress(OSError, ValueError):
            load(content)
        assert file.exists()
        blob.write_bytes(b"[]")  # by the user's own hand: what is there before a call was compared when it came
    with contextlib.suppress(OSError, ValueError):
        load(None)
    assert file.exists()


def test_an_error_of_the_network_names_what_was_asked_for():
    words = r"a/b could not be fetched: \w+: cut off\. Load it again later"
    with pytest.raises(ConnectionError, match=words), remedies("a/b"):
        raise _NETWORK[-1]("cut off")


def test_pickles_on_the_hub_are_named(tmp_path):
    listed = "Could not find the necessary `safetensors` weights in {'unet/model.bin', 'vae/model.safetensors'}"
    words = r"a/b has weights as pickles \(unet/model\.bin\).*DiffusionPipeline"
    with pytest.raises(OSError, match=words), remedies("a/b", cache_dir=tmp_path):
        raise OSError(listed)


def test_a_runtime_error_of_the_machine_stays_what_it_is(tmp_path):
    error = RuntimeError("CUDA error: the launch timed out")
    with pytest.raises(RuntimeError) as raised, remedies(tmp_path):
        raise error
    assert raised.value is error
    words = r"of another type or size than expected .*size mismatch for conv_in"
    with pytest.raises(ValueError, match=words), remedies(tmp_path):
        raise RuntimeError("size mismatch for conv_in")
