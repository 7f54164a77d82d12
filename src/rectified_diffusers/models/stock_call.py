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
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.models.conditioning import map_leaves
from rectified_diffusers.models.watching import (
    NetworkCall,
    NoisePlace,
    OnStep,
    StandIn,
    Stop,
    Trace,
    bind,
    watched_encoding,
    watched_noise,
    watched_step,
)

PROMPTS = "a red apple", "two dogs at night"
STEPS = 3
OnNetwork = Callable[[Any, str, tuple[Any, ...], dict[str, Any]], Any]


def is_guider(part: Any) -> bool:
    """Return whether a component of a pipeline combines several predictions."""
    return hasattr(part, "disable") and hasattr(part, "num_conditions")


def evaluate(network: Any, component: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the network itself."""
    return network(*args, **kwargs)


def stop_at(component: str) -> OnNetwork:
    """Return what ends the stock call in place of a network's first call. Others are evaluated."""

    def stop(network: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == component:
            raise Stop
        return network(*args, **kwargs)

    return stop


def device_of(network: Any) -> torch.device:
    """Return the device of a network, which may be any module."""
    return network.device if hasattr(network, "device") else next(network.parameters()).device


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
            for name, part in {**vars(pipeline), **pipeline.components}.items()  # some components are not listed
            if isinstance(part, nn.Module) and not isinstance(part, PreTrainedModel) and not hasattr(part, "decode")
        }
        if not self.networks:
            raise UnsupportedPipelineError(f"{kind} has no network that predicts from samples")
        for name, network in self.networks.items():
            if isinstance(network, ModelMixin):
                self.require_evaluation(name)
        self.parameters = dict(inspect.signature(type(pipeline).__call__).parameters)
        self.parameters.pop("self", None)
        self.prompt = self._name("prompt", r"^(?!negative).*(prompt|text|caption|description|sentence)s?$")
        self.steps = self._name("num_inference_steps", r"steps$|^(num_)?iterations$|^nfe$")
        self.listed = False  # whether a single prompt is a list of one; both are found by calibration
        self.latents = True  # whether output_type="latent" is known
        self._require_only_a_prompt()
        unknown = sorted(self.options.keys() - self.parameters.keys())
        if unknown:
            raise UnsupportedPipelineError(f"the call of {kind} has no argument {unknown[0]}")
        self.output_type = "output_type" if "output_type" in self.parameters else None
        self.negative = next((name for name in self.parameters if re.match(r"negative_(prompt|text)s?$", name)), None)
        guidance = [name for name in self.parameters if re.search(r"(guidance|cfg)", name)]
        scale = re.compile(r"(guidance|cfg)(_(scale|weight|strength|factor))?$")
        self.scales = [name for name in guidance if scale.search(name) and not isinstance(self.default(name), bool)]
        self.switches = [name for name in guidance if self.default(name) is True]

    def require_evaluation(self, component: str) -> None:
        if self.networks[component].training:
            raise UnsupportedPipelineError(
                f"the {component} of {type(self.pipeline).__name__} is in training mode, in which dropout makes its "
                f"predictions random: call pipeline.{component}.eval()"
            )

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

    @property
    def latents_only(self) -> dict[str, str]:
        """Return the argument of the call with which it does not decode; none if it has none."""
        return {self.output_type: "latent"} if self.output_type and self.latents else {}

    @property
    def negated(self) -> dict[str, Any]:
        """Return the argument of the call for an empty negative prompt; none if it has none."""
        return {self.negative: [""] if self.listed else ""} if self.negative else {}

    def prompted(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Return the argument of the call for prompts."""
        return {self.prompt: prompts[0] if len(prompts) == 1 and not self.listed else list(prompts)}

    def run(
        self,
        prompts: Sequence[str],
        steps: int,
        options: Mapping[str, Any],
        *,
        on_network: OnNetwork = evaluate,
        on_step: OnStep | None = None,
        noise: tuple[Tensor, NoisePlace] | None = None,
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
            noise: initial sample of the scheduler, and where it enters.
            guided: leaves guider components on.
            scheduler: replaces the pipeline's own; it is copied.
            encoded: results of `encode_prompt` of an earlier run, in order, in place of the text encoders.
            gradient: allows gradients, which the stock call turns off.
            record: keeps all calls and steps; otherwise only the last step.
        """
        trace = Trace(record=record)
        private = self._private_copy(trace, on_network, on_step, noise, encoded, guided=guided, scheduler=scheduler)
        arguments = {**self.prompted(prompts), self.steps: steps, **self.options, **options}
        if noise is not None and noise[1].index is None:
            arguments["latents"] = noise[0].clone()
        if "generator" in self.parameters:
            arguments["generator"] = torch.Generator().manual_seed(seed)
        call: Any = type(self.pipeline).__call__
        while gradient and call.__code__.co_name == "decorate_context":  # torch.no_grad
            call = call.__wrapped__
        devices = {device for part in self.networks.values() if (device := device_of(part)).type == "cuda"}
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
        noise: tuple[Tensor, NoisePlace] | None,
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
        solver.step = watched_step(solver, trace, on_step)
        own["scheduler"] = trace.scheduler = solver
        own["maybe_free_model_hooks"] = lambda: None  # run after the call, on the pipeline that has its networks
        watched = {
            "prepare_latents": watched_noise(private, trace, noise),
            "encode_prompt": watched_encoding(private, trace, encoded),
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
