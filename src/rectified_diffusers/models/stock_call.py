"""The stock `__call__` of a pipeline, on a private copy whose networks, scheduler and noise are watched or replaced.

The copy shares the models and has its own attributes, so neither the pipeline nor its models are changed, and other
threads can use them meanwhile. Stand-ins take the place of the networks: they pass everything on to the network except
its calls.
"""

import copy
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from rectified_diffusers.models.conditioning import map_leaves

OnNetwork = Callable[[Any, str, tuple[Any, ...], dict[str, Any]], Any]
OnStep = Callable[..., Any]


class UnsupportedPipelineError(TypeError):
    """A pipeline that cannot be adapted. The message is one sentence that says why."""


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
    """Takes the place of a network in a private copy of a pipeline; a call runs `on_call(*args, **kwargs)`."""

    def __init__(self, network: Any, on_call: Callable[..., Any]) -> None:
        self.__dict__.update(_network=network, _on_call=on_call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._on_call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_network"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_network"], name, value)


def is_guider(part: Any) -> bool:
    """Return whether a component of a pipeline combines several predictions."""
    return hasattr(part, "disable") and hasattr(part, "num_conditions")


def evaluate(network: Any, component: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the network itself."""
    return network(*args, **kwargs)


def stop(network: Any, component: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """End the stock call in place of a network's first call."""
    raise Stop


class StockCall:
    """A pipeline's stock call with fixed options.

    Args:
        pipeline: it is not changed.
        options: further arguments of the call, such as height and width.
        scheduler: used in place of the pipeline's own.
    """

    def __init__(self, pipeline: Any, options: Mapping[str, Any], scheduler: Any = None) -> None:
        self.pipeline, self.options = pipeline, dict(options)
        kind = type(pipeline).__name__
        if not hasattr(pipeline, "components") or getattr(pipeline, "scheduler", None) is None:
            raise UnsupportedPipelineError(f"{kind} has no scheduler")
        self.scheduler = pipeline.scheduler if scheduler is None else scheduler
        self.networks = {
            name: part
            for name, part in pipeline.components.items()
            if isinstance(part, nn.Module) and (isinstance(part, ModelMixin) or name in ("unet", "transformer"))
            if not hasattr(part, "decode")
        }
        if not self.networks:
            raise UnsupportedPipelineError(f"{kind} has no network that predicts from samples")
        training = [name for name, network in self.networks.items() if network.training]
        if training:
            raise UnsupportedPipelineError(
                f"the {training[0]} of {kind} is in training mode, in which dropout makes its predictions random: "
                f"call pipeline.{training[0]}.eval()"
            )
        self.parameters = dict(inspect.signature(type(pipeline).__call__).parameters)
        self.parameters.pop("self", None)
        self.prompt = self._name("prompt", r"prompts?$|^text$|^caption")
        self.steps = self._name("num_inference_steps", r"steps$")
        self._require_only_a_prompt()
        unknown = sorted(self.options.keys() - self.parameters.keys())
        if unknown:
            raise UnsupportedPipelineError(f"the call of {kind} has no argument {unknown[0]}")
        self.output_type = "output_type" if "output_type" in self.parameters else None
        self.negative = next((name for name in self.parameters if re.match(r"negative_(prompt|text)s?$", name)), None)
        self.scales = [name for name in self.parameters if re.search(r"(guidance|cfg)_scale$", name)]

    def _name(self, usual: str, pattern: str) -> str:
        names = [usual] if usual in self.parameters else [n for n in self.parameters if re.search(pattern, n)]
        if not names:
            raise UnsupportedPipelineError(f"the call of {type(self.pipeline).__name__} takes no {usual}")
        return names[0]

    def _require_only_a_prompt(self) -> None:
        for name, parameter in self.parameters.items():
            optional = parameter.default is not parameter.empty or parameter.kind in (
                parameter.VAR_KEYWORD,
                parameter.VAR_POSITIONAL,
            )
            if not optional and name not in (self.prompt, self.steps, *self.options):
                raise UnsupportedPipelineError(
                    f"the call of {type(self.pipeline).__name__} needs {name} besides the prompt"
                )

    def default(self, name: str) -> Any:
        return self.parameters[name].default

    def run(
        self,
        prompts: Sequence[str],
        steps: int,
        options: Mapping[str, Any],
        *,
        on_network: OnNetwork = evaluate,
        on_step: OnStep | None = None,
        noise: tuple[Tensor, int] | None = None,
        guided: bool = False,
        seed: int = 0,
        scheduler: Any = None,
        encoded: Sequence[Any] | None = None,
        gradient: bool = False,
        record: bool = True,
    ) -> Trace:
        """Run the stock call and return what it did, up to the first `Stop`.

        Args:
            options: arguments of the call, in addition to those of all runs.
            on_network: called in place of the network, with the network, its component name and its arguments.
            on_step: called in place of `scheduler.step`, with the scheduler's bound method and its arguments.
            noise: tensor that replaces what `prepare_latents` returns at an index.
            guided: leaves guider components on.
            scheduler: replaces the pipeline's own; it is copied.
            encoded: results of `encode_prompt` of an earlier run, in order, in place of the text encoders.
            gradient: allows gradients, which the stock call turns off.
            record: keeps all calls and steps; otherwise only the last step.
        """
        trace = Trace(record=record)
        private = self._private_copy(trace, on_network, on_step, noise, encoded, guided=guided, scheduler=scheduler)
        arguments = {self.prompt: prompts[0] if len(prompts) == 1 else list(prompts), self.steps: steps}
        arguments |= {**self.options, **options}
        if "generator" in self.parameters:
            arguments["generator"] = torch.Generator().manual_seed(seed)
        call: Any = type(self.pipeline).__call__
        while gradient and call.__code__.co_name == "decorate_context":  # torch.no_grad
            call = call.__wrapped__
        devices = {part.device for part in self.networks.values() if part.device.type == "cuda"}
        try:
            with torch.random.fork_rng(devices=devices), suppress(Stop), torch.set_grad_enabled(gradient):
                torch.manual_seed(~seed)  # not the generator's, or noise of a step could equal the initial noise
                trace.output = call(private, **arguments)
        finally:
            free = getattr(self.pipeline, "maybe_free_model_hooks", None)
            if free is not None:
                free()
        return trace

    def _private_copy(
        self,
        trace: Trace,
        on_network: OnNetwork,
        on_step: OnStep | None,
        noise: tuple[Tensor, int] | None,
        encoded: Sequence[Any] | None,
        *,
        guided: bool,
        scheduler: Any,
    ) -> Any:
        """Return a shallow copy of the pipeline that records what it does in `trace`."""
        private = copy.copy(self.pipeline)
        own = vars(private)
        for name, network in self.networks.items():
            own[name] = StandIn(network, functools.partial(self._call_network, trace, on_network, network, name))
        solver = copy.deepcopy(self.scheduler if scheduler is None else scheduler)
        solver.step = _watched_step(solver, trace, on_step)
        own["scheduler"] = trace.scheduler = solver
        own["maybe_free_model_hooks"] = lambda: None  # run after the call, on the pipeline that has its networks
        watched = {
            "prepare_latents": _watched_noise(private, trace, noise),
            "encode_prompt": _watched_encoding(private, trace, encoded),
        }
        own.update({name: method for name, method in watched.items() if method is not None})
        if not guided:
            for name, part in self.pipeline.components.items():
                if is_guider(part):
                    own[name] = copy.deepcopy(part)
                    own[name].disable()
        private.set_progress_bar_config(disable=True)
        return private

    def _call_network(
        self, trace: Trace, on_network: OnNetwork, network: Any, component: str, *args: Any, **kwargs: Any
    ) -> Any:
        if not trace.record:
            return on_network(network, component, args, kwargs)
        arguments = bind(network, args, kwargs)
        kept = map_leaves(arguments, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        call = NetworkCall(component, kept, None, len(trace.steps))
        trace.calls.append(call)
        answer = on_network(network, component, args, kwargs)
        trace.calls[-1] = NetworkCall(component, kept, answer, call.step)
        return answer


def bind(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a network by name."""
    signature = inspect.signature(network.forward)
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY) and name in bound:
            raise UnsupportedPipelineError(f"{type(network).__name__} takes arguments without names")
    return dict(bound)


def step_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any, Tensor]:
    """Return prediction, timestep and sample from the arguments of `scheduler.step`, which every scheduler has."""
    names = ("model_output", "timestep", "sample")
    answer, timestep, sample = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
    return answer, timestep, sample


def first_sample(result: Any) -> Tensor:
    """Return the sample in the result of `scheduler.step`."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


def _watched_step(solver: Any, trace: Trace, on_step: OnStep | None) -> Callable[..., Any]:
    """Return a `step` that records its arguments and its result."""
    step = solver.step

    @functools.wraps(step)  # pipelines read its signature
    def watched(*args: Any, **kwargs: Any) -> Any:
        answer, timestep, sample = step_arguments(args, kwargs)
        sample, index = sample.clone(), len(trace.steps)
        result = step(*args, **kwargs) if on_step is None else on_step(step, *args, **kwargs)
        sigmas = getattr(solver, "sigmas", None)
        around = None
        if sigmas is not None and index + 1 < len(sigmas):
            around = float(sigmas[index]), float(sigmas[index + 1])
        moved = first_sample(result).detach().clone()
        if not trace.record:
            trace.steps.clear()
        trace.steps.append(Step(answer.detach().clone(), float(timestep), sample.detach(), moved, around))
        return result

    return watched


def _watched_noise(private: Any, trace: Trace, noise: tuple[Tensor, int] | None) -> Callable[..., Any] | None:
    """Return a `prepare_latents` that records its results or replaces one of them; None if there is none."""
    if not hasattr(type(private), "prepare_latents"):
        return None
    prepare = private.prepare_latents

    @functools.wraps(prepare)
    def watched(*args: Any, **kwargs: Any) -> Any:
        drawn = prepare(*args, **kwargs)
        parts = list(drawn) if isinstance(drawn, tuple) else [drawn]
        if noise is not None:
            given, place = noise
            parts[place] = given.to(parts[place]).reshape(parts[place].shape).clone()  # some change it in place
        trace.prepared = [part.clone() if isinstance(part, Tensor) else part for part in parts]
        return tuple(parts) if isinstance(drawn, tuple) else parts[0]

    return watched


def _watched_encoding(private: Any, trace: Trace, encoded: Sequence[Any] | None) -> Callable[..., Any] | None:
    """Return an `encode_prompt` that records its results or repeats those of another run; None if there is none."""
    if not hasattr(type(private), "encode_prompt"):
        return None
    encode, repeated = private.encode_prompt, iter(encoded or ())

    @functools.wraps(encode)
    def watched(*args: Any, **kwargs: Any) -> Any:
        trace.encoded.append(encode(*args, **kwargs) if encoded is None else next(repeated))
        return trace.encoded[-1]

    return watched
