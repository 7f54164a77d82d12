"""Find out how a stock call guides: by an input of the network, by two passes, or in a way that cannot be repeated.

`guidance.py` applies guidance in passes of our own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.models.calibration import CALL_ERRORS
from rectified_diffusers.models.conditioning import equal, find_axes, split_rows
from rectified_diffusers.models.finding import blank_network
from rectified_diffusers.models.forms import Calibration, rows_of
from rectified_diffusers.models.stock_call import PROMPTS, STEPS, StockCall, is_guider, stop_at
from rectified_diffusers.models.watching import Trace

_SCALE = 3.0
_LINEAR = 1e-4


@dataclass(frozen=True)
class TwoPasses:
    """Guidance by a conditional and an unconditional evaluation of the network.

    Attributes:
        argument: of the stock call, or the name of a guider component.
        options: arguments of the stock call that turn it on.
        batched: both evaluations are one batch of two rows.
        cond_first: the conditional one comes first.
        error: relative difference of u + w (c - u) to what the scheduler receives.
        tolerance: what `error` may be in the precision of the network.
        offset: w - scale: 0, or 1 where scale 0 is no guidance; None if the scale is a guider's own.
    """

    argument: str
    options: dict[str, Any]
    batched: bool
    cond_first: bool
    error: float
    tolerance: float
    offset: float | None

    @property
    def linear(self) -> bool:
        """Whether two evaluations of our own repeat it."""
        return self.error <= self.tolerance and self.offset in (0, 1, None)


@dataclass(frozen=True)
class Guidance:
    """How a stock call guides.

    Attributes:
        inputs: arguments of the stock call that reach the network as a number.
        two_passes: None if there is none.
        unknown: says why an argument for guidance was not understood, by argument.
    """

    inputs: tuple[str, ...] = ()
    two_passes: TwoPasses | None = None
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        if self.two_passes is None:
            unknown = next(iter(self.unknown.values()), None)
            return "input" if self.inputs else "none" if unknown is None else f"not linear ({unknown})"
        passes = self.two_passes
        text = f"{'batched' if passes.batched else 'sequential'}, {'cond' if passes.cond_first else 'uncond'} first"
        return ("input; " if self.inputs else "") + (f"linear, {text}" if passes.linear else f"not linear, {text}")


def find_guidance(call: StockCall, calibration: Calibration) -> Guidance:
    """Classify the guidance of a stock call from a few guided steps."""
    off, unknown = {name: value for name, value in calibration.off.items() if name not in call.switches}, {}
    inputs = tuple(
        name for name in call.scales if name not in off and _reaches_network(call, calibration.component, off, name)
    )
    for name in (*(name for name in call.scales if name not in inputs), *_guiders(call)):
        is_guider = name not in call.scales
        guider = call.pipeline.components[name] if is_guider else None
        scaled = {} if is_guider else {name: _SCALE}
        # Without a negative prompt the unconditional is the pipeline's own; some guide only if there is one.
        for negative in ({}, call.negated):
            options = {**off, **scaled, **negative}
            trace = call.run(PROMPTS[:1], STEPS, {**options, **call.latents_only}, guided=is_guider)
            calls = [one for one in trace.calls_of(0) if one.component == calibration.component]
            answers = _passes(trace, calibration, 0)
            if len(answers) == 2:
                two_passes = _fit(answers, trace, calibration, name, options, guider, batched=len(calls) == 1)
                if two_passes is None:
                    unknown[name] = "neither of two passes is the one without guidance"
                    break
                return Guidance(inputs, two_passes, unknown)
            if len(answers) > 2:
                unknown[name] = f"{len(answers)} passes"
    return Guidance(inputs, None, unknown)


def _guiders(call: StockCall) -> list[str]:
    return [name for name, part in call.pipeline.components.items() if is_guider(part)]


def _reaches_network(call: StockCall, component: str, off: dict[str, Any], name: str) -> bool:
    """Return whether an argument of the stock call changes an argument of the network."""
    traces = [
        call.run(PROMPTS[:1], STEPS, {**off, name: scale}, on_network=stop_at(component)) for scale in (2.0, 3.0)
    ]
    one, two = (trace.calls[-1].arguments if trace.calls else {} for trace in traces)
    return not equal(one, two)


def _passes(trace: Trace, calibration: Calibration, step: int) -> list[Tensor]:
    """Return the answers of a step, one for each row that the network evaluates."""
    calls = [call for call in trace.calls_of(step) if call.component == calibration.component]
    return [row for call in calls for row in calibration.answer.read(call.answer, calibration.latent_shape)]


def _fit(
    answers: list[Tensor],
    trace: Trace,
    calibration: Calibration,
    name: str,
    options: dict[str, Any],
    guider: Any,
    *,
    batched: bool,
) -> TwoPasses | None:
    """Fit w in target = u + w (c - u); c is the answer that equals the one without guidance. None if there is none."""
    unguided = calibration.trace.steps[0].answer[0].float()
    distances = [float((answer - unguided).norm() / unguided.norm()) for answer in answers]
    eps = torch.finfo(rows_of(calibration.answer.pick(calibration.trace.calls[-1].answer)).dtype).eps
    finite = bool(trace.steps[0].answer.isfinite().all())
    if not finite or not min(distances) <= max(_LINEAR, 64 * eps):
        return None
    cond_first = distances[0] <= distances[1]
    weight, errors = 0.0, []
    for i, step in enumerate(trace.steps):  # some guide in a part of the steps only
        passes = _passes(trace, calibration, i)
        if len(passes) != 2:
            errors.append(math.inf)
            continue
        cond, uncond = passes if cond_first else reversed(passes)
        target, apart = step.answer[0].float(), (cond - uncond).flatten()
        if i == 0 and bool(apart.any()):
            weight = float((target - uncond).flatten() @ apart / (apart @ apart))
        errors.append(float((torch.lerp(uncond, cond, weight) - target).abs().max() / target.abs().max()))
    # Other guiders change their formula in later steps than those that are recorded.
    plain = name in options or type(guider) is ClassifierFreeGuidance
    error = max(errors) if plain else math.inf
    offset = None if name not in options else weight - options[name]
    # The weight of a small difference is imprecise.
    if offset is not None and abs(offset - round(offset)) < (0.05 if eps < 1e-4 else 0.3):
        offset = float(round(offset))
    return TwoPasses(name, options, batched, cond_first, error, max(_LINEAR, 8 * eps), offset)


def unconditional(call: StockCall, calibration: Calibration, two_passes: TwoPasses) -> dict[str, Any]:
    """Return the conditioning that the pipeline guides away from; the network is not evaluated."""
    guided = two_passes.argument not in call.scales

    def conditioning(prompts: Sequence[str]) -> dict[str, Any]:
        before = 0 if two_passes.batched or not two_passes.cond_first else 1
        network = blank_network(calibration.component, calibration.answer.blank, calls=before)
        trace = call.run(prompts, STEPS, two_passes.options, on_network=network, guided=guided)
        return calibration.conditioning_of(trace.calls[-1])

    found = conditioning(PROMPTS[:1])
    if not two_passes.batched:
        return found
    # The passes of two prompts have twice the rows of those of one prompt, which have twice the rows of one pass.
    unguided = calibration.conditioning_of(calibration.trace.calls[-1])
    for axes in (lambda: find_axes(found, conditioning([PROMPTS[0]] * 2)), lambda: find_axes(unguided, found)):
        try:
            return split_rows(found, axes(), 2)[1 if two_passes.cond_first else 0]
        except torch.OutOfMemoryError:
            raise
        except CALL_ERRORS:
            continue
    raise UnsupportedPipelineError("its unconditional cannot be separated from the batch of two that it makes")
