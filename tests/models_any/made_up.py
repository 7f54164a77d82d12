"""A pipeline that no one has seen: names of its own, rows in a list, time reversed, the sign of data - noise."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

CHANNELS, SIDE = 3, 4


class MadeUpNetwork(ModelMixin, ConfigMixin):
    """Takes lists with one entry for each row, and answers with a list."""

    @register_to_config
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = nn.Linear(CHANNELS, width)
        self.clock = nn.Linear(1, width)
        self.words = nn.Linear(8, width)
        self.leave = nn.Linear(width, CHANNELS)

    def forward(self, canvases: list[Tensor], clock: Tensor, words: list[Tensor], hint: Any = None) -> list[Tensor]:
        answers = []
        for canvas, time, text in zip(canvases, clock, words, strict=True):
            hidden = self.enter(canvas.flatten(1).T) + self.clock(time[None]) + self.words(text).mean(0)
            answers.append(self.leave(hidden.tanh()).T.reshape(canvas.shape))
        return answers


class MadeUpPipeline(DiffusionPipeline):
    """The network predicts data - noise, the scheduler expects noise - data. `fault` makes it unsuitable."""

    fault = ""

    def __init__(
        self, predictor: MadeUpNetwork, lexicon: nn.Embedding, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:
        super().__init__()
        self.register_modules(predictor=predictor, lexicon=lexicon, scheduler=scheduler)

    def encode_prompt(self, texts: Sequence[str]) -> list[Tensor]:
        return [self.lexicon(torch.tensor([ord(letter) % 64 for letter in text] or [0])) for text in texts]

    def prepare_latents(self, count: int, generator: Any) -> Tensor:
        return torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator)

    @torch.no_grad()
    def __call__(self, text: Any, refinement_steps: int = 4, generator: Any = None, output_type: str = "pil") -> Any:
        texts = [text] if isinstance(text, str) else list(text)
        words = self.encode_prompt(["" for _ in texts] if self.fault == "prompt" else texts)
        latents = self.prepare_latents(len(texts), generator)
        if self.fault == "noise":
            latents = (latents + latents.flip(-1)) / 2**0.5
        if self.fault == "spread":
            latents *= 2  # in place, so what prepare_latents returned is the initial sample
        self.scheduler.set_timesteps(refinement_steps)
        for i, timestep in enumerate(self.scheduler.timesteps):
            latents = self.scheduler.step(self.answer(latents, timestep, words, i), timestep, latents).prev_sample
        return (latents.permute(0, 2, 3, 1).numpy() if output_type == "np" else latents,)

    def answer(self, latents: Tensor, timestep: Tensor, words: list[Tensor], i: int) -> Tensor:
        clock = (1 - timestep / 1000).expand(len(latents))
        if self.fault == "time":
            clock = torch.ones_like(clock)
        canvases, hint = list(latents * (1 - i / 8) if self.fault == "scaled" else latents), None
        if self.fault == "varying":
            hint = torch.tensor([float(i**2)])
        if self.fault == "rows":
            canvases, words, clock = canvases * 2, words * 2, clock.repeat(2)
        if self.fault == "hidden":
            canvases = [canvas.square() for canvas in canvases]
        answers = self.predictor(canvases, clock, words, hint=hint)
        answer = -torch.stack(answers[: len(latents)])
        if self.fault == "data":
            answer = latents - answer
        if self.fault == "nan":
            answer = answer / 0 * 0
        return answer


class NoisyScheduler(FlowMatchEulerDiscreteScheduler):
    """Adds noise after every step but the first."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        is_first = self.step_index is None
        result = super().step(*args, **kwargs)
        if not is_first:
            result.prev_sample = result.prev_sample + 0.1 * torch.randn(result.prev_sample.shape)
        return result


def make_made_up_pipeline(fault: str = "") -> MadeUpPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, lexicon = MadeUpNetwork().eval(), nn.Embedding(64, 8).eval()
    pipeline = MadeUpPipeline(network, lexicon, FlowMatchEulerDiscreteScheduler(shift=2.0))
    pipeline.fault = fault
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
