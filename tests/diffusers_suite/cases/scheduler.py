"""The common scheduler test, on our scheduler and on diffusers' own Euler scheduler."""
# pyright: reportMissingImports=false

from typing import Any

from diffusers import EulerDiscreteScheduler

from rectified_diffusers import RectifiedFlowEulerScheduler

from ..schedulers import test_schedulers as common


class TestSchedulerStock(common.SchedulerCommonTest):
    scheduler_classes = (EulerDiscreteScheduler,)
    forward_default_kwargs = (("num_inference_steps", 10),)
    test_trained_betas = None  # a flow has none; diffusers' own schedulers without betas leave the test out, too

    def get_scheduler_config(self, **kwargs: Any) -> dict[str, Any]:
        return {"num_train_timesteps": 1000, **kwargs}

    def test_configs(self) -> None:
        for num_train_timesteps in (10, 100, 1000):
            self.check_over_configs(num_train_timesteps, num_train_timesteps=num_train_timesteps)


class TestSchedulerOurs(TestSchedulerStock):
    scheduler_classes = (RectifiedFlowEulerScheduler,)

    def test_directions_and_shifts(self) -> None:
        for direction in ("data", "noise"):
            for shift in (0.5, 1.0, 3.0):
                self.check_over_configs(1000, velocity_direction=direction, shift=shift)

    def test_numbers_of_steps(self) -> None:
        for steps in (1, 2, 25):
            self.check_over_forward(self.default_timestep, num_inference_steps=steps)
