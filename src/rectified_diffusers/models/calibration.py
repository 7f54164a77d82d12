"""Read off a few steps of a stock call how a pipeline uses its network: where sample, time and answer are.

Nothing is known about a pipeline in advance. Each finding is a fact that holds in all recorded steps:

- the argument that equals the scheduler's sample, as a tensor of any shape or as a list of rows,
- the argument that is a line in the scheduler's timestep,
- the factor, mostly 1 or -1, from the network's answer to what the scheduler receives,
- for a flow, the sign with which the first step moves the sample along the scheduler's sigmas.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rectified_diffusers.models.conditioning import equal, map_leaves
from rectified_diffusers.models.stock_call import NetworkCall, Step, StockCall, Trace, UnsupportedPipelineError, stop

PROMPTS = "a red apple", "two dogs at night"
STEPS = 3
_FINEST = 1000  # steps of the grid that is read when timesteps are no line in sigma
_LINES = ((1.0, 0.0), (1e-3, 0.0), (-1.0, 1000.0), (-1e-3, 1.0))
CALL_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, AssertionError, ImportError, OSError)


@dataclass(frozen=True)
class SampleForm:
    """The network's argument for the sample: `shape` is that of one row, in the network's layout."""

    name: str
    form: Literal["tensor", "rows"]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, latents: Tensor, dtype: torch.dtype) -> Any:
        rows = latents.reshape(len(latents), *self.shape).to(dtype)
        return rows if self.form == "tensor" else list(rows)


@dataclass(frozen=True)
class TimeForm:
    """The network's argument for the time: slope * timestep + offset, in the shape `tail` for each row.

    Attributes:
        tail: shape without the batch axis; None for one number for all rows.
        dtype: None for a Python number.
        rounded: the pipeline rounds it, to its half precision or to integers.
    """

    name: str
    slope: float
    offset: float
    tail: tuple[int, ...] | None
    dtype: torch.dtype | None
    rounded: bool

    def of(self, timestep: Tensor, dtype: torch.dtype) -> Any:
        """Return the argument for timesteps `(B,)` of the scheduler, as a tensor of this dtype."""
        if self.rounded:  # as pipelines do: convert, then divide
            time = timestep.to(dtype) / (1 / self.slope) + self.offset
        else:
            time = (self.slope * timestep.double() + self.offset).to(dtype)
        if self.tail is not None:
            return time.reshape(-1, *[1] * len(self.tail)).expand(-1, *self.tail)
        if self.dtype is not None:
            return time if len(time) > 1 else time[0]
        if bool((time != time[0]).any()):
            raise ValueError("the network takes one time for all rows")
        return float(time[0])


@dataclass(frozen=True)
class AnswerForm:
    """How the scheduler's input follows from the network's answer: factor * answer, in the layout of the latents.

    Attributes:
        form: "half" if the network also predicts a variance, in further channels, which is dropped.
        blank: an answer for one row, all zeros.
    """

    form: Literal["tensor", "rows", "half"]
    factor: float
    blank: Any

    def read(self, answer: Any, latent_shape: Sequence[int]) -> Tensor:
        """Return what the scheduler would receive, `(B, *latent_shape)`."""
        return self.factor * _read(answer, self.form, latent_shape)


@dataclass(frozen=True)
class Flow:
    """A straight flow: sigmas along the path, and the sign of what the scheduler receives.

    Attributes:
        sign: 1 if the scheduler receives data - noise, -1 for noise - data.
        ascending: sigma is 0 at noise and 1 at data, t itself, not 1 - t.
        table: sigmas in ascending order and their timesteps, if timesteps are no multiple of sigma.
    """

    sign: int
    ascending: bool
    num_train_timesteps: float
    rounded: bool = False
    table: tuple[Tensor, Tensor] | None = None

    def time_at(self, sigma: float) -> float:
        return sigma if self.ascending else 1 - sigma

    def timestep_at(self, t: Tensor) -> Tensor:
        """Return the scheduler's timesteps, `(B,)` in float64, at flow times t."""
        sigma = t.double() if self.ascending else 1 - t.double()
        if self.table is None:
            return sigma * self.num_train_timesteps
        sigmas, timesteps = (part.to(sigma.device) for part in self.table)
        sigma = sigma.clamp(sigmas[0], sigmas[-1])
        above = torch.searchsorted(sigmas, sigma).clamp(1, len(sigmas) - 1)
        weight = (sigma - sigmas[above - 1]) / (sigmas[above] - sigmas[above - 1])
        return torch.lerp(timesteps[above - 1], timesteps[above], weight)


@dataclass(frozen=True)
class Calibration:
    """How a pipeline uses its network, for one image size.

    Attributes:
        component: name of the network in the pipeline.
        off: arguments of the stock call with which it evaluates the network once per step.
        latent_shape: of one row, in the layout of the scheduler.
        noise_place: index of the noise in the results of `prepare_latents`.
        flow: None for a diffusion pipeline.
        trace: the recorded steps, without guidance.
    """

    component: str
    off: dict[str, Any]
    sample: SampleForm
    time: TimeForm
    answer: AnswerForm
    latent_shape: tuple[int, ...]
    noise_place: int
    flow: Flow | None
    trace: Trace

    def conditioning_of(self, call: NetworkCall) -> dict[str, Any]:
        """Return the arguments of a call that are neither sample nor time."""
        return {name: part for name, part in call.arguments.items() if name not in (self.sample.name, self.time.name)}


def calibrate(call: StockCall, is_flow: bool) -> Calibration:
    """Run a few steps of the stock call without guidance, and read them.

    Raises:
        UnsupportedPipelineError: the pipeline does not fit; the message is the reason.
    """
    off, component, trace = run_unguided(call)
    calls, steps = [one for one in trace.calls if one.component == component], trace.steps
    if steps[0].sample.shape[0] != 1:
        raise UnsupportedPipelineError("the first axis of the scheduler's samples does not count the images")
    varying = [
        name
        for name in calls[-1].arguments
        if not all(equal(calls[-1].arguments[name], other.arguments.get(name)) for other in calls[:-1])
    ]
    sample = _find_sample(varying, calls, steps)
    time = _find_time([name for name in varying if name != sample.name], calls, steps)
    changing = [name for name in varying if name not in (sample.name, time.name)]
    if changing:
        raise UnsupportedPipelineError(f"the network's argument {changing[0]} changes from step to step")
    latent_shape = tuple(steps[0].sample.shape[1:])
    answer = _find_answer(calls, steps)
    place = _find_noise(trace, is_flow)
    if is_flow and not _factor(steps):
        require_ode(call, off, steps[0].sample, place)
        raise UnsupportedPipelineError(
            f"the first step of {type(call.scheduler).__name__} is not an Euler step of a straight flow"
        )
    flow = _find_flow(call, off, steps) if is_flow else None
    return Calibration(component, off, sample, time, answer, latent_shape, place, flow, trace)


def run_unguided(call: StockCall) -> tuple[dict[str, Any], str, Trace]:
    """Return arguments with which the stock call evaluates one network once per step, its component and a trace."""
    found = "no network is evaluated"
    variants: list[dict[str, Any]] = [{}]
    variants += [{name: scale} for name in call.scales for scale in (1.0, 0.0)]
    variants += [dict.fromkeys(call.scales, scale) for scale in (1.0, 0.0) if len(call.scales) > 1]
    for off in variants:
        try:
            trace = call.run(PROMPTS[:1], STEPS, off)
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
        rows = _rows(trace.calls_of(0)[-1], trace.steps[0])
        if set(counts) == {1} and rows == 1:
            if not all(bool(step.result.isfinite().all()) for step in trace.steps):
                raise UnsupportedPipelineError(f"its latents are not finite in {trace.steps[0].sample.dtype}")
            if len(trace.steps) < STEPS:
                raise UnsupportedPipelineError(f"it takes {len(trace.steps)} steps where {STEPS} are set")
            return off, component, trace
        found = f"{max(counts)} evaluations of {rows} rows in a step"
    raise UnsupportedPipelineError(f"its guidance cannot be turned off: {found}")


def _rows(call: NetworkCall, step: Step) -> int:
    """Return the number of rows that a call evaluates for one image."""
    answer = first(call.answer)
    return len(answer) // len(step.sample) if len(step.sample) else 0


def first(answer: Any) -> Any:
    """Return the prediction in a network's answer: a tensor, or a list of rows."""
    if isinstance(answer, Tensor) or (isinstance(answer, list) and all(isinstance(row, Tensor) for row in answer)):
        return answer
    if isinstance(answer, Mapping):
        return next(iter(answer.values()))
    return first(answer[0])


def _flat(value: Any) -> Tensor | None:
    """Return the values of a tensor or of a list of rows, flat and in float32; None for anything else."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(row, Tensor) for row in value):
        return torch.cat([row.float().flatten() for row in value])
    return value.float().flatten() if isinstance(value, Tensor) else None


def _find_sample(varying: Sequence[str], calls: Sequence[NetworkCall], steps: Sequence[Step]) -> SampleForm:
    """Find the argument that equals the scheduler's sample."""
    for name in varying:
        values = [value for call in calls if (value := _flat(call.arguments.get(name))) is not None]
        samples = [step.sample.float().flatten() for step in steps]
        if [value.shape for value in values] != [sample.shape for sample in samples]:
            continue
        pairs = list(zip(values, samples, strict=True))
        argument = calls[0].arguments[name]
        rows = argument if isinstance(argument, Tensor) else argument[0][None]
        rounding = 2 * torch.finfo(rows.dtype).eps
        if all(torch.allclose(value, sample, rtol=rounding, atol=0) for value, sample in pairs):
            form = "tensor" if isinstance(argument, Tensor) else "rows"
            if len(rows) != 1:
                raise UnsupportedPipelineError(f"the first axis of the network's argument {name} is not the batch")
            return SampleForm(name, form, tuple(rows.shape[1:]), rows.dtype)
        scales = [float((value @ sample) / (sample @ sample)) for value, sample in pairs]
        if all(torch.allclose(v, c * s, rtol=1e-2, atol=1e-4) for (v, s), c in zip(pairs, scales, strict=True)):
            raise UnsupportedPipelineError("the network's input is the scheduler's sample times a factor of the step")
    raise UnsupportedPipelineError("no argument of the network is the scheduler's sample")


def _find_time(varying: Sequence[str], calls: Sequence[NetworkCall], steps: Sequence[Step]) -> TimeForm:
    """Find the argument that is a line in the scheduler's timestep, equal for all values of a row."""
    x = torch.tensor([step.timestep for step in steps], dtype=torch.float64)
    for name in varying:
        arguments = [call.arguments.get(name) for call in calls]
        if not all(isinstance(value, (int, float, Tensor)) for value in arguments):
            continue
        tensors = [torch.as_tensor(value) for value in arguments]
        if any(value.numel() == 0 or bool((value != value.flatten()[0]).any()) for value in tensors):
            continue
        y = torch.tensor([float(value.flatten()[0]) for value in tensors], dtype=torch.float64)
        slope = float((y[-1] - y[0]) / (x[-1] - x[0]))
        own = (slope, float(y[0]) - slope * float(x[0]))
        for a, b in (*_LINES, own):
            error, size = float((a * x + b - y).abs().max()), float(y.abs().max())
            if error <= 2**-7 * size and (error <= 1e-5 * size or (a, b) != own):
                is_tensor = isinstance(arguments[0], Tensor)
                tail = tuple(tensors[0].shape[1:]) if is_tensor and tensors[0].ndim else None
                return TimeForm(name, a, b, tail, tensors[0].dtype if is_tensor else None, error > 1e-5 * size)
    raise UnsupportedPipelineError("no argument of the network follows the scheduler's timestep")


def _read(answer: Any, form: str, latent_shape: Sequence[int]) -> Tensor:
    answer = torch.stack(list(answer)) if form == "rows" else answer
    if form == "half":
        answer = answer[:, : answer.shape[1] // 2]
    return answer.float().reshape(len(answer), *latent_shape)


def _find_answer(calls: Sequence[NetworkCall], steps: Sequence[Step]) -> AnswerForm:
    """Find the factor from the network's answer to what the scheduler receives."""
    answers, shape = [first(call.answer) for call in calls], steps[0].sample.shape[1:]
    y = torch.cat([step.answer.float().flatten() for step in steps])
    size = answers[0].numel() if isinstance(answers[0], Tensor) else sum(row.numel() for row in answers[0])
    form = "tensor" if isinstance(answers[0], Tensor) else "rows"
    if form == "tensor" and size == 2 * steps[0].sample.numel():
        form, size = "half", size // 2
    if size == steps[0].sample.numel() and y.numel() == size * len(steps):
        x = torch.cat([_read(answer, form, shape).flatten() for answer in answers])
        factor = float((x @ y) / (x @ x)) if bool(x.any()) else 0.0
        factor = round(factor) if abs(factor - round(factor)) < 1e-3 else factor
        rounding = 4 * torch.finfo(steps[0].answer.dtype).eps
        if factor and float((factor * x - y).abs().max()) <= max(1e-5, rounding) * float(y.abs().max()):
            blank = _blank(calls[0].answer)
            return AnswerForm(form, float(factor), blank)
    raise UnsupportedPipelineError("what the scheduler receives is not a multiple of the network's answer")


def _blank(answer: Any) -> Any:
    """Return zeros in the structure of an answer."""
    return map_answer(answer, lambda leaf: torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf)


def map_answer(answer: Any, function: Callable[[Any], Any]) -> Any:
    """Return a network's answer, possibly an output of diffusers, with a function applied to its leaves."""
    if isinstance(answer, Mapping):
        return type(answer)(**{name: map_answer(part, function) for name, part in answer.items()})
    return map_leaves(answer, function)


def require_ode(call: StockCall, off: Mapping[str, Any], noise: Tensor, place: int, scheduler: Any = None) -> None:
    """Raise `UnsupportedPipelineError` if two random states lead from the same noise to different latents."""
    ends = [
        call.run(PROMPTS[:1], STEPS, off, noise=(noise, place), seed=seed, scheduler=scheduler).steps[-1].result
        for seed in (0, 1)
    ]
    if float((ends[0] - ends[1]).float().norm()) > 16 * torch.finfo(ends[0].dtype).eps * float(ends[0].float().norm()):
        solver = type(call.scheduler if scheduler is None else scheduler).__name__
        raise UnsupportedPipelineError(f"{solver} adds noise, so its data do not follow from the initial noise")


def _factor(steps: Sequence[Step]) -> float:
    """Return the factor c in: last result - first sample = c sum of (difference of sigmas) answer; 0 if it is not so.

    Half precision rounds samples by as much as a short step moves them, so there all steps are taken together.
    """
    if any(step.sigmas is None for step in steps):
        return 0.0
    eps = max(torch.finfo(part.dtype).eps for part in (steps[0].sample, steps[0].answer, steps[0].result))
    rounding = 2 * eps * float(steps[0].sample.float().norm())
    for taken in (steps[:1], steps):
        moved = (taken[-1].result - taken[0].sample).float()
        along = torch.stack([(s.sigmas[1] - s.sigmas[0]) * s.answer.float() for s in taken if s.sigmas]).sum(0)
        size = float(along.norm())
        if rounding < 0.1 * size or len(taken) == len(steps):
            factor = float((moved * along).sum()) / size**2 if size else 0.0
            error = float((moved - factor * along).norm())
            straight = error <= (1e-3 + 2 * eps) * float(moved.norm()) + rounding * len(taken)
            return factor if straight and abs(abs(factor) - 1) <= 0.01 + rounding / size else 0.0
    return 0.0


def _find_flow(call: StockCall, off: dict[str, Any], steps: Sequence[Step]) -> Flow:
    """Find sign, direction and timesteps of a flow; its first step is an Euler step along sigma."""
    scheduler = type(call.scheduler).__name__
    sigmas = [step.sigmas for step in steps if step.sigmas is not None]
    if len(sigmas) != len(steps):
        raise UnsupportedPipelineError(f"{scheduler} has no sigma for each of its steps")
    before, after = sigmas[0]
    factor = _factor(steps)
    ascending = after > before
    sign = 1 if (factor > 0) == ascending else -1
    count = float(call.scheduler.config.get("num_train_timesteps", 1000))
    errors = [abs(step.timestep - count * sigma) for step, (sigma, _) in zip(steps, sigmas, strict=True)]
    if max(errors) <= 1e-6 * count:
        return Flow(sign, ascending, count)
    if max(errors) < 1 and all(step.timestep == int(step.timestep) for step in steps):
        return Flow(sign, ascending, count, rounded=True)
    grid = call.run(PROMPTS[:1], _FINEST, off, on_network=stop).scheduler
    along, order = grid.sigmas[: len(grid.timesteps)].double().cpu().sort()
    timesteps = grid.timesteps.double().cpu()[order]
    if len(along) < _FINEST or bool((along.diff() <= 0).any()):
        raise UnsupportedPipelineError(f"the timesteps of {scheduler} are no function of its sigmas")
    return Flow(sign, ascending, count, table=(along, timesteps))


def _find_noise(trace: Trace, is_flow: bool) -> int:
    """Find the initial sample among the results of `prepare_latents`."""
    start = trace.steps[0].sample
    for place, part in enumerate(trace.prepared or ()):
        if isinstance(part, Tensor) and part.numel() == start.numel() and torch.equal(part.flatten(), start.flatten()):
            # Four standard errors of the deviation of that many unit normal values.
            if is_flow and abs(float(start.float().std()) - 1) > 4 / (2 * start.numel()) ** 0.5:
                raise UnsupportedPipelineError("its initial sample is not noise of unit variance")
            return place
    raise UnsupportedPipelineError("its initial sample is not what prepare_latents returns, so noise cannot be set")
