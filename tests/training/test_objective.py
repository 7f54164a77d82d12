"""The objective for loops of others trains the velocity, at real times, timestep 1000 among them."""

import pytest
import torch

from rectified_diffusers.flow import FixedTime, pseudo_huber
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
from rectified_diffusers.training.objective import FlowBatch, FlowObjective

SHAPE = (64, 4, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_target_is_data_minus_noise(dtype: torch.dtype) -> None:
    noise, data = torch.randn(2, *SHAPE).to(dtype)
    flow = FlowObjective().prepare(noise=noise, data=data)
    assert flow.velocity.dtype == flow.x_t.dtype == dtype
    torch.testing.assert_close(flow.velocity, data - noise)
    assert flow.timesteps.dtype == torch.float32
    expected = RectifiedFlowEulerScheduler().add_noise(data, noise, flow.timesteps)
    torch.testing.assert_close(flow.x_t, expected)


def test_times_are_real_and_reach_both_ends() -> None:
    noise, data = torch.randn(2, 4096, 1, 1, 1)
    timesteps = FlowObjective().prepare(noise=noise, data=data).timesteps
    share = (timesteps == 1000).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.02)
    rest = timesteps[timesteps != 1000]
    assert rest.min() < 2
    assert rest.max() > 998
    assert (rest != rest.round()).float().mean() > 0.9
    assert rest.mean().item() == pytest.approx(500, abs=20)


def test_at_the_noise_end_the_model_sees_the_noise() -> None:
    noise, data = torch.randn(2, *SHAPE)
    flow = FlowObjective(at_noise=1.0).prepare(noise=noise, data=data)
    assert torch.equal(flow.x_t, noise)
    assert (flow.timesteps == 1000).all()
    flow = FlowObjective(FixedTime(1.0), at_noise=0.0).prepare(noise=noise, data=data)
    assert torch.equal(flow.x_t, data)
    assert (flow.timesteps == 0).all()


def test_a_generator_decides_the_times() -> None:
    noise, data = torch.randn(2, *SHAPE)
    first, again = (
        FlowObjective().prepare(noise=noise, data=data, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first.timesteps, again.timesteps)
    other = FlowObjective().prepare(noise=noise, data=data)
    assert not torch.equal(first.timesteps, other.timesteps)


def test_the_loss_is_zero_for_the_velocity_alone() -> None:
    noise, data = torch.randn(2, *SHAPE)
    objective = FlowObjective()
    flow = objective.prepare(noise=noise, data=data)
    assert objective.loss(data - noise, flow) == 0
    for wrong in (noise, data, noise - data):  # epsilon, sample, the other sign
        assert objective.loss(wrong, flow) > 0.5
    torch.testing.assert_close(objective.loss(noise, flow), torch.nn.functional.mse_loss(noise, data - noise))
    huber = FlowObjective(loss_kind="pseudo_huber").loss(noise, flow)
    torch.testing.assert_close(huber, pseudo_huber(2 * noise - data).mean())


def test_what_cannot_be_meant_is_refused() -> None:
    noise, data = torch.randn(2, *SHAPE)
    with pytest.raises(ValueError, match=r"at_noise is a share of the examples, in \[0, 1\], got 10"):
        FlowObjective(at_noise=10)
    with pytest.raises(TypeError):  # which is which must be said
        FlowObjective().prepare(noise, data)
    with pytest.raises(ValueError, match="of one shape"):
        FlowObjective().prepare(noise=noise, data=data[:1])
    with pytest.raises(ValueError, match="one shape"):
        FlowObjective().loss(noise[:, :1], FlowBatch(noise, torch.zeros(64), data))
