"""The checks of both kinds of options, and that options cost no import of torch."""

import subprocess
import sys

import pytest

from rectified_diffusers.data.config import RealTripletConfig, TripletConfig


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("num_triplets", 0, "at least 1, got 0"),
        ("num_inference_steps", 0, "at least 1"),
        ("batch_size", -1, "at least 1, got -1"),
        ("triplets_per_shard", 0, "at least 1"),
        ("height", 0, "at least 1 pixel"),
        ("width", -8, "at least 1 pixel"),
        ("seed", -1, "at least 0"),
        ("guidance_scale", float("nan"), "finite"),
        ("guidance_scale", -1.0, "finite number of at least 0"),
        ("solver", "dpm", "one of 'auto', 'teacher', 'dpm_solver\\+\\+', 'DDIMScheduler', .*, got 'dpm'"),
        ("solver", "DDPMScheduler", "'UniPCMultistepScheduler', .*, got 'DDPMScheduler'"),
        ("storage_dtype", "fp16", "one of 'float16', 'bfloat16', 'float32', got 'fp16'"),
    ],
)
def test_wrong_values_raise(name, value, match):
    with pytest.raises(ValueError, match=f"{name} must be.*{match}"):
        TripletConfig(**{"num_triplets": 1, name: value})


def test_no_guidance_at_all_is_a_guidance():
    assert TripletConfig(num_triplets=1, guidance_scale=0.0).guidance_scale == 0


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("num_triplets", 0, "at least 1, got 0"),
        ("seed", -1, "at least 0, got -1"),
        ("inversion_time", 0.0, r"in \(0, 1\], got 0\.0"),
        ("inversion_time", -0.5, r"in \(0, 1\], got -0\.5"),
        ("inversion_time", 1.5, r"in \(0, 1\], got 1\.5"),
        ("inversion_time", float("nan"), r"in \(0, 1\], got nan"),
        ("size", 0, "at least 1 pixel or none, got 0"),
        ("num_inference_steps", -1, "at least 0, got -1"),
    ],
)
def test_wrong_values_for_real_pictures_raise(name, value, match):
    with pytest.raises(ValueError, match=f"{name} must be {match}"):
        RealTripletConfig(**{"num_triplets": 1, name: value})


def test_the_ends_of_a_range_belong_to_it():
    generated = TripletConfig(num_triplets=1, height=1, width=1, seed=0)
    assert (generated.height, generated.width) == (1, 1)
    real = RealTripletConfig(num_triplets=1, inversion_time=1.0, size=1)
    assert (real.inversion_time, real.size) == (1, 1)


def test_the_number_of_triplets_has_no_default():
    with pytest.raises(TypeError, match="num_triplets"):
        TripletConfig()  # pyright: ignore[reportCallIssue]


def test_options_and_prompts_import_no_torch():
    code = (
        "import sys, rectified_diffusers.data.config, rectified_diffusers.data.prompts\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
