"""The self-test of an adapter: what it computes against what the stock pipeline does."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.calibration import PROMPTS, STEPS, UNEQUAL, require_ode
from rectified_diffusers.models.finding import with_sigmas
from rectified_diffusers.models.stock_call import device_of
from rectified_diffusers.models.watching import (
    Step,
    Trace,
    first_sample,
    images_of,
    step_arguments,
    with_sample,
)

_TOLERANCE = 1e-5
_SENSITIVITY = 1e-7


@dataclass(frozen=True)
class SelfTest:
    """Results of the self-test.

    Attributes:
        prediction: largest relative difference of the adapter's predictions to what the scheduler received.
        euler: relative difference of an Euler loop on the adapter's velocity to the stock pipeline's latents; None for
            a diffusion model.
        noise_exact, decoding_exact: equal bit for bit.
        prompt, time, sample: relative change of the answer with each.
        batched: prompts that fit are evaluated in one batch.
    """

    prediction: float
    euler: float | None
    noise_exact: bool
    decoding_exact: bool
    prompt: float
    time: float
    sample: float
    batched: bool

    def failures(self, tolerance: float = _TOLERANCE) -> list[str]:
        """Return a sentence for each failure."""
        found = []
        if not self.noise_exact:
            found.append("noise does not reach the scheduler as it is")
        if not self.prediction <= tolerance:
            found.append(f"the adapter's predictions differ from the pipeline's by {self.prediction:.1e}")
        if self.euler is not None and not self.euler <= tolerance:
            found.append(f"an Euler loop on the adapter's velocity differs from the pipeline's by {self.euler:.1e}")
        if not self.decoding_exact:
            found.append("the adapter does not decode latents to the pipeline's image")
        for name in ("prompt", "time", "sample"):
            if not getattr(self, name) > _SENSITIVITY:
                found.append(f"the network's answer does not depend on the {name}")
        return found


def self_test(denoiser: PipelineDenoiser) -> SelfTest:
    """Compare an adapter with its stock pipeline, and return the results.

    Raises:
        UnsupportedPipelineError: a comparison fails, or the solver adds noise.
    """
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, *denoiser.latent_shape, generator=generator).to(device_of(denoiser.network))
    if denoiser.is_flow:
        require_ode(denoiser.call, denoiser.calibration.off, noise[:1], denoiser.calibration.noise_place)
    trace = _stock(denoiser, noise[:1])
    if denoiser.is_flow and not all(_continues(*pair) for pair in pairwise(trace.steps)):
        raise UnsupportedPipelineError("its latents change between steps of the scheduler")
    with torch.no_grad():
        result = SelfTest(
            prediction=_prediction(denoiser, trace),
            euler=_euler(denoiser, trace),
            noise_exact=bool(torch.equal(trace.steps[0].sample, noise[:1].to(trace.steps[0].sample))),
            decoding_exact=_decodes(denoiser, trace),
            **_sensitivity(denoiser, noise),
            batched=denoiser.axes is not None,
        )
    failures = result.failures(max(_TOLERANCE, 2 * torch.finfo(denoiser.dtype).eps))
    if failures:
        raise UnsupportedPipelineError(failures[0])
    return result


def _stock(denoiser: PipelineDenoiser, noise: Tensor, on_step: Any = None) -> Trace:
    call, calibration = denoiser.call, denoiser.calibration
    options = {**calibration.off, **denoiser.scale, **({call.output_type: "np"} if call.output_type else {})}
    trace = call.run(PROMPTS[:1], STEPS, options, noise=(noise, calibration.noise_place), on_step=on_step)
    trace.steps = with_sigmas(trace.steps) if denoiser.is_flow else trace.steps
    return trace


def _continues(step: Step, following: Step) -> bool:
    """Return whether a step's result is the next step's sample, but for layout and rounding."""
    end, start = step.result.float().flatten(), following.sample.float().flatten()
    rounding = 2 * max(torch.finfo(part.dtype).eps for part in (step.result, following.sample))
    return end.shape == start.shape and torch.allclose(end, start, rtol=rounding, atol=rounding)


def _difference(one: Tensor, two: Tensor) -> float:
    one, two = one.float(), two.float()
    return float((one - two).norm() / two.norm())


def _prediction(denoiser: PipelineDenoiser, trace: Trace) -> float:
    conditioning = denoiser.encode(PROMPTS[:1], device_of(denoiser.network))
    errors = []
    for step in trace.steps:
        time = step.timestep if denoiser.calibration.flow is None else denoiser.calibration.flow.timestep_of(step)
        timestep = torch.tensor([time], dtype=torch.float64, device=step.sample.device)
        answer = denoiser.predict_at(denoiser.network, step.sample, timestep, conditioning)
        errors.append(_difference(answer, step.answer))
    return max(errors)


def _euler(denoiser: PipelineDenoiser, trace: Trace) -> float | None:
    """Compare an Euler loop of our own with the stock pipeline's latents after each step.

    A multistep solver is replaced by Euler steps along its sigmas. Times that the pipeline rounds are rounded too.
    """
    flow = denoiser.calibration.flow
    if flow is None:
        return None
    sigmas = [step.sigmas for step in trace.steps if step.sigmas is not None]
    times = [(flow.time_at(one), flow.time_at(two)) for one, two in sigmas]
    if not all(_is_euler(step, flow.sign, *time) for step, time in zip(trace.steps, times, strict=True)):
        moves = iter(times)

        def take(scheduler_step: Any, *args: Any, **kwargs: Any) -> Any:
            result, (before, after) = scheduler_step(*args, **kwargs), next(moves)
            answer, _, sample = step_arguments(scheduler_step, args, kwargs)
            moved = (sample.float() + (after - before) * flow.sign * answer.float()).to(first_sample(result))
            return with_sample(result, moved)

        trace = _stock(denoiser, trace.steps[0].sample, take)
    conditioning = denoiser.encode(PROMPTS[:1], device_of(denoiser.network))
    x, errors = trace.steps[0].sample, []
    for step, (before, after) in zip(trace.steps, times, strict=True):
        if flow.rounded:
            timestep = torch.tensor([flow.timestep_of(step)], dtype=torch.float64, device=x.device)
            velocity = flow.sign * denoiser.predict_at(denoiser.network, x, timestep, conditioning)
        else:
            t = torch.tensor([before], device=x.device, dtype=torch.float64)
            velocity = denoiser.velocity(denoiser.network, x, t, conditioning)
        x = (x.float() + (after - before) * velocity).to(step.result.dtype)
        errors.append(_difference(x, step.result))
    return max(errors)


def _is_euler(step: Any, sign: int, before: float, after: float) -> bool:
    moved = step.sample.float() + (after - before) * sign * step.answer.float()
    return _difference(moved, step.result) <= max(_TOLERANCE, 4 * torch.finfo(step.result.dtype).eps)


def _decodes(denoiser: PipelineDenoiser, trace: Trace) -> bool:
    ours, again = (np.asarray(denoiser.decode(trace.steps[-1].result, "np", seed=seed)) for seed in (0, 1))
    if not np.array_equal(ours, again):
        raise UnsupportedPipelineError("its decoding of latents is random")
    return bool(np.array_equal(ours, np.asarray(images_of(trace.output))))


def _sensitivity(denoiser: PipelineDenoiser, noise: Tensor) -> dict[str, float]:
    """Return how much the answer changes with prompt, time and sample."""
    network, device = denoiser.network, noise.device
    one, two = (denoiser.encode([prompt], device) for prompt in PROMPTS)
    early, late = (denoiser.timesteps_at(torch.tensor([t], device=device)) for t in (0.3, 0.7))
    x, other = noise.split(1)
    answer = denoiser.predict_at(network, x, early, one)
    denoiser.predict_at(network, other, late, two)
    if _difference(denoiser.predict_at(network, x, early, one), answer) > 16 * torch.finfo(denoiser.dtype).eps:
        raise UnsupportedPipelineError(f"its network {denoiser.component} {UNEQUAL}")
    return {
        "prompt": _difference(denoiser.predict_at(network, x, early, two), answer),
        "time": _difference(denoiser.predict_at(network, x, late, one), answer),
        "sample": _difference(denoiser.predict_at(network, other, early, one), answer),
    }
