"""What a stock call did, and the stand-ins that watch it: for networks, noise, text encoders and scheduler."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rectified_diffusers.models.conditioning import parts_of

OnStep = Callable[..., Any]


class Stop(BaseException):
    """Ends a stock `__call__` early. No handler of `Exception` in a pipeline catches it."""


@dataclass(frozen=True)
class NetworkCall:
    """A call of a network: name of the component, arguments by name, answer, and the number of steps before it."""

    component: str
    arguments: dict[str, Any]
    answer: Any
    step: int


@dataclass(frozen=True)
class Step:
    """A step of the scheduler, from `sample` to `result`; sigmas before and after it are None if it has none."""

    answer: Tensor
    timestep: float
    sample: Tensor
    result: Tensor
    sigmas: tuple[float, float] | None


@dataclass
class Trace:
    """What a stock call did."""

    calls: list[NetworkCall] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    prepared: list[Tensor] | None = None
    encoded: list[Any] = field(default_factory=list)
    scheduler: Any = None
    output: Any = None
    record: bool = True

    def calls_of(self, step: int) -> list[NetworkCall]:
        return [call for call in self.calls if call.step == step]


class StandIn:
    """Takes the place of a network in a private copy of a pipeline; a call runs `on_call(*args, **kwargs)`.

    `isinstance` sees the class of the network.
    """

    def __init__(self, network: Any, on_call: Callable[..., Any]) -> None:
        self.__dict__.update(_network=network, _on_call=on_call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._on_call(*args, **kwargs)

    forward = __call__

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self.__dict__["_network"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_network"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_network"], name, value)


def bind(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a network by name; those without a name are numbered, such as `args0`."""
    signature = inspect.signature(network.forward)
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL:
            bound |= {f"{name}{i}": value for i, value in enumerate(bound.pop(name, ()))}
    return dict(bound)


def positional(network: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of the names that `bind` returned which a call must give by their order."""
    parameters = inspect.signature(network.forward).parameters.values()
    further = next((one.name for one in parameters if one.kind is one.VAR_POSITIONAL), None)
    numbered = [name for name in names if further and re.fullmatch(rf"{further}\d+", name)]
    before = [
        one.name
        for one in parameters
        if one.kind is one.POSITIONAL_ONLY or (numbered and one.kind is one.POSITIONAL_OR_KEYWORD)
    ]
    return (*(name for name in before if name in names), *numbered)


def step_arguments(step: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any, Tensor]:
    """Return prediction, timestep and sample from the arguments of a scheduler's step, its first three."""
    usual = ["model_output", "timestep", "sample"]
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    names = [name for name, part in inspect.signature(step).parameters.items() if part.kind not in kinds]
    names = names if len(names) >= len(usual) else usual
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    answer, timestep, sample = (given[name] for name in (usual if set(usual) <= given.keys() else names[:3]))
    return answer, timestep, sample


def first_sample(result: Any) -> Tensor:
    """Return the sample in the result of `scheduler.step`."""
    if isinstance(result, Tensor):
        return result
    return result[0] if isinstance(result, tuple) else result.prev_sample


def with_sample(result: Any, sample: Tensor) -> Any:
    """Return the result of `scheduler.step` with another sample."""
    if isinstance(result, Tensor):
        return sample
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result.prev_sample = sample
    return result


def images_of(output: Any) -> Any:
    """Return the images in the output of a stock call."""
    if isinstance(output, Mapping):
        return next(iter(output.values()))
    listed = isinstance(output, list) and not isinstance(output[0], (Tensor, list))
    if listed or isinstance(output, (Tensor, np.ndarray)):
        return output
    return output[0] if isinstance(output, Sequence) else next(iter((parts_of(output) or {}).values()))


def watched_step(solver: Any, trace: Trace, on_step: OnStep | None) -> Callable[..., Any]:
    """Return a `step` that records its arguments and its result."""
    step = solver.step

    @functools.wraps(step)  # pipelines read its signature
    def watched(*args: Any, **kwargs: Any) -> Any:
        answer, timestep, sample = step_arguments(step, args, kwargs)
        sample, index = sample.clone(), len(trace.steps)
        result = step(*args, **kwargs) if on_step is None else on_step(step, *args, **kwargs)
        sigmas = getattr(solver, "sigmas", None)
        around = None
        if sigmas is not None and index + 1 < len(sigmas):
            around = float(sigmas[index]), float(sigmas[index + 1])
        moved = first_sample(result).detach().clone()
        if not trace.record:
            trace.steps.clear()
        time = float(torch.as_tensor(timestep).flatten()[0])
        trace.steps.append(Step(answer.detach().clone(), time, sample.detach(), moved, around))
        return result

    return watched


@dataclass(frozen=True)
class NoisePlace:
    """Where the initial sample of the scheduler enters a stock call.

    Attributes:
        index: of the results of `prepare_latents`; None for the call's argument `latents`.
        order: place of each value of the initial sample in that result, if the call lays it out anew; for one row.
    """

    index: int | None
    order: Tensor | None = None

    def fill(self, part: Tensor, noise: Tensor) -> Tensor:
        """Return the result of `prepare_latents` that becomes the initial sample `noise`."""
        given = noise.to(part)
        if self.order is not None:
            rows = given.flatten(1)
            given = torch.empty_like(rows)
            given[:, self.order.to(rows.device)] = rows
        return given.reshape(part.shape).clone()  # some change it in place


def watched_noise(private: Any, trace: Trace, noise: tuple[Tensor, NoisePlace] | None) -> Callable[..., Any] | None:
    """Return a `prepare_latents` that records its results or replaces one of them; None if there is none."""
    if not hasattr(type(private), "prepare_latents"):
        return None
    prepare = private.prepare_latents

    @functools.wraps(prepare)
    def watched(*args: Any, **kwargs: Any) -> Any:
        drawn = prepare(*args, **kwargs)
        parts = list(drawn) if isinstance(drawn, (tuple, list)) else [drawn]
        index = None if noise is None else noise[1].index
        if noise is not None and index is not None:
            parts[index] = noise[1].fill(parts[index], noise[0])
        trace.prepared = [part.clone() if isinstance(part, Tensor) else part for part in parts]
        return type(drawn)(parts) if isinstance(drawn, (tuple, list)) else parts[0]

    return watched


def watched_encoding(private: Any, trace: Trace, encoded: Sequence[Any] | None) -> Callable[..., Any] | None:
    """Return an `encode_prompt` that records its results or repeats those of another run; None if there is none."""
    if not hasattr(type(private), "encode_prompt"):
        return None
    encode, repeated = private.encode_prompt, iter(encoded or ())

    @functools.wraps(encode)
    def watched(*args: Any, **kwargs: Any) -> Any:
        trace.encoded.append(encode(*args, **kwargs) if encoded is None else next(repeated))
        return trace.encoded[-1]

    return watched
