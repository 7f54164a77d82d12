"""Find in the recorded steps of a stock call where sample, time, prediction and noise are, and which flow it is."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.models.conditioning import equal, map_leaves
from rectified_diffusers.models.forms import AnswerForm, Flow, SampleForm, TimeForm, predictions_in, read, rows_of
from rectified_diffusers.models.stock_call import PROMPTS, STEPS, OnNetwork, StockCall, stop_at
from rectified_diffusers.models.watching import NetworkCall, NoisePlace, Step, Stop, Trace

_FINEST = 1000  # steps of the grid that is read when timesteps are no line in sigma
_LINES = ((1.0, 0.0), (1e-3, 0.0), (-1.0, 1000.0), (-1e-3, 1.0))
_DIGIT = 64  # exact in half precision


def rows_per_image(call: NetworkCall, step: Step) -> int:
    """Return the number of rows that a call evaluates for one image."""
    for _, prediction in predictions_of(call, step):
        if size_of(prediction) % step.sample.numel() == 0:
            return len(prediction) // len(step.sample)
    return 0


def predictions_of(call: NetworkCall, step: Step) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the parts of an answer that can be predictions for a step's sample, with their paths."""
    for path, prediction in predictions_in(call.answer):
        several = isinstance(prediction, list) and prediction[0].shape == step.sample.shape
        if not several and size_of(prediction):  # a list of whole predictions is no list of rows
            yield path, prediction


def size_of(prediction: Any) -> int:
    return prediction.numel() if isinstance(prediction, Tensor) else sum(row.numel() for row in prediction)


def flat(value: Any) -> Tensor | None:
    """Return the values of a tensor or of a list of rows, flat and in float32; None for anything else."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(row, Tensor) for row in value):
        return torch.cat([row.float().flatten() for row in value])
    return value.float().flatten() if isinstance(value, Tensor) else None


def find_sample(varying: Sequence[str], calls: Sequence[NetworkCall], steps: Sequence[Step]) -> SampleForm:
    """Find the argument that equals the scheduler's sample, or contains it among other channels."""
    samples = [step.sample.float().flatten() for step in steps]
    for name in varying:
        values = [value for call in calls if (value := flat(call.arguments.get(name))) is not None]
        if [value.shape for value in values] != [sample.shape for sample in samples]:
            continue
        pairs = list(zip(values, samples, strict=True))
        argument = calls[0].arguments[name]
        rows = argument if isinstance(argument, Tensor) else argument[0][None]
        rounding = 2 * torch.finfo(rows.dtype).eps if rows.is_floating_point() else 0.0
        if all(torch.allclose(value, sample, rtol=rounding, atol=0) for value, sample in pairs):
            form = "tensor" if isinstance(argument, Tensor) else "rows"
            if len(rows) != 1:
                raise UnsupportedPipelineError(f"the first axis of the network's argument {name} is not the batch")
            return SampleForm(name, form, tuple(rows.shape[1:]), rows.dtype)
        scales = [float((value @ sample) / (sample @ sample)) for value, sample in pairs]
        if all(torch.allclose(v, c * s, rtol=1e-2, atol=1e-4) for (v, s), c in zip(pairs, scales, strict=True)):
            raise UnsupportedPipelineError("the network's input is the scheduler's sample times a factor of the step")
    for name in varying:
        form = _find_among_channels(name, [call.arguments.get(name) for call in calls], steps)
        if form is not None:
            return form
    raise UnsupportedPipelineError("no argument of the network is the scheduler's sample")


def _find_among_channels(name: str, arguments: Sequence[Any], steps: Sequence[Step]) -> SampleForm | None:
    """Return the form of an argument that is the sample with constant channels before or after it."""
    if not all(flat(argument) is not None for argument in arguments):
        return None
    form = "tensor" if isinstance(arguments[0], Tensor) else "rows"
    rows, samples = [rows_of(argument) for argument in arguments], [step.sample for step in steps]
    shape = samples[0].shape
    if rows[0].ndim != len(shape):
        return None
    wider = [axis for axis in range(1, len(shape)) if rows[0].shape[axis] > shape[axis]]
    others = [axis for axis in range(len(shape)) if axis not in wider]
    if len(wider) != 1 or any(rows[0].shape[axis] != shape[axis] for axis in others):
        return None
    (axis,) = wider
    for start in range(rows[0].shape[axis] - shape[axis] + 1):
        made = SampleForm(name, form, tuple(shape[1:]), rows[0].dtype, axis, start)
        inside = (row.narrow(axis, start, shape[axis]) for row in rows)
        same = all(torch.equal(one, two.to(one)) for one, two in zip(inside, samples, strict=True))
        if same and all(equal(made.around(row), made.around(rows[0])) for row in rows):
            return made
    return None


def find_time(name: str, calls: Sequence[NetworkCall], steps: Sequence[Step]) -> TimeForm | None:
    """Return how an argument is a line in the scheduler's timestep, one for all values of a row; None if it is not."""
    x = torch.tensor([step.timestep for step in steps], dtype=torch.float64)
    arguments = [call.arguments.get(name) for call in calls]
    listed = all(isinstance(value, list) and value for value in arguments)
    if not listed and not all(isinstance(value, (int, float, Tensor)) for value in arguments):
        return None
    try:
        tensors = [torch.as_tensor(value) for value in arguments]
    except (ValueError, TypeError, RuntimeError):  # a list of other things than numbers
        return None
    if any(value.numel() == 0 or bool((value != value.flatten()[0]).any()) for value in tensors):
        return None
    y = torch.tensor([float(value.flatten()[0]) for value in tensors], dtype=torch.float64)
    slope = float((y[-1] - y[0]) / (x[-1] - x[0]))
    own = (slope, float(y[0]) - slope * float(x[0]))
    for a, b in (*_LINES, own):
        error, size = float((a * x + b - y).abs().max()), float(y.abs().max())
        if a and error <= 2**-7 * size and (error <= 1e-5 * size or (a, b) != own):
            is_tensor = isinstance(arguments[0], Tensor)
            tail = tuple(tensors[0].shape[1:]) if tensors[0].ndim else None
            whole = (a, b) == (1.0, 0.0) and bool((y == x.round()).all() and (y != x.trunc()).any())
            dtype = tensors[0].dtype if is_tensor else None
            return TimeForm(name, a, b, tail, dtype, error > 1e-5 * size, whole)
    return None


def find_answer(calls: Sequence[NetworkCall], steps: Sequence[Step]) -> AnswerForm:
    """Find the factor from the network's prediction, a part of its answer, to what the scheduler receives."""
    shape, count = steps[0].sample.shape[1:], steps[0].sample.numel()
    y = torch.cat([step.answer.float().flatten() for step in steps])
    for path, prediction in predictions_of(calls[0], steps[0]):
        form = "tensor" if isinstance(prediction, Tensor) else "rows"
        if form == "tensor" and size_of(prediction) == 2 * count:
            form = "half"
        rows = form == "rows" or len(prediction) == len(steps[0].sample)
        if not rows or size_of(prediction) != (2 if form == "half" else 1) * count or len(y) != count * len(steps):
            continue
        blank = map_leaves(calls[0].answer, lambda leaf: torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf)
        found = AnswerForm(form, 1.0, blank, path)
        x = torch.cat([read(found.pick(call.answer), form, shape).flatten() for call in calls])
        factor = float((x @ y) / (x @ x)) if bool(x.any()) else 0.0
        factor = round(factor) if abs(factor - round(factor)) < 1e-3 else factor
        rounding = 4 * torch.finfo(steps[0].answer.dtype).eps
        if factor and float((factor * x - y).abs().max()) <= max(1e-5, rounding) * float(y.abs().max()):
            return replace(found, factor=float(factor))
    raise UnsupportedPipelineError("what the scheduler receives is not a multiple of the network's answer")


def blank_network(component: str, blank: Any, calls: int | None = None) -> OnNetwork:
    """Return what takes the place of a network's calls: zeros, and the end of the stock call after some of them."""
    made = 0

    def answer(network: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal made
        if name != component:
            return network(*args, **kwargs)
        if made == calls:
            raise Stop
        made += 1
        return map_leaves(blank, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)

    return answer


def find_noise(
    call: StockCall, off: Mapping[str, Any], component: str, answer: AnswerForm, trace: Trace, is_flow: bool
) -> NoisePlace:
    """Find the initial sample among the results of `prepare_latents`, in any layout, or in the argument `latents`."""
    start = trace.steps[0].sample

    def first_sample(noise: Tensor, place: NoisePlace) -> Tensor:
        network = blank_network(component, answer.blank, calls=1)
        return call.run(PROMPTS[:1], STEPS, off, on_network=network, noise=(noise, place)).steps[0].sample

    found = None
    for index, part in enumerate(trace.prepared or ()):
        if found is None and isinstance(part, Tensor) and part.numel() == start.numel():
            if torch.equal(part.flatten().to(start), start.flatten()):
                found = NoisePlace(index)
            elif len(part) == 1:
                order = _find_order(start, lambda digits, i=index: first_sample(digits, NoisePlace(i)))
                found = None if order is None else NoisePlace(index, order)
    if found is None and "latents" in call.parameters:
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(1)).to(start)
        found = NoisePlace(None) if torch.equal(first_sample(noise, NoisePlace(None)), noise) else None
    if found is None:
        raise UnsupportedPipelineError(
            "its initial sample is not what prepare_latents returns, so noise cannot be set"
        )
    # Four standard errors of the deviation of that many unit normal values.
    if is_flow and abs(float(start.float().std()) - 1) > 4 / (2 * start.numel()) ** 0.5:
        raise UnsupportedPipelineError("its initial sample is not noise of unit variance")
    return found


def _find_order(start: Tensor, first_sample: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Return the place of each value of the initial sample in what `prepare_latents` returned; None if there is none.

    The places themselves go in as noise, digit by digit.
    """
    count = start.numel()
    places = torch.arange(count)
    order = torch.zeros(count, dtype=torch.long)
    for power in range(math.ceil(math.log(max(count, 2), _DIGIT))):
        digits = (places // _DIGIT**power % _DIGIT).reshape(start.shape).to(start)
        seen = first_sample(digits).flatten().cpu()
        if not bool((seen == seen.round()).all()):
            return None
        order += seen.long() * _DIGIT**power
    return order if torch.equal(order.sort().values, places) else None


def with_sigmas(steps: Sequence[Step]) -> list[Step]:
    """Return steps with sigmas: those of the scheduler, or else by how far each step moves along the prediction."""
    if all(step.sigmas is not None for step in steps):
        return list(steps)
    lengths = []
    for step in steps:
        moved, along = (step.result - step.sample).float(), step.answer.float()
        length = float((moved * along).sum() / along.square().sum())
        if float((moved - length * along).norm()) > 1e-3 * float(moved.norm()):
            return list(steps)
        lengths.append(abs(length))
    if abs(sum(lengths) - 1) > 1e-3:
        return list(steps)
    left = [sum(lengths[i:]) for i in range(len(steps) + 1)]
    return [replace(step, sigmas=(left[i], left[i + 1])) for i, step in enumerate(steps)]


def step_factor(steps: Sequence[Step]) -> float:
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


def find_flow(call: StockCall, off: Mapping[str, Any], component: str, steps: Sequence[Step], measured: bool) -> Flow:
    """Find sign, direction and timesteps of a flow; its first step is an Euler step along sigma.

    Args:
        measured: sigmas are those of `with_sigmas`, the scheduler has none.
    """
    scheduler = type(call.scheduler).__name__
    sigmas = [step.sigmas for step in steps if step.sigmas is not None]
    if len(sigmas) != len(steps):
        raise UnsupportedPipelineError(f"{scheduler} has no sigma for each of its steps")
    before, after = sigmas[0]
    ascending = after > before
    sign = 1 if (step_factor(steps) > 0) == ascending else -1
    count = float(getattr(call.scheduler, "config", {}).get("num_train_timesteps", 1000))
    for scale, reverse in ((count, False), (1.0, False), (count, True), (1.0, True)):
        line = [scale * (1 - sigma if reverse else sigma) for sigma, _ in sigmas]
        errors = [abs(step.timestep - value) for step, value in zip(steps, line, strict=True)]
        if max(errors) <= (1e-4 if measured else 1e-6) * scale:
            return Flow(sign, ascending, scale, reverse=reverse)
        if scale > 1 and max(errors) < 1 and all(step.timestep == int(step.timestep) for step in steps):
            return Flow(sign, ascending, scale, rounded=True, reverse=reverse)
    grid = call.run(PROMPTS[:1], _FINEST, off, on_network=stop_at(component)).scheduler
    if measured or len(grid.timesteps) < _FINEST:
        raise UnsupportedPipelineError(f"the timesteps of {scheduler} are no function of its sigmas")
    along, order = grid.sigmas[: len(grid.timesteps)].double().cpu().sort()
    timesteps = grid.timesteps.double().cpu()[order]
    if bool((along.diff() <= 0).any()):
        raise UnsupportedPipelineError(f"the timesteps of {scheduler} are no function of its sigmas")
    return Flow(sign, ascending, count, table=(along, timesteps))
