"""Read off a few steps of a stock call how a pipeline uses its network: where sample, time and answer are.

Nothing is known about a pipeline in advance. Each finding is a fact that holds in all recorded steps:

- the argument that equals the scheduler's sample, as a tensor of any shape or as a list of rows,
- the argument that is a line in the scheduler's timestep,
- the factor, mostly 1 or -1, from the network's answer to what the scheduler receives,
- for a flow, the sign with which the first step moves the sample along the scheduler's sigmas.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.models.conditioning import equal
from rectified_diffusers.models.finding import (
    blank_network,
    find_answer,
    find_flow,
    find_noise,
    find_sample,
    find_time,
    flat,
    rows_per_image,
    step_factor,
    with_sigmas,
)
from rectified_diffusers.models.forms import Calibration, Flow
from rectified_diffusers.models.stock_call import PROMPTS, STEPS, StockCall
from rectified_diffusers.models.watching import (
    NetworkCall,
    NoisePlace,
    Step,
    Stop,
    Trace,
    positional,
)

_OTHER_STEPS = 20  # steps of a grid that is read without evaluating the network
UNEQUAL = "answers equal inputs differently: it is random, or it depends on earlier calls"
CALL_ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    ImportError,
    OSError,
)


def calibrate(call: StockCall, is_flow: bool) -> Calibration:
    """Run a few steps of the stock call without guidance, and read them.

    Raises:
        UnsupportedPipelineError: the pipeline does not fit; the message is the reason.
    """
    off, component, trace = run_unguided(call)
    call.require_evaluation(component)
    calls, steps = [one for one in trace.calls if one.component == component], trace.steps
    if steps[0].sample.shape[0] != 1:
        raise UnsupportedPipelineError("the first axis of the scheduler's samples does not count the images")
    varying = [
        name
        for name in calls[-1].arguments
        if not all(equal(calls[-1].arguments[name], other.arguments.get(name)) for other in calls[:-1])
    ]
    sample = find_sample(varying, calls, steps)
    answer = find_answer(calls, steps)
    place = find_noise(call, off, component, answer, trace, is_flow)
    flow = None
    if is_flow:
        measured, steps = steps[0].sigmas is None, with_sigmas(steps)
        if not step_factor(steps):
            require_ode(call, off, steps[0].sample, place)
            raise UnsupportedPipelineError(
                f"the first step of {type(call.scheduler).__name__} is not an Euler step of a straight flow"
            )
        flow = find_flow(call, off, component, steps, measured)
    names = [name for name in varying if name != sample.name]
    by_order = positional(call.networks[component], list(calls[-1].arguments))
    latent_shape = tuple(steps[0].sample.shape[1:])

    def finish(flow: Flow | None) -> Calibration:
        """Find the time along the timesteps of a flow."""
        along = [replace(step, timestep=step.timestep if flow is None else flow.timestep_of(step)) for step in steps]
        found = {name: find_time(name, calls, along) for name in names}
        times = tuple(form for form in found.values() if form is not None)
        if not times:
            raise UnsupportedPipelineError("no argument of the network follows the scheduler's timestep")
        changing = [name for name, form in found.items() if form is None]
        if changing:
            raise UnsupportedPipelineError(f"the network's argument {changing[0]} changes from step to step")
        made = Calibration(component, off, sample, times, answer, by_order, latent_shape, place, flow, trace)
        require_any_steps(call, made)
        return made

    try:
        return finish(flow)
    except UnsupportedPipelineError:
        if flow is None:
            raise
        with suppress(UnsupportedPipelineError):  # timesteps may be only the numbers of the steps
            return finish(Flow(flow.sign, flow.ascending, 1000.0, by_sigma=True))
        raise


def run_unguided(call: StockCall) -> tuple[dict[str, Any], str, Trace]:
    """Return arguments with which the stock call evaluates one network once per step, its component and a trace."""
    found = "no network is evaluated"
    variants: list[dict[str, Any]] = [{}, *({name: False} for name in call.switches)]
    variants += [{name: scale} for name in call.scales for scale in (1.0, 0.0)]
    variants += [dict.fromkeys(call.scales, scale) for scale in (1.0, 0.0) if len(call.scales) > 1]
    for off in variants:
        try:
            trace = _run_off(call, off)
        except torch.OutOfMemoryError:
            raise
        except CALL_ERRORS as error:
            if off:  # a scale that this pipeline does not take
                continue
            raise UnsupportedPipelineError(
                f"its call with nothing but a prompt fails with {type(error).__name__}: {error}"
            ) from error
        if not trace.steps:
            raise UnsupportedPipelineError("its call takes no step of the scheduler")
        if not trace.calls_of(0):
            raise UnsupportedPipelineError("its call evaluates no network before its first step")
        # Others may be called before the first step, such as networks that refine the text embeddings.
        components = {calls[-1].component for i in range(len(trace.steps)) if (calls := trace.calls_of(i))}
        components |= {one.component for one in trace.calls if one.step > 0}
        if len(components) > 1:
            raise UnsupportedPipelineError(f"it has several networks: {', '.join(sorted(components))}")
        component = components.pop()
        counts = [sum(one.component == component for one in trace.calls_of(i)) for i in range(len(trace.steps))]
        rows = rows_per_image(trace.calls_of(0)[-1], trace.steps[0])
        if set(counts) == {1} and rows == 1:
            _require_steps(call, trace)
            return off, component, trace
        found = f"{max(counts)} evaluations of {rows} rows in a step"
        own = [one for one in trace.calls_of(0) if one.component == component]
        if min(counts) == 0:
            raise UnsupportedPipelineError(f"its network {component} is not evaluated in every step")
        if max(counts) > 1 and _moves_within_step(own, trace.steps[0]):
            found = f"{max(counts)} evaluations in a step, at different points, as solvers of second order do"
    raise UnsupportedPipelineError(f"its guidance cannot be turned off: {found}")


def _run_off(call: StockCall, off: Mapping[str, Any]) -> Trace:
    """Run a few steps; find out first whether a prompt is a list of one, and whether the call can return latents."""
    if off:
        return call.run(PROMPTS[:1], STEPS, {**off, **call.latents_only})
    reason: Exception | None = None
    for call.listed, call.latents in ((False, True), (False, False), (True, True), (True, False)):
        try:
            trace = call.run(PROMPTS[:1], STEPS, call.latents_only)
        except torch.OutOfMemoryError:
            raise
        except CALL_ERRORS as error:
            reason = reason or error
            continue
        if not call.listed and trace.steps and len(trace.steps[0].sample) == len(PROMPTS[0]):
            call.listed = True  # there was an image for each letter
            return call.run(PROMPTS[:1], STEPS, call.latents_only)
        return trace
    raise reason or RuntimeError


def _require_steps(call: StockCall, trace: Trace) -> None:
    """Raise unless a trace has the steps that were set, with finite results that are the next step's samples."""
    steps, solver = trace.steps, type(call.scheduler).__name__
    if not all(bool(step.result.isfinite().all()) for step in steps):
        raise UnsupportedPipelineError(f"its latents are not finite in {steps[0].sample.dtype}")
    if len(steps) < STEPS:
        raise UnsupportedPipelineError(f"it takes {len(steps)} steps where {STEPS} are set")
    if len(steps) > STEPS:
        raise UnsupportedPipelineError(
            f"{solver} evaluates the network {len(steps)} times for {STEPS} steps, as solvers of second order do"
        )


def _moves_within_step(calls: Sequence[NetworkCall], step: Step) -> bool:
    """Return whether the network is evaluated at other points than the scheduler's sample."""
    start = step.sample.float().flatten()
    values = [
        [value for part in call.arguments.values() if (value := flat(part)) is not None and value.shape == start.shape]
        for call in calls
    ]
    at_start = [any(bool(torch.equal(value, start)) for value in candidates) for candidates in values]
    return any(at_start) and not all(at_start)


def require_any_steps(call: StockCall, found: Calibration) -> None:
    """Raise if what was found does not hold for another number of steps. The network is not evaluated."""
    stepped = False
    blank = blank_network(found.component, found.answer.blank)

    def answer(network: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if stepped and name != found.component:
            raise Stop
        return blank(network, name, args, kwargs)

    def take(step: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal stepped
        stepped = True
        return step(*args, **kwargs)

    options = {**found.off, **call.latents_only}
    encoded = found.trace.encoded or None
    try:
        trace = call.run(PROMPTS[:1], _OTHER_STEPS, options, on_network=answer, on_step=take, encoded=encoded)
    except torch.OutOfMemoryError:
        raise
    except CALL_ERRORS as error:
        raise UnsupportedPipelineError(
            f"its call of {_OTHER_STEPS} steps fails with {type(error).__name__}: {error}"
        ) from error
    others = sorted({one.component for one in trace.calls if one.step > 0} - {found.component})
    if others:
        raise UnsupportedPipelineError(f"it has several networks: {', '.join([found.component, *others])}")
    expected = found.conditioning_of(found.trace.calls[-1])
    calls = [one for one in trace.calls if one.component == found.component]
    for one, step in zip(calls, trace.steps, strict=False):
        timestep = step.timestep if found.flow is None else found.flow.timestep_of(step)
        own = found.conditioning_of(one)
        changed = [form.name for form in found.times if not form.fits(one.arguments[form.name], timestep)]
        changed += [name for name in expected.keys() | own.keys() if not equal(own.get(name), expected.get(name))]
        if changed:
            raise UnsupportedPipelineError(
                f"the network's argument {min(changed)} depends on the number of steps of the call"
            )


def require_ode(
    call: StockCall, off: Mapping[str, Any], noise: Tensor, place: NoisePlace, scheduler: Any = None
) -> None:
    """Raise `UnsupportedPipelineError` if two random states lead from the same noise to different latents."""
    one, two = (
        call.run(
            PROMPTS[:1],
            STEPS,
            {**off, **call.latents_only},
            noise=(noise, place),
            seed=seed,
            scheduler=scheduler,
        )
        for seed in (0, 1)
    )
    ends = one.steps[-1].result.float(), two.steps[-1].result.float()
    if float((ends[0] - ends[1]).norm()) <= 16 * torch.finfo(one.steps[-1].result.dtype).eps * float(ends[0].norm()):
        return
    if not equal(one.steps[0].sample, two.steps[0].sample):
        raise UnsupportedPipelineError("its initial sample does not follow from the noise alone")
    first, other = one.calls_of(0)[-1], two.calls_of(0)[-1]
    for name, part in first.arguments.items():
        if not equal(part, other.arguments.get(name)):
            raise UnsupportedPipelineError(f"the network's argument {name} is random")
    if not equal(first.answer, other.answer):
        raise UnsupportedPipelineError(f"its network {first.component} {UNEQUAL}")
    solver = type(call.scheduler if scheduler is None else scheduler).__name__
    raise UnsupportedPipelineError(f"{solver} adds noise, so its data do not follow from the initial noise")
