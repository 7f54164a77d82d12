from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rectified_diffusers.flow import Cosine, Interpolation, Straight, VariancePreserving, euler, heun
from tests.flow.cases import PURE_ENDS, SD_BETAS, Gaussian, draw_pair

Solver = Callable[..., Tensor]

both_solvers = pytest.mark.parametrize("solver", [euler, heun])
both_ways = pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (0.8, 0.1)], ids=["on", "back", "part"])
PATHS = pytest.mark.parametrize("interpolation", [Straight(), Cosine(), VariancePreserving(PURE_ENDS)], ids=repr)


@pytest.mark.parametrize(
    "interpolation", [Straight(), Cosine(), VariancePreserving.from_betas(SD_BETAS).with_pure_ends()], ids=repr
)
def test_the_flow_of_every_path_carries_noise_to_data(interpolation: Interpolation) -> None:
    """Reflow trains on these paths: integrating the exact velocity from N(0, 1) gives N(mean, std^2)."""
    gaussian = Gaussian(interpolation, mean=3.0, std=0.2)
    noise, _ = draw_pair((4, 4, 4, 4), seed=0)
    torch.testing.assert_close(heun(gaussian.velocity, noise, 1000), 3.0 + 0.2 * noise, atol=1e-3, rtol=0)


def measured_order(solver: Solver, gaussian: Gaussian, start: float, end: float) -> Tensor:
    """log2 of how much the error falls when the steps double, `(2,)`."""
    x, _ = draw_pair((4, 4, 4, 4), seed=0)
    exact = gaussian.flow(x, start, end)
    errors = torch.stack([(solver(gaussian.velocity, x, steps, start, end) - exact).norm() for steps in (32, 64, 128)])
    return (errors[:-1] / errors[1:]).log2()


@PATHS
@both_ways
@pytest.mark.parametrize(("solver", "order"), [(euler, 1.0), (heun, 2.0)])
def test_order_of_convergence(
    solver: Solver, order: float, interpolation: Interpolation, start: float, end: float
) -> None:
    found = measured_order(solver, Gaussian(interpolation), start, end)
    torch.testing.assert_close(found, torch.full_like(found, order), atol=0.1, rtol=0)


@pytest.mark.parametrize(("solver", "error"), [(euler, 0.1), (heun, 1e-5)])
def test_there_and_back_again(solver: Solver, error: float) -> None:
    velocity = Gaussian(Straight()).velocity
    noise, _ = draw_pair((4, 4, 4, 4), seed=0)
    data = solver(velocity, noise, 128)
    torch.testing.assert_close(solver(velocity, data, 128, 1.0, 0.0), noise, atol=error, rtol=0)


@both_solvers
@both_ways
def test_agrees_with_torchdiffeq(solver: Solver, start: float, end: float) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    velocity = Gaussian(Cosine()).velocity
    x, _ = draw_pair((4, 4, 4, 4), seed=0)
    grid = torch.linspace(start, end, 14, dtype=torch.float64)
    expected = torchdiffeq.odeint(
        lambda t, y: velocity(y, t.expand(4)), x, grid, method={euler: "euler", heun: "heun2"}[solver]
    )
    found = solver(velocity, x, 13, start, end, return_trajectory=True)
    torch.testing.assert_close(found, expected)


@both_solvers
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_straight_flow_is_exact_in_any_number_of_steps(solver: Solver, steps: int) -> None:
    noise, data = draw_pair((4, 4, 4, 4), seed=0)
    torch.testing.assert_close(solver(lambda x, t: data - noise, noise, steps), data)
    torch.testing.assert_close(solver(lambda x, t: data - noise, data, steps, 1.0, 0.0), noise)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 25])
def test_euler_is_the_hand_written_loop_bit_for_bit(steps: int, dtype: torch.dtype) -> None:
    x, _ = (y.to(dtype) for y in draw_pair((4, 4, 4, 4), seed=0))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (torch.tanh(x) * (1 + t.reshape(-1, 1, 1, 1))).to(x.dtype)

    found, dt = euler(velocity, x, steps), 1.0 / steps
    for i in range(steps):
        x = x + dt * velocity(x, torch.full((4,), i / steps))
    assert torch.equal(found, x)


@both_solvers
@both_ways
def test_trajectory_has_both_ends(solver: Solver, start: float, end: float) -> None:
    velocity = Gaussian(Straight()).velocity
    x, _ = draw_pair((2, 3, 4, 5), seed=0)
    trajectory = solver(velocity, x, 6, start, end, return_trajectory=True)
    assert trajectory.shape == (7, 2, 3, 4, 5)
    assert torch.equal(trajectory[0], x)
    assert torch.equal(trajectory[-1], solver(velocity, x, 6, start, end))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("solver", "expected"), [(euler, [0.0, 1 / 3, 2 / 3]), (heun, [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])]
)
def test_velocity_is_asked_at_these_times(solver: Solver, expected: list[float], dtype: torch.dtype) -> None:
    asked: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return x.float()  # as a network under autocast may

    x = solver(velocity, torch.ones(2, 3, dtype=dtype), 3)
    assert x.dtype == dtype
    assert all(t.shape == (2,) and (t[0] == t[1]) for t in asked)
    assert {t.dtype for t in asked} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert [t[0].item() for t in asked] == pytest.approx(expected, abs=1e-7)
    assert asked[-1][0] <= 1


def test_last_time_is_the_end_itself() -> None:
    """Not the sum of the steps, which rounding may carry beyond 1."""
    asked: list[float] = []
    for steps in range(1, 40):
        heun(lambda x, t: asked.append(t[0].item()) or x, torch.ones(1, 1, dtype=torch.float64), steps, 0.1, 1.0)
        assert asked[-1] == 1.0


@both_solvers
def test_no_distance_is_no_motion(solver: Solver) -> None:
    x, _ = draw_pair((2, 3), seed=0)
    assert torch.equal(solver(lambda x, t: x, x, 3, 0.4, 0.4), x)


@both_solvers
def test_gradient_goes_through(solver: Solver) -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    solver(lambda x, t: scale * x, torch.ones(1, 1), 4).sum().backward()
    assert scale.grad is not None
    assert scale.grad > 0


@both_solvers
def test_no_steps_are_refused(solver: Solver) -> None:
    with pytest.raises(ValueError, match="steps >= 1, got 0"):
        solver(lambda x, t: x, torch.ones(1, 1), 0)


@both_solvers
@pytest.mark.parametrize(("start", "end"), [(1000.0, 0.0), (0.0, 1.1), (-0.1, 1.0), (0.0, float("nan"))])
def test_times_outside_the_unit_interval_are_refused(solver: Solver, start: float, end: float) -> None:
    with pytest.raises(ValueError, match="flow times"):
        solver(lambda x, t: x, torch.ones(1, 1), 4, start, end)


@both_solvers
def test_velocity_of_another_shape_is_refused(solver: Solver) -> None:
    with pytest.raises(ValueError, match=r"the shape of x, \(2, 3\), got \(2, 1\)"):
        solver(lambda x, t: x[:, :1], torch.ones(2, 3), 4)


def test_a_start_beyond_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 1.5 and 0.5"):
        euler(lambda x, t: x, torch.zeros(1, 2), 2, start=1.5, end=0.5)


def test_steps_that_are_no_number_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Expected a whole number of steps, got 2.5. Pass an int"):
        euler(lambda x, t: x, torch.zeros(1, 2), 2.5)
