"""What calibration finds: how a network takes sample and time and answers, and the flow that it belongs to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rectified_diffusers.models.conditioning import parts_of
from rectified_diffusers.models.watching import NetworkCall, NoisePlace, Step, Trace


@dataclass(frozen=True)
class SampleForm:
    """The network's argument for the sample: `shape` is that of one row, in the network's layout.

    Attributes:
        axis: of the argument with its batch axis, along which constant channels surround the sample; None if the
            argument is the sample. They are part of the conditioning, under the argument's name.
        start: channels before the sample.
    """

    name: str
    form: Literal["tensor", "rows"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None = None
    start: int = 0

    def of(self, latents: Tensor, dtype: torch.dtype, around: Any = None) -> Any:
        rows = latents.reshape(len(latents), *self.shape).to(dtype)
        if self.axis is not None:
            before, after = around
            rows = torch.cat([before, rows, after], self.axis)
        return rows if self.form == "tensor" else list(rows)

    def around(self, argument: Any) -> tuple[Tensor, Tensor]:
        """Return the channels before and after the sample."""
        rows, axis = rows_of(argument), self.axis or 1
        end = self.start + self.shape[axis - 1]
        return rows.narrow(axis, 0, self.start), rows.narrow(axis, end, rows.shape[axis] - end)


@dataclass(frozen=True)
class TimeForm:
    """The network's argument for the time: slope * timestep + offset, in the shape `tail` for each row.

    Attributes:
        tail: shape without the batch axis; None for one number for all rows.
        dtype: None for Python numbers.
        rounded: the pipeline rounds it, to its half precision or to integers.
        nearest: to the nearest integer; otherwise the fraction is cut off.
    """

    name: str
    slope: float
    offset: float
    tail: tuple[int, ...] | None
    dtype: torch.dtype | None
    rounded: bool
    nearest: bool = False

    def of(self, timestep: Tensor, dtype: torch.dtype) -> Any:
        """Return the argument for timesteps `(B,)` of the scheduler, as a tensor of this dtype."""
        if self.rounded:  # as pipelines do: convert, then divide
            time = (timestep.round() if self.nearest else timestep).to(dtype) / (1 / self.slope) + self.offset
        else:
            time = (self.slope * timestep.double() + self.offset).to(dtype)
        if self.dtype is None and self.tail is not None:
            return time.tolist()
        if self.tail is not None:
            return time.reshape(-1, *[1] * len(self.tail)).expand(-1, *self.tail)
        if self.dtype is not None:
            return time if len(time) > 1 else time[0]
        if bool((time != time[0]).any()):
            raise ValueError("the network takes one time for all rows")
        return float(time[0])

    def fits(self, argument: Any, timestep: float) -> bool:
        """Return whether an argument is what this form makes of a timestep, up to rounding."""
        values = torch.as_tensor(argument).double().flatten()
        expected = self.slope * timestep + self.offset
        size = max(abs(self.offset), abs(self.slope * timestep), abs(expected))
        return bool(((values - expected).abs() <= (2**-7 if self.rounded else 1e-5) * size).all())


@dataclass(frozen=True)
class AnswerForm:
    """How the scheduler's input follows from the network's answer: factor * prediction, in the layout of the latents.

    Attributes:
        form: "half" if the network also predicts a variance, in further channels, which is dropped.
        blank: an answer for one row, all zeros.
        path: names or indices that lead to the prediction in an answer that has several parts.
    """

    form: Literal["tensor", "rows", "half"]
    factor: float
    blank: Any
    path: tuple[Any, ...] = ()

    def pick(self, answer: Any) -> Any:
        """Return the prediction in an answer: a tensor, or a list of rows."""
        for name in self.path:
            answer = (parts_of(answer) or {})[name]
        return answer

    def read(self, answer: Any, latent_shape: Sequence[int]) -> Tensor:
        """Return what the scheduler would receive, `(B, *latent_shape)`, from a network's answer."""
        return self.factor * read(self.pick(answer), self.form, latent_shape)


@dataclass(frozen=True)
class Flow:
    """A straight flow: sigmas along the path, and the sign of what the scheduler receives.

    Attributes:
        sign: 1 if the scheduler receives data - noise, -1 for noise - data.
        ascending: sigma is 0 at noise and 1 at data, t itself, not 1 - t.
        reverse: timesteps are num_train_timesteps * (1 - sigma).
        table: sigmas in ascending order and their timesteps, if timesteps are no multiple of sigma.
        by_sigma: the network's time follows sigma; num_train_timesteps * sigma takes the place of timesteps.
    """

    sign: int
    ascending: bool
    num_train_timesteps: float
    rounded: bool = False
    reverse: bool = False
    table: tuple[Tensor, Tensor] | None = None
    by_sigma: bool = False

    def timestep_of(self, step: Step) -> float:
        """Return the timestep of a recorded step."""
        if not self.by_sigma or step.sigmas is None:
            return step.timestep
        return self.num_train_timesteps * step.sigmas[0]

    def time_at(self, sigma: float) -> float:
        return sigma if self.ascending else 1 - sigma

    def timestep_at(self, t: Tensor) -> Tensor:
        """Return the scheduler's timesteps, `(B,)` in float64, at flow times t."""
        sigma = t.double() if self.ascending else 1 - t.double()
        if self.table is None:
            return (1 - sigma if self.reverse else sigma) * self.num_train_timesteps
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
        times: the network's arguments that follow the time; most have one.
        positional: arguments of the network that are given by their order.
        latent_shape: of one row, in the layout of the scheduler.
        noise_place: where noise enters the stock call.
        flow: None for a diffusion pipeline.
        trace: the recorded steps, without guidance.
    """

    component: str
    off: dict[str, Any]
    sample: SampleForm
    times: tuple[TimeForm, ...]
    answer: AnswerForm
    positional: tuple[str, ...]
    latent_shape: tuple[int, ...]
    noise_place: NoisePlace
    flow: Flow | None
    trace: Trace

    @property
    def time(self) -> TimeForm:
        return self.times[0]

    def conditioning_of(self, call: NetworkCall) -> dict[str, Any]:
        """Return what a call gives besides sample and time."""
        own = (self.sample.name, *(time.name for time in self.times))
        kept = {name: part for name, part in call.arguments.items() if name not in own}
        if self.sample.axis is not None:
            kept[self.sample.name] = self.sample.around(call.arguments[self.sample.name])
        return kept

    def evaluate(self, network: Any, arguments: Mapping[str, Any]) -> Tensor:
        """Return what the scheduler would receive from a network with these arguments."""
        ordered = [arguments[name] for name in self.positional]
        named = {name: part for name, part in arguments.items() if name not in self.positional}
        return self.answer.read(network(*ordered, **named), self.latent_shape)


def rows_of(argument: Any) -> Tensor:
    """Return a tensor or a list of rows as a tensor."""
    return argument if isinstance(argument, Tensor) else torch.stack(list(argument))


def predictions_in(answer: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the tensors and lists of rows in a network's answer, with their paths."""
    parts = parts_of(answer)
    rows = isinstance(answer, list) and bool(answer) and all(isinstance(row, Tensor) for row in answer)
    if isinstance(answer, Tensor) or rows:
        yield path, answer
    for name, part in (parts or {}).items():
        yield from predictions_in(part, (*path, name))


def read(prediction: Any, form: str, latent_shape: Sequence[int]) -> Tensor:
    """Return a prediction, a tensor or a list of rows, in the layout of the latents."""
    prediction = torch.stack(list(prediction)) if form == "rows" else prediction
    if form == "half":
        prediction = prediction[:, : prediction.shape[1] // 2]
    return prediction.float().reshape(len(prediction), *latent_shape)
