"""Our scheduler takes the place of the stock one in every family: the same images, also after saving and loading."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from rectified_diffusers import RectifiedFlowEulerScheduler
from rectified_diffusers.flow.ode import euler
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.self_test import self_test
from tests.marks import slow_but
from tests.models_any.families import FLOWS, build
from tests.models_any.made_up import make_made_up_pipeline
from tests.tiny import make_tiny_pipeline

STEPS = (1, 2, 4, 8)
MULTISTEP = ("sana_multistep", "wan_multistep")
FAST = ("sd3", "ovis_image", "cogview4", "ltx_video")
EULER = slow_but(FAST, [name for name in FLOWS if name not in MULTISTEP])


def make_image(pipeline: Any, options: dict[str, Any], steps: int) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    arguments = {"num_inference_steps": steps, "generator": generator, "output_type": "np", **options}
    return np.asarray(pipeline(prompt="a red apple", **arguments)[0])


def shifted(scheduler: Any) -> Any:
    """Return the scheduler as families publish it: with a shift, or one that depends on the image size."""
    if "shift" in scheduler.config and not scheduler.config.get("use_dynamic_shifting"):
        return type(scheduler).from_config(scheduler.config, shift=2.5)
    return scheduler


@pytest.mark.parametrize("name", EULER)
def test_images_equal_those_of_the_stock_scheduler(name: str, tmp_path: Path) -> None:
    pipeline, options = build(name)
    pipeline.scheduler = shifted(pipeline.scheduler)
    expected = [make_image(pipeline, options, steps) for steps in STEPS]
    pipeline.scheduler = RectifiedFlowEulerScheduler.for_pipeline(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = type(pipeline).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is RectifiedFlowEulerScheduler
    for steps, image in zip(STEPS, expected, strict=True):
        for ours in (pipeline, loaded):
            found = make_image(ours, options, steps)
            assert np.linalg.norm(found - image) <= 1e-5 * np.linalg.norm(image)


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_multistep_solver_becomes_euler_steps_with_its_shift(name: str) -> None:
    pipeline, options = build(name)
    pipeline.scheduler = RectifiedFlowEulerScheduler.for_pipeline(pipeline)
    assert pipeline.scheduler.config["shift"] == 3
    pipeline.scheduler.set_timesteps(4)
    uniform = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(pipeline.scheduler.sigmas, 3 * uniform / (1 + 2 * uniform))
    assert self_test(PipelineDenoiser(pipeline, options=options)).euler == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", slow_but(["sd3", "ovis_image"], FLOWS))
def test_uniform_steps_are_those_of_training(name: str) -> None:
    pipeline, options = build(name)
    pipeline.set_progress_bar_config(disable=True)
    stock, pipeline.scheduler = pipeline.scheduler, shifted(pipeline.scheduler)
    pipeline.scheduler = RectifiedFlowEulerScheduler.for_pipeline(pipeline, uniform=True)
    if name == "cogview4":  # its timesteps are those of its shift
        with pytest.raises(ValueError, match="Pass timesteps or sigmas, not both"):
            make_image(pipeline, options, 2)
        return
    denoiser = PipelineDenoiser(pipeline, options=options)
    noise = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = denoiser.encode(["a red apple"], "cpu")
    place, off = denoiser.calibration.noise_place, denoiser.guidance_arguments
    for steps in (1, 2, 5):
        with torch.no_grad():
            expected = euler(lambda x, t: denoiser.velocity(denoiser.network, x, t, conditioning), noise, steps)
        found = denoiser.call.run(["a red apple"], steps, off, noise=(noise, place)).steps[-1].result
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    pipeline.scheduler = stock
    again = PipelineDenoiser(pipeline, options=options)
    x, t = torch.randn(1, *denoiser.latent_shape), torch.tensor([0.4])
    with torch.no_grad():
        one, two = (part.velocity(part.network, x, t, conditioning) for part in (denoiser, again))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


GRIDS = [
    dict(zip(("shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal", "invert_sigmas"), c, strict=True))
    for c in itertools.product((1.0, 3.0), (False, True), ("exponential", "linear"), (None, 0.1), (False, True))
]


@pytest.mark.parametrize("settings", GRIDS, ids=lambda s: " ".join(map(str, s.values())))
def test_the_grid_is_that_of_flow_match_euler(settings: dict[str, Any], tmp_path: Path) -> None:
    """For every setting and everything that pipelines pass to set_timesteps; one terminal step is finite here."""
    pipeline: Any = make_made_up_pipeline()
    stock: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, **settings)
    pipeline.scheduler = stock
    RectifiedFlowEulerScheduler.for_pipeline(pipeline).save_pretrained(tmp_path)
    loaded = RectifiedFlowEulerScheduler.from_pretrained(tmp_path)
    for ours in (RectifiedFlowEulerScheduler.for_pipeline(pipeline), loaded):
        for steps in (2, 5):
            sigmas, mu = np.linspace(1, 1 / steps, steps).tolist(), {"mu": 0.7}
            timesteps = [float(int(value)) for value in np.linspace(500, 1, steps)]
            given = [mu, {**mu, "sigmas": sigmas}, {**mu, "sigmas": sigmas, "timesteps": timesteps}]
            for arguments in given if settings["use_dynamic_shifting"] else [{}, {"sigmas": sigmas}, *given]:
                for scheduler in (stock, ours):
                    scheduler.set_timesteps(steps, **arguments)
                torch.testing.assert_close(ours.sigmas.float(), stock.sigmas, rtol=1e-5, atol=1e-6)
                if not (settings["invert_sigmas"] and "timesteps" in arguments):  # which the stock scheduler ignores
                    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-5, atol=1e-3)
                x, answer = torch.randn(2, 1, 4, 8, 8)
                moved: list[Any] = [s.step(answer, s.timesteps[0], x).prev_sample for s in (ours, stock)]
                torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-6)
        ours.set_timesteps(1, mu=0.7)
        assert bool(ours.sigmas.isfinite().all())


def test_a_dynamic_shift_needs_the_image_size() -> None:
    pipeline = make_made_up_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="depends on the image size"):
        RectifiedFlowEulerScheduler.for_pipeline(pipeline).set_timesteps(2)


def test_the_path_to_inverted_sigmas_is_straight() -> None:
    pipeline = make_made_up_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    ours = RectifiedFlowEulerScheduler.for_pipeline(pipeline)
    data, noise = torch.randn(2, 1, 4, 2, 2)
    torch.testing.assert_close(ours.add_noise(data, noise, torch.tensor([250.0])), 0.25 * data + 0.75 * noise)
    assert ours.config["velocity_direction"] == "data"


def test_our_own_scheduler_is_copied() -> None:
    pipeline = make_tiny_pipeline("flow")
    pipeline.scheduler = RectifiedFlowEulerScheduler(shift=2.0)
    for uniform, shift in ((False, 2.0), (True, 1.0)):
        ours = RectifiedFlowEulerScheduler.for_pipeline(pipeline, uniform)
        assert (ours.config["velocity_direction"], ours.config["shift"]) == ("data", shift)
        assert ours is not pipeline.scheduler


def test_schedulers_without_an_equivalent_are_refused() -> None:
    pipeline = make_made_up_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    with pytest.raises(ValueError, match="has no use_karras_sigmas"):
        RectifiedFlowEulerScheduler.for_pipeline(pipeline)
    assert RectifiedFlowEulerScheduler.for_pipeline(pipeline, uniform=True).config["sigma_min"] is None
    for scheduler in (DDIMScheduler(), DPMSolverMultistepScheduler()):
        pipeline.scheduler = scheduler
        with pytest.raises(TypeError, match=f"flow scheduler of diffusers, got {type(scheduler).__name__}"):
            RectifiedFlowEulerScheduler.for_pipeline(pipeline)


@pytest.mark.parametrize(("name", "value"), [("sigma_min", "0"), ("sigma_min", 1.0), ("shift_terminal", -0.1)])
def test_a_stored_grid_is_checked(name: str, value: Any) -> None:
    config = {**RectifiedFlowEulerScheduler().config, name: value}
    with pytest.raises(ValueError, match=f"must have a number in .* as {name}, got {value!r}"):
        RectifiedFlowEulerScheduler.from_config(config)
