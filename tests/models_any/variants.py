"""Pipelines that no one has seen, each with a habit of its own, and others that cannot be adapted."""

# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false, reportOptionalSubscript=false
# That they differ is the point.

import functools
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

CHANNELS, SIDE, WIDTH = 4, 4, 8


class Words(ModelMixin, ConfigMixin):
    """An embedding for each letter."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, WIDTH)

    def forward(self, letters: Tensor) -> Tensor:
        return self.table(letters)


class Network(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A velocity for each pixel."""

    @register_to_config
    def __init__(self, channels: int = CHANNELS, more: int = 0) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels + more, 16)
        self.to_k = nn.Linear(WIDTH, 16)
        self.to_v = nn.Linear(1, 16)
        self.to_out = nn.ModuleList([nn.Linear(16, channels)])

    def velocity(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Return the velocity at x `(B, C, ...)`, t `(B,)` in [0, 1] and text `(B, W)`."""
        hidden = self.to_q(x.movedim(1, -1)).movedim(-1, 1)
        context = self.to_k(text) + self.to_v(t.to(text)[:, None])
        hidden = (hidden + context.reshape(*context.shape, *[1] * (x.ndim - 2))).tanh()
        return self.to_out[0](hidden.movedim(1, -1)).movedim(-1, 1)

    def forward(self, x: Tensor, t: Tensor, text: Any, return_dict: bool = True) -> Any:
        return (self.velocity(x, t / 1000, text.mean(1)),)


class Variant(DiffusionPipeline):
    """A flow from text to 4 x 4 images; subclasses replace a part."""

    network_class: Any = Network
    scheduler_class: Any = functools.partial(FlowMatchEulerDiscreteScheduler, shift=2.0)
    shape: tuple[int, ...] = (CHANNELS, SIDE, SIDE)
    guided = False

    def __init__(self, network: Any, words: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(network=network, words=words, scheduler=scheduler)

    @classmethod
    def make(cls) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline = cls(cls.network_class().eval(), Words().eval(), cls.scheduler_class())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def encode_prompt(self, texts: list[str]) -> Tensor:
        length = max(1, *(len(text) for text in texts))
        letters = [[ord(letter) % 64 for letter in text.ljust(length)] or [0] for text in texts]
        return self.words(torch.tensor(letters))

    def prepare_latents(self, count: int, generator: Any) -> Any:
        return torch.randn(count, *self.shape, generator=generator).to(self.network.dtype)

    def set_timesteps(self, steps: int) -> None:
        self.scheduler.set_timesteps(steps)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any,
        num_inference_steps: int = 4,
        guidance_scale: float = 3.0,
        generator: Any = None,
        output_type: str = "pil",
    ) -> Any:
        return self.run(prompt, num_inference_steps, guidance_scale, generator, output_type)

    def run(self, prompt: Any, steps: int, scale: float, generator: Any, output_type: str) -> Any:
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        words, null = self.encode_prompt(texts), self.encode_prompt([""] * len(texts))
        latents = self.start(self.prepare_latents(len(texts), generator))
        self.set_timesteps(steps)
        for i, timestep in enumerate(self.scheduler.timesteps):
            prediction = self.predict(latents, timestep, words, i)
            if self.guided and scale > 1:
                prediction = self.guide(prediction, self.predict(latents, timestep, null, i), scale, i)
            latents = self.after(self.step(prediction, timestep, latents))
        return self.output(latents, output_type)

    def start(self, latents: Any) -> Tensor:
        return latents

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        return self.network(latents, timestep.expand(len(latents)), words, return_dict=False)[0]

    def guide(self, cond: Tensor, uncond: Tensor, scale: float, i: int) -> Tensor:
        return uncond + scale * (cond - uncond)

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        return self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]

    def after(self, latents: Tensor) -> Tensor:
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        return (latents.float()[:, :3] / 4 + 0.5).clamp(0, 1)

    def output(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return (latents,)
        images = self.decode(latents)
        if output_type == "pt":
            return (images,)
        arrays = images.movedim(1, -1).numpy()
        return (arrays if output_type == "np" else self.numpy_to_pil(arrays),)


# Conditioning


@dataclass
class Text:
    embeds: Tensor
    lengths: list[int]


Pair = namedtuple("Pair", ["embeds", "mask"])


class TakesDataclass(Network):
    def forward(self, x: Tensor, t: Tensor, text: Text) -> Any:
        return Transformer2DModelOutput(sample=self.velocity(x, t / 1000, text.embeds.mean(1)))


class AsDataclass(Variant):
    network_class = TakesDataclass

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        text = Text(words, [words.shape[1]] * len(words))
        return self.network(latents, timestep.expand(len(latents)), text).sample


class TakesNamedTuple(Network):
    def forward(self, x: Tensor, t: Tensor, text: Pair, sizes: dict) -> Any:
        masked = (text.embeds * text.mask[..., None]).sum(1) / text.mask.sum(1, keepdim=True)
        return self.velocity(x, t / 1000, masked * sizes["image"][0] / SIDE)


class AsNamedTuple(Variant):
    """Embeddings padded to an even length, with a mask; the network answers with a tensor."""

    network_class = TakesNamedTuple

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        mask = torch.ones(words.shape[:2])
        odd = words.shape[1] % 2
        pair = Pair(nn.functional.pad(words, (0, 0, 0, odd)), nn.functional.pad(mask, (0, odd)))
        return self.network(latents, timestep.expand(len(latents)), pair, sizes={"image": (SIDE, SIDE)})


class TakesLists(Network):
    def forward(self, x: Tensor, t: Tensor, text: list[list[Tensor]]) -> dict[str, Any]:
        embeds = torch.stack([torch.stack(letters).mean(0) for letters in text])
        return {"features": embeds, "velocity": self.velocity(x, t / 1000, embeds)}


class AsListOfLists(Variant):
    """A list of letters for each prompt; the prediction is the second part of the answer."""

    network_class = TakesLists

    def encode_prompt(self, texts: list[str]) -> Any:
        return [list(super(AsListOfLists, self).encode_prompt([text])[0]) for text in texts]

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        return self.network(latents, timestep.expand(len(latents)), text=words)["velocity"]


# Sample, time and answer


class Inpaints(Variant):
    """The network also gets a mask and an image, which are empty."""

    network_class = functools.partial(Network, more=CHANNELS + 1)

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        mask, image = torch.ones_like(latents[:, :1]), torch.full_like(latents, 0.25)
        return super().predict(torch.cat([mask, latents, image], 1), timestep, words, i)


class TakesRows(Network):
    def forward(self, rows: list[Tensor], times: list[float], sigma: Tensor, text: Tensor) -> list[Tensor]:
        t = 0.8 * torch.tensor(times) + 0.2 * sigma
        return list(self.velocity(torch.stack(rows), t, text.mean(1)))


class Rows(Variant):
    """Rows with constant channels after them, and two times: a list of numbers, and sigma."""

    network_class = functools.partial(TakesRows, more=1)

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        rows = [torch.cat([row, torch.ones_like(row[:1])]) for row in latents]
        times, sigma = [1 - timestep.item() / 1000] * len(rows), self.scheduler.sigmas[i].repeat(len(rows))
        return -torch.stack(self.network(rows, times, sigma, words))


class TakesOrder(Network):
    def forward(self, x: Tensor, /, *rest: Any) -> Any:
        t, text = rest
        return [self.velocity(x, t / 1000, text.mean(1))]


class ByOrder(Variant):
    """Arguments without names, and an answer in a list."""

    network_class = TakesOrder

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        return self.network(latents, timestep.expand(len(latents)), words)[0]


class WholeTime(Variant):
    """A timestep without fractions."""

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        return super().predict(latents, timestep.round().long(), words, i)


class Film(Variant):
    """Latents of five dimensions, which the call does not return."""

    shape = (CHANNELS, 2, SIDE, SIDE)

    def output(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            raise ValueError(f"unknown output_type {output_type}")
        return super().output(latents, output_type)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents)[:, :, 0]


class TakesTokens(Network):
    def forward(self, tokens: Tensor, t: Tensor, text: Tensor, ids: Tensor, **kwargs: Any) -> Any:
        x = (tokens + 0.1 * ids.float()).movedim(-1, 1)
        return (self.velocity(x, t, text.mean(1)).movedim(1, -1),)


class Packs(Variant):
    """Latents are packed to tokens after `prepare_latents`, and positions are shared by all prompts."""

    network_class = TakesTokens

    def start(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        ids = torch.arange(latents.shape[1])[:, None]
        return self.network(latents, timestep.expand(len(latents)) / 1000, text=words, ids=ids)[0]

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.transpose(1, 2).unflatten(2, (SIDE, SIDE)))


class TakesLatents(Variant):
    """Has no `prepare_latents`; noise is an argument of the call. Calls `forward`, and looks at the class."""

    prepare_latents = None

    @torch.no_grad()
    def __call__(self, prompt: Any, num_inference_steps: int = 4, generator: Any = None, latents: Any = None) -> Any:
        count = 1 if isinstance(prompt, str) else len(prompt)
        drawn = torch.randn(count, *self.shape, generator=generator)
        self.prepared = drawn if latents is None else latents
        return self.run(prompt, num_inference_steps, 1.0, generator, "pil")

    def run(self, prompt: Any, steps: int, scale: float, generator: Any, output_type: str) -> Any:
        words = self.encode_prompt([prompt] if isinstance(prompt, str) else prompt)
        latents = self.prepared
        self.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            if not isinstance(self.network, Network):
                raise TypeError("not the network of this pipeline")
            velocity = self.network.forward(latents, timestep.expand(len(latents)), words)[0]
            latents = self.step(velocity, timestep, latents)
        return self.numpy_to_pil(self.decode(latents).movedim(1, -1).numpy())


# Schedulers


class PlainScheduler(SchedulerMixin, ConfigMixin):
    """A flow without sigmas: times rise from 0 at the noise to 1 at the data."""

    order = 1

    @register_to_config
    def __init__(self, bend: float = 1.5) -> None:
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, steps: int) -> None:
        self.grid = torch.linspace(0, 1, steps + 1) ** self.config["bend"]
        self.timesteps, self.index = self.grid[:-1], 0

    def step(self, velocity: Tensor, time: Tensor, state: Tensor) -> Tensor:
        self.index += 1
        return state + (self.grid[self.index] - time) * velocity


class Plain(Variant):
    scheduler_class = PlainScheduler

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        return -super().predict(latents, 1000 * timestep, words, i)

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        return self.scheduler.step(velocity=prediction, time=timestep, state=latents)


class CountedScheduler(FlowMatchEulerDiscreteScheduler):
    """Its timesteps are the numbers of the steps."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.timesteps = torch.arange(len(self.timesteps))

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        index = int(timestep)
        return (sample + (self.sigmas[index + 1] - self.sigmas[index]) * model_output,)


class Counts(Variant):
    """The network's time is sigma, and timesteps are only counted."""

    scheduler_class = CountedScheduler

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        return super().predict(latents, 1000 * self.scheduler.sigmas[i], words, i)


class Karras(Variant):
    scheduler_class = functools.partial(FlowMatchEulerDiscreteScheduler, use_karras_sigmas=True)


class Dynamic(Variant):
    scheduler_class = functools.partial(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True)

    def set_timesteps(self, steps: int) -> None:
        self.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=0.7)


class Inverted(Variant):
    scheduler_class = functools.partial(FlowMatchEulerDiscreteScheduler, invert_sigmas=True, shift=3.0)

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        return -super().predict(latents, timestep, words, i)


# Guidance and the call


class Guided(Variant):
    guided = True


class Scheduled(Guided):
    """Guidance that grows with the steps, and is rescaled."""

    def guide(self, cond: Tensor, uncond: Tensor, scale: float, i: int) -> Tensor:
        guided = super().guide(cond, uncond, 1 + (scale - 1) * (i + 1) / 4, i)
        return guided * cond.norm() / guided.norm()


class Switched(Guided):
    """Guidance is turned off by a flag, and its scale is called cfg."""

    @torch.no_grad()
    def __call__(
        self, texts: list[str], cfg: float = 4.0, use_cfg: bool = True, iterations: int = 4, output_type: str = "pil"
    ) -> Any:
        if isinstance(texts, str):
            raise TypeError("texts is a list")
        return self.run(texts, iterations, cfg + 2 if use_cfg else 1.0, None, output_type)


class Letters(Variant):
    """A prompt that is no list is taken for its letters."""

    @torch.no_grad()
    def __call__(self, prompts: list[str], steps: int = 4, output_type: str = "pil") -> Any:
        return self.run(list(prompts), steps, 1.0, None, output_type)


class OneByOne(Variant):
    """Takes one prompt at a time."""

    def encode_prompt(self, texts: list[str]) -> Tensor:
        if len(texts) > 1:
            raise ValueError("one prompt at a time")
        return super().encode_prompt(texts)


class TakesScale(Network):
    def forward(self, x: Tensor, t: Tensor, text: Tensor, strength: Any) -> Any:
        return (self.velocity(x, t / 1000, text.mean(1) * strength[:, None]),)


class Embedded(Variant):
    """The scale is an input of the network."""

    network_class = TakesScale

    def run(self, prompt: Any, steps: int, scale: float, generator: Any, output_type: str) -> Any:
        self.strength = scale
        return super().run(prompt, steps, 1.0, generator, output_type)

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        strength = torch.full([len(latents)], float(self.strength))
        return self.network(latents, timestep.expand(len(latents)), text=words, strength=strength)[0]


WORKING: dict[str, type[Variant]] = {
    kind.__name__: kind
    for kind in (
        Variant,
        AsDataclass,
        AsNamedTuple,
        AsListOfLists,
        Inpaints,
        Rows,
        ByOrder,
        WholeTime,
        Film,
        Packs,
        TakesLatents,
        Plain,
        Counts,
        Karras,
        Dynamic,
        Inverted,
        Guided,
        Scheduled,
        Switched,
        Letters,
        OneByOne,
        Embedded,
    )
}


class TwoAtLeast(Variant):
    """Takes no single step."""

    def set_timesteps(self, steps: int) -> None:
        self.scheduler.set_timesteps(sigmas=[1 - i / (steps - 1) * (1 - 1 / steps) for i in range(steps)])


# Pipelines that cannot be adapted


class Heun(Variant):
    scheduler_class = FlowMatchHeunDiscreteScheduler


class Midpoint(Variant):
    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        half = super().predict(latents, timestep, words, i)
        return super().predict(latents - 0.05 * half, timestep - 50, words, i)


class PredictsData(Variant):
    """The network predicts the data; the scheduler gets the velocity."""

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        return (latents - super().predict(latents, timestep, words, i)) / self.scheduler.sigmas[i]


class NoiseScheduler(FlowMatchEulerDiscreteScheduler):
    """For a network that predicts the noise."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        sigma, following = (float(self.sigmas[(self.step_index or 0) + i]) for i in (0, 1))
        self._step_index = (self.step_index or 0) + 1
        data = (sample - sigma * model_output) / max(1 - sigma, 0.05)
        return ((1 - following) * data + following * model_output,)


class PredictsNoise(Variant):
    scheduler_class = NoiseScheduler


class NoiseBetween(Variant):
    def after(self, latents: Tensor) -> Tensor:
        return latents + 0.1 * torch.randn(latents.shape)


class Clips(Variant):
    """Changes latents between the steps."""

    def after(self, latents: Tensor) -> Tensor:
        return latents.clamp(-0.5, 0.5)


class IgnoresLatents(Variant):
    """What `prepare_latents` returns is not where it starts."""

    def start(self, latents: Tensor) -> Tensor:
        return torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))


class Blind(Network):
    def forward(self, x: Tensor, t: Tensor, text: Tensor, return_dict: bool = True) -> Any:
        return (self.velocity(torch.zeros_like(x), t / 1000, text.mean(1)),)


class IgnoresSample(Variant):
    network_class = Blind


class Timeless(Network):
    def forward(self, x: Tensor, t: Tensor, text: Tensor, return_dict: bool = True) -> Any:
        return (self.velocity(x, torch.zeros_like(t), text.mean(1)),)


class IgnoresTime(Variant):
    network_class = Timeless


class IgnoresPrompt(Variant):
    def encode_prompt(self, texts: list[str]) -> Tensor:
        return super().encode_prompt(["always this"] * len(texts))


class CountsSteps(Variant):
    """The network gets the number of the step in place of the time."""

    scheduler_class = FlowMatchEulerDiscreteScheduler

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        return super().predict(latents, torch.tensor(100.0 * i), words, i)


class KnowsSteps(Variant):
    """The conditioning depends on the number of steps."""

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        return super().predict(latents, timestep, words / len(self.scheduler.timesteps), i)


class LateNetwork(Variant):
    """Another network takes the last of many steps, as in Wan 2.2."""

    def __init__(self, network: Any, words: Any, scheduler: Any, other: Any = None) -> None:
        super().__init__(network, words, scheduler)
        self.register_modules(other=other or Network().eval())

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        network = self.network if timestep > 250 else self.other
        return network(latents, timestep.expand(len(latents)), words, return_dict=False)[0]


class Breaks(Variant):
    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        return super().predict(latents, timestep, words, i) * (float("nan") if i == 2 else 1)


class Remembers(Network):
    """Mixes an answer with that of the call before."""

    before: Any = 0.0

    def forward(self, x: Tensor, t: Tensor, text: Tensor, return_dict: bool = True) -> Any:
        velocity = self.velocity(x, t / 1000, text.mean(1))
        mixed, self.before = velocity + 0.1 * self.before, velocity.detach()
        return (mixed,)


class KeepsState(Variant):
    network_class = Remembers


class Momentum(Variant):
    """Mixes a prediction with that of the step before."""

    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        prediction = super().predict(latents, timestep, words, i)
        self.last = prediction if i == 0 else 0.8 * prediction + 0.2 * self.last
        return self.last


class DropsAlways(Network):
    def forward(self, x: Tensor, t: Tensor, text: Tensor, return_dict: bool = True) -> Any:
        return (nn.functional.dropout(self.velocity(x, t / 1000, text.mean(1)), 0.1, training=True),)


class Dropout(Variant):
    network_class = DropsAlways


class RandomText(Variant):
    def encode_prompt(self, texts: list[str]) -> Tensor:
        return super().encode_prompt(texts) * (1 + 0.1 * torch.rand(1))


class RandomImage(Variant):
    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents + 0.1 * torch.randn(latents.shape))


class OtherImage(Variant):
    """The image is not that of the last latents."""

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        self.last = latents
        return super().step(prediction, timestep, latents)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode((latents + self.last) / 2)


class AlwaysGuided(Variant):
    def predict(self, latents: Tensor, timestep: Tensor, words: Any, i: int) -> Tensor:
        uncond = super().predict(latents, timestep, torch.zeros_like(words), i)
        return uncond + 3 * (super().predict(latents, timestep, words, i) - uncond)


REFUSED: dict[type[Variant], str] = {
    Heun: "evaluates the network 5 times for 3 steps, as solvers of second order do",
    Midpoint: "2 evaluations in a step, at different points",
    PredictsData: "not a multiple of the network's answer",
    PredictsNoise: "the first step of NoiseScheduler is not an Euler step of a straight flow",
    NoiseBetween: "adds noise",
    Clips: "its latents change between steps",
    IgnoresLatents: "noise cannot be set",
    IgnoresSample: "does not depend on the sample",
    IgnoresTime: "does not depend on the time",
    IgnoresPrompt: "does not depend on the prompt",
    CountsSteps: "argument t depends on the number of steps",
    KnowsSteps: "argument text depends on the number of steps",
    LateNetwork: "it has several networks: network, other",
    Breaks: "not finite",
    KeepsState: "depends on earlier calls",
    Momentum: "not a multiple of the network's answer",
    Dropout: "it is random",
    RandomText: "argument text is random",
    RandomImage: "decoding of latents is random",
    OtherImage: "does not decode latents to the pipeline's image",
    AlwaysGuided: "guidance cannot be turned off: 2 evaluations of 1 rows in a step",
}
