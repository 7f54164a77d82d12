"""RectifiedFlowEulerScheduler: its grid, its steps, its path, and what it refuses."""

import itertools
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from rectified_diffusers.pipelines import scheduler as schedulers
from rectified_diffusers.pipelines.scheduler import time_to_timestep, timestep_to_time

# diffusers types a config as a dictionary and the result of from_config as maybe a tuple.
RectifiedFlowEulerScheduler: Any = schedulers.RectifiedFlowEulerScheduler


def make_scheduler(steps=None, **config):
    scheduler = RectifiedFlowEulerScheduler(**config)
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.manual_seed(seed), dtype=dtype)


def run(scheduler, x, velocity):
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x, timestep), timestep, x, return_dict=False)[0]
    return x


def a_velocity(x, timestep):
    return torch.sin(3 * x) + timestep.to(x.dtype) / 1000


# Time


@settings(max_examples=25)
@given(t=st.floats(0, 1))
def test_time_and_timestep_are_inverse(t):
    assert timestep_to_time(time_to_timestep(t)) == pytest.approx(t, abs=1e-15)
    torch.testing.assert_close(time_to_timestep(torch.tensor([0.0, 0.25, 1.0])), torch.tensor([1000.0, 750.0, 0.0]))


# The grid


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 25, 1000])
def test_grid_is_uniform_from_the_noise_end(steps):
    scheduler = make_scheduler(steps)
    expected = torch.tensor([(1 - i / steps) * 1000 for i in range(steps)])
    assert torch.equal(scheduler.timesteps, expected)
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.sigmas.dtype == torch.float64
    assert scheduler.sigmas.device.type == "cpu"
    assert scheduler.sigmas[0] == 1
    assert scheduler.sigmas[-1] == 0
    assert len(scheduler.sigmas) == steps + 1 == scheduler.num_inference_steps + 1


@settings(max_examples=25)
@given(
    steps=st.integers(1, 60), start=st.floats(0, 0.99), shift=st.sampled_from([1.0, 3.0]), seed=st.integers(0, 2**31)
)
def test_constant_velocity_arrives_at_the_data_from_any_start(steps, start, shift, seed):
    noise, data = randn(2, 4, 4, 4, 4, seed=seed, dtype=torch.float64)
    scheduler = RectifiedFlowEulerScheduler(shift=shift)
    scheduler.set_timesteps(steps, start=start)
    assert float(scheduler.timesteps[0]) == pytest.approx(1000 * (1 - start), rel=1e-6)
    x = start * data + (1 - start) * noise
    torch.testing.assert_close(run(scheduler, x, lambda x, timestep: data - noise), data)


def test_own_grids_as_timesteps_and_as_sigmas_are_the_same():
    by_sigma, by_timestep = make_scheduler(), make_scheduler()
    by_sigma.set_timesteps(sigmas=[1.0, 0.6, 0.1])
    by_timestep.set_timesteps(timesteps=torch.tensor([1000, 600, 100]))
    torch.testing.assert_close(by_sigma.timesteps, by_timestep.timesteps)
    torch.testing.assert_close(by_sigma.sigmas, torch.tensor([1.0, 0.6, 0.1, 0.0], dtype=torch.float64))
    x = randn(4, 4, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(run(by_sigma, x, a_velocity), run(by_timestep, x, a_velocity))


def test_own_uniform_grid_equals_the_default():
    ours, given_grid = make_scheduler(5), make_scheduler()
    given_grid.set_timesteps(5, sigmas=[1 - i / 5 for i in range(5)])
    x = randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(run(ours, x, a_velocity), run(given_grid, x, a_velocity))


def test_shift_is_stable_diffusion_3s_and_mu_is_its_logarithm():
    shifted = make_scheduler(4, shift=3.0)
    uniform = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(shifted.sigmas, 3 * uniform / (1 + 2 * uniform))
    by_mu = RectifiedFlowEulerScheduler()
    by_mu.set_timesteps(4, mu=torch.tensor(3.0).log().item())
    torch.testing.assert_close(by_mu.sigmas, shifted.sigmas, atol=1e-6, rtol=0)


def test_timesteps_follow_num_train_timesteps():
    scheduler = make_scheduler(4, num_train_timesteps=500)
    assert scheduler.timesteps.tolist() == [500, 375, 250, 125]
    assert len(scheduler) == 500


@pytest.mark.parametrize("steps", [0, -1])
def test_too_few_steps(steps):
    with pytest.raises(ValueError, match=f"at least 1, got {steps}"):
        make_scheduler(steps)


@pytest.mark.parametrize("steps", [2.0, "3"])
def test_steps_that_are_no_integer(steps):
    with pytest.raises(TypeError, match="must be an integer"):
        make_scheduler(steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Pass num_inference_steps, timesteps or sigmas"),
        ({"timesteps": [1000], "sigmas": [1.0]}, "not both"),
        ({"sigmas": [1.0], "start": 0.5}, "Pass start or a grid"),
        ({"num_inference_steps": 2, "sigmas": [1.0]}, "the grid has 1 steps"),
        ({"num_inference_steps": 2, "start": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"num_inference_steps": 2, "start": -0.1}, r"in \[0, 1\), got -0.1"),
        ({"num_inference_steps": 2, "start": float("nan")}, r"in \[0, 1\)"),
        ({"sigmas": []}, "descend strictly"),
        ({"sigmas": [1.0, 0.5, 0.0]}, "descend strictly"),
        ({"sigmas": [0.5, 1.0]}, "descend strictly"),
        ({"sigmas": [0.5, 0.5]}, "descend strictly"),
        ({"sigmas": [1.0, float("nan")]}, "descend strictly"),
        ({"sigmas": [[1.0, 0.5]]}, "descend strictly"),
        ({"timesteps": [1001, 500]}, "descend strictly"),
    ],
)
def test_bad_grids(arguments, message):
    with pytest.raises(ValueError, match=message):
        RectifiedFlowEulerScheduler().set_timesteps(**arguments)


# The step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("steps", [*range(1, 31), 49, 50, 100])
def test_steps_are_the_authors_loop_bit_for_bit(steps, dtype):
    """Their code multiplies by dt = 1.0 / N; a division by N differs in the last bit at N = 3, 7, 25."""
    scheduler = make_scheduler(steps)
    x = expected = randn(4, 4, 4, 4).to(dtype)
    dt = 1.0 / steps
    for t in [(1.0 - i / steps) * 1000.0 for i in range(steps)]:
        v = a_velocity(expected, torch.tensor(t))
        expected = expected + dt * v
    x = run(scheduler, x, a_velocity)
    assert x.dtype == dtype
    assert torch.equal(x, expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_velocity_towards_noise_is_the_same_with_the_other_sign(steps):
    x = randn(4, 4, 4, 4)
    towards_data = run(make_scheduler(steps), x, a_velocity)
    towards_noise = run(make_scheduler(steps, velocity_direction="noise"), x, lambda *a: -a_velocity(*a))
    assert torch.equal(towards_data, towards_noise)


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.75, 0.5, 0.25], [1.0, 0.9, 0.3]])
def test_equals_flow_match_euler_on_the_same_grid(sigmas):
    stock, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), make_scheduler(velocity_direction="noise", shift=3.0)
    stock.set_timesteps(sigmas=sigmas)
    ours.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.timesteps, stock.timesteps)
    x = randn(4, 4, 4, 4)
    torch.testing.assert_close(run(ours, x, a_velocity), run(stock, x, a_velocity), atol=2e-6, rtol=0)


def test_euler_is_first_order_on_gaussian_data():
    # Data N(0, s^2), noise N(0, 1): x_t has variance t^2 s^2 + (1 - t)^2, the flow maps x to x * std(t).
    s = 0.5

    def velocity(x, timestep):
        t = timestep_to_time(timestep.double())
        return x * (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)

    x = randn(4, 4, 4, 4, dtype=torch.float64)
    errors = [(run(make_scheduler(steps), x, velocity) - s * x).abs().max() for steps in (64, 128, 256)]
    order = torch.stack([(a / b).log2() for a, b in itertools.pairwise(errors)])
    torch.testing.assert_close(order, torch.ones_like(order), atol=0.1, rtol=0)


def test_step_keeps_the_dtype_of_the_sample():
    x = randn(1, 4, 8, 8)
    moved = make_scheduler(1).step(x, torch.tensor(1000.0), x.bfloat16())
    assert moved.prev_sample.dtype == torch.bfloat16


def test_return_dict_or_tuple():
    x = randn(1, 4, 8, 8)
    as_dict = make_scheduler(2).step(x, 1000.0, x)
    as_tuple = make_scheduler(2).step(x, 1000.0, x, return_dict=False)
    assert torch.equal(as_dict.prev_sample, as_tuple[0])
    assert len(as_tuple) == 1


def test_the_model_sees_the_sample_itself():
    x = randn(1, 4, 8, 8)
    assert make_scheduler(2).scale_model_input(x, 1000.0) is x
    assert make_scheduler().init_noise_sigma == 1.0
    assert RectifiedFlowEulerScheduler.order == 1


# The position on the grid


def test_step_index_is_found_from_the_first_timestep_and_then_counts():
    scheduler = make_scheduler(4)
    x = randn(1, 4, 8, 8)
    assert scheduler.step_index is None
    assert scheduler.begin_index is None
    scheduler.step(x, scheduler.timesteps[2], x)
    assert scheduler.step_index == 3
    scheduler.step(x, scheduler.timesteps[3], x)
    assert scheduler.step_index == 4


def test_begin_index_says_where_the_first_step_is():
    x = randn(1, 4, 8, 8)
    scheduler = make_scheduler(4)
    scheduler.set_begin_index(3)
    assert scheduler.begin_index == 3
    scheduler.step(x, torch.tensor(float("nan")), x)
    assert scheduler.step_index == 4


def test_runs_repeat_after_set_timesteps():
    x = randn(2, 4, 8, 8)
    scheduler = make_scheduler(3)
    first = run(scheduler, x, a_velocity)
    scheduler.set_begin_index(1)
    scheduler.set_timesteps(3)
    assert scheduler.begin_index is None
    assert scheduler.step_index is None
    assert torch.equal(run(scheduler, x, a_velocity), first)


def test_a_used_up_grid_is_an_error():
    x = randn(1, 4, 8, 8)
    scheduler = make_scheduler(2)
    run(scheduler, x, a_velocity)
    with pytest.raises(ValueError, match="All 2 steps are taken"):
        scheduler.step(x, 1000.0, x)


def test_step_before_set_timesteps_is_an_error():
    x = randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="call set_timesteps"):
        make_scheduler().step(x, 1000.0, x)


@pytest.mark.parametrize("timestep", [0, 1, 999, float("nan")])
def test_a_timestep_off_the_grid_is_an_error(timestep):
    x = randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="not on the grid of 4 steps"):
        make_scheduler(4).step(x, timestep, x)


# The path


@settings(max_examples=25)
@given(t=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_add_noise_is_the_straight_path_and_get_velocity_its_derivative(t, seed):
    noise, data = randn(2, 4, 4, 4, 4, seed=seed, dtype=torch.float64)
    scheduler = RectifiedFlowEulerScheduler()
    t = torch.full((4,), t, dtype=torch.float64)
    x_t, derivative, *_ = torch.func.jvp(
        lambda t: scheduler.add_noise(data, noise, time_to_timestep(t)), (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(x_t, t[0] * data + (1 - t[0]) * noise)
    torch.testing.assert_close(scheduler.get_velocity(data, noise, time_to_timestep(t)), derivative)


def test_add_noise_is_per_example():
    noise, data = randn(2, 4, 4, 4, 4)
    x_t = make_scheduler().add_noise(data, noise, torch.tensor([1000.0, 0.0, 250.5, 500.0]))
    torch.testing.assert_close(x_t[0], noise[0])
    torch.testing.assert_close(x_t[1], data[1])
    torch.testing.assert_close(x_t[2], 0.7495 * data[2] + 0.2505 * noise[2])
    torch.testing.assert_close(x_t[3], (data[3] + noise[3]) / 2)


@pytest.mark.parametrize("timesteps", [torch.tensor(500), torch.tensor([500.0])])
def test_add_noise_takes_one_timestep_for_all_and_keeps_the_dtype(timesteps):
    noise, data = randn(2, 3, 4, 8, 8).bfloat16()
    x_t = make_scheduler().add_noise(data, noise, timesteps)
    assert x_t.dtype == torch.bfloat16
    assert torch.equal(x_t, (0.5 * data.float() + 0.5 * noise.float()).bfloat16())


@pytest.mark.parametrize("timesteps", [torch.ones(2), torch.ones(3, 1)])
def test_add_noise_with_the_wrong_number_of_timesteps(timesteps):
    noise, data = randn(2, 3, 4, 8, 8)
    with pytest.raises(ValueError, match=r"one value per sample, shape \(3,\)"):
        make_scheduler().add_noise(data, noise, timesteps)


def test_get_velocity_has_the_sign_of_the_model():
    noise, data = randn(2, 2, 4, 8, 8)
    assert torch.equal(make_scheduler().get_velocity(data, noise), data - noise)
    assert torch.equal(make_scheduler(velocity_direction="noise").get_velocity(data, noise), noise - data)


# The config


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "velocity", "v_prediction"])
def test_prediction_type_is_normalised(prediction_type):
    assert make_scheduler(prediction_type=prediction_type).config.prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type must be one of flow_prediction.*got 'epsilon'"),
        ({"velocity_direction": "left"}, "'data'.*'noise'.*got 'left'"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be at least 1"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(**config)


def test_save_and_load(tmp_path):
    make_scheduler(num_train_timesteps=500, velocity_direction="noise", shift=2.0).save_pretrained(tmp_path)
    loaded = RectifiedFlowEulerScheduler.from_pretrained(tmp_path)
    assert (loaded.config.num_train_timesteps, loaded.config.velocity_direction, loaded.config.shift) == (
        500,
        "noise",
        2,
    )


@pytest.mark.parametrize("theirs", [PNDMScheduler(num_train_timesteps=500), DDIMScheduler(num_train_timesteps=500)])
def test_from_config_of_a_diffusion_scheduler_takes_nothing_foreign(theirs):
    ours = RectifiedFlowEulerScheduler.from_config(theirs.config)
    assert {key for key in ours.config if not key.startswith("_")} == set(RectifiedFlowEulerScheduler().config) - {
        "_use_default_values"
    }
    assert ours.config.num_train_timesteps == 500
    assert ours.config.prediction_type == "flow_prediction"
    assert ours.config.velocity_direction == "data"


def test_from_config_of_a_flow_match_scheduler_needs_the_sign():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    with pytest.raises(ValueError, match="velocity_direction='noise'"):
        RectifiedFlowEulerScheduler.from_config(theirs)
    ours = RectifiedFlowEulerScheduler.from_config(theirs, velocity_direction="noise")
    assert (ours.config.velocity_direction, ours.config.shift) == ("noise", 3.0)


def test_from_config_of_ours_keeps_everything():
    ours = RectifiedFlowEulerScheduler.from_config(make_scheduler(velocity_direction="noise", shift=2.0).config)
    assert (ours.config.velocity_direction, ours.config.shift) == ("noise", 2.0)


def test_other_schedulers_refuse_to_take_our_config_for_epsilon():
    theirs: Any = DDIMScheduler.from_config(make_scheduler().config)
    theirs.set_timesteps(2)
    x = randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="flow_prediction"):
        theirs.step(x, 500, x)
    assert RectifiedFlowEulerScheduler._compatibles == []
    assert make_scheduler().compatibles == [diffusers.RectifiedFlowEulerScheduler]  # pyright: ignore[reportAttributeAccessIssue]


def test_a_new_scheduler_has_the_grid_of_its_training():
    scheduler = RectifiedFlowEulerScheduler(8)
    assert scheduler.timesteps.tolist() == [8 - k for k in range(8)]
    assert RectifiedFlowEulerScheduler(1).timesteps.tolist() == [1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_train_timesteps": True}, TypeError, "must be an integer, got True"),
        ({"num_train_timesteps": 2.5}, TypeError, "must be an integer, got 2.5"),
        ({"shift": "3"}, TypeError, "shift must be a number, got '3'"),
        ({"shift": float("inf")}, ValueError, "shift must be above 0 and finite"),
    ],
)
def test_settings_of_wrong_types(options, error, message):
    with pytest.raises(error, match=message):
        RectifiedFlowEulerScheduler(**options)


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        ({"num_inference_steps": 2, "start": "0"}, TypeError, "start must be a number"),
        ({"sigmas": ["a"]}, TypeError, "A grid must be a list of numbers"),
        ({"num_inference_steps": 2, "mu": float("nan")}, ValueError, "mu, the logarithm of a shift, must be finite"),
    ],
)
def test_grids_of_wrong_types(grid, error, message):
    with pytest.raises(error, match=message):
        RectifiedFlowEulerScheduler().set_timesteps(**grid)


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(
    "grid", [{"num_inference_steps": 3}, {"sigmas": [1.0, 0.7, 0.1]}, {"timesteps": [900.0, 400.0]}]
)
def test_steps_are_the_differences_of_the_grid(grid, shift):
    """Of a velocity that differs from step to step, so that uneven steps are told from even ones."""
    scheduler = RectifiedFlowEulerScheduler(shift=shift)
    scheduler.set_timesteps(**grid)
    if "timesteps" in grid:
        assert scheduler.timesteps.tolist() == grid["timesteps"]
    sigmas = torch.tensor(grid.get("sigmas", [1, 2 / 3, 1 / 3]), dtype=torch.float64)
    sigmas = torch.tensor([0.9, 0.4]).double() if "timesteps" in grid else shift * sigmas / (1 + (shift - 1) * sigmas)
    ends = [*sigmas.tolist(), 0.0]
    x, expected = torch.zeros(1, 1, 1, 1), 0.0
    for k, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.full_like(x, 10.0**k), timestep, x).prev_sample
        expected += 10.0**k * (ends[k] - ends[k + 1])
    assert x.item() == pytest.approx(expected, rel=1e-6)


def test_a_timestep_a_rounding_away_is_found():
    scheduler = RectifiedFlowEulerScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.index_for_timestep(750.0 + 5e-4) == 1
    assert scheduler.index_for_timestep(torch.tensor(500.0)) == 2
    assert scheduler.index_for_timestep(torch.tensor([500.0])) == 2
    with pytest.raises(ValueError, match="is not on the grid of 4 steps"):
        scheduler.index_for_timestep(750.0 + 2e-3)


@pytest.mark.parametrize("wrong", ["type", "shape"])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("method", ["step", "add_noise", "get_velocity"])
def test_tensors_are_of_one_shape(method, place, wrong):
    scheduler = RectifiedFlowEulerScheduler()
    scheduler.set_timesteps(2)
    tensors: list[Any] = [torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)]
    tensors[place] = 0.0 if wrong == "type" else torch.zeros(1, 4, 1, 1)
    error, message = (
        (TypeError, "must be a tensor")
        if wrong == "type"
        else (ValueError, r"of one shape .* and (sample|noise) \(1, 4")
    )
    timesteps = scheduler.timesteps[:1]
    given = (tensors[0], timesteps, tensors[1]) if method == "step" else (*tensors, timesteps)
    with pytest.raises(error, match=message):
        getattr(scheduler, method)(*given)


def test_add_noise_wants_a_tensor_of_timesteps():
    with pytest.raises(TypeError, match=r"timesteps must be a tensor, got 500\.0"):
        RectifiedFlowEulerScheduler().add_noise(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), 500.0)


def test_a_diffusion_solver_set_to_flow_needs_the_sign():
    config = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").config
    config = {key: value for key, value in config.items() if key != "shift"}
    with pytest.raises(ValueError, match="must contain velocity_direction"):
        RectifiedFlowEulerScheduler.from_config(config)
    assert RectifiedFlowEulerScheduler.from_config(config, velocity_direction="noise").config["shift"] == 1
