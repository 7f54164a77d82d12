"""An adapter for any text-to-image pipeline of diffusers: the stock pipeline describes itself.

Calibration watches a few steps of the stock call (`calibration`). After that, `encode` runs the stock call up to the
first evaluation of the network and keeps its arguments, `predict` evaluates the network with them, and `decode` runs
the end of the stock call on given latents. No pipeline class is named here, and none has code of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.flow.prediction import DiffusionAsFlow
from rectified_diffusers.models.calibration import CALL_ERRORS, PROMPTS, STEPS, calibrate
from rectified_diffusers.models.conditioning import PromptConditioning, equal, find_axes, map_leaves
from rectified_diffusers.models.denoiser import Conditioning, Denoiser, Network, is_diffusion
from rectified_diffusers.models.finding import blank_network
from rectified_diffusers.models.stock_call import StockCall, device_of, stop_at
from rectified_diffusers.models.stock_guidance import Guidance, find_guidance, unconditional
from rectified_diffusers.models.watching import Trace, first_sample, images_of, with_sample
from rectified_diffusers.pipelines.scheduler import VelocityDirection

_BATCH_TOLERANCE = 1e-4


class PipelineDenoiser(Denoiser):
    """Adapter for any pipeline whose call turns a prompt and noise into an image with one network.

    Latents have the layout that the pipeline's scheduler sees, which is not always `(B, C, H, W)`. An adapter is for
    one image size, because conditioning can contain it.

        denoiser = PipelineDenoiser(pipeline, options={"height": 512, "width": 512})
        conditioning = denoiser.encode(["a red apple"], "cpu")
        velocity = denoiser.velocity(denoiser.network, noise, torch.zeros(1), conditioning)

    Args:
        pipeline: any diffusers pipeline; it is not changed.
        guidance: scale, as the pipeline's call takes it. A network that takes guidance as an input receives it; `None`
            is the pipeline's default. Others are guided by two passes, as `PipelineVelocity` does; `None` is none.
        options: further arguments of the pipeline's call, such as its height, width and num_frames.

    Raises:
        UnsupportedPipelineError: the pipeline does not fit; the message is one sentence that says why.
    """

    def __init__(self, pipeline: Any, guidance: float | None = None, options: Mapping[str, Any] | None = None) -> None:
        scheduler = cast(Any, getattr(pipeline, "scheduler", None))
        self.is_flow = not is_diffusion(scheduler)
        # DDIM neither scales its samples nor adds noise; the network is the same with any scheduler of its schedule.
        solver: Any = scheduler if self.is_flow else DDIMScheduler.from_config(scheduler.config)
        self.call = StockCall(pipeline, options or {}, solver)
        self.calibration = calibrate(self.call, self.is_flow)
        self.component = self.calibration.component
        self._shared: list[Any] = []
        inputs = [] if guidance is None else self.guidance_found.inputs
        self.scale = dict.fromkeys(inputs, guidance)
        super().__init__(pipeline, 1.0 if guidance is None else guidance + self._offset, options)
        self.dtype = _dtype(self.network)

    @property
    def _offset(self) -> float:
        """Weight of two passes minus the pipeline's scale: 1 where scale 0 is no guidance."""
        two_passes = self.guidance_found.two_passes
        return (two_passes.offset or 0.0) if two_passes is not None and self.guides_by_two_passes else 0.0

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents of one image, in the layout of the scheduler."""
        return self.calibration.latent_shape

    @property
    def direction(self) -> VelocityDirection:
        flow = self.calibration.flow
        return "noise" if flow is not None and flow.sign < 0 else "data"

    @property
    def num_train_timesteps(self) -> int:
        flow = self.calibration.flow
        return 1000 if flow is None else int(flow.num_train_timesteps)

    def diffusion(self) -> DiffusionAsFlow | None:
        return None if self.is_flow else super().diffusion()

    @cached_property
    def guidance_found(self) -> Guidance:
        """How the pipeline guides; found with a few guided steps at the first use."""
        return find_guidance(self.call, self.calibration)

    @property
    def takes_guidance(self) -> bool:
        return bool(self.guidance_found.inputs)

    @property
    def has_guidance(self) -> bool:
        return self.guidance_found.kind != "none"

    @property
    def scale_argument(self) -> str | None:
        """Argument of the stock call for the guidance scale; None if it has none."""
        found = self.guidance_found
        names = [*found.inputs, *([found.two_passes.argument] if found.two_passes else []), *self.call.scales]
        return next((name for name in names if name in self.call.scales), None)

    @property
    def guides_by_two_passes(self) -> bool:
        two_passes = self.guidance_found.two_passes
        return two_passes is not None and two_passes.linear and not self.guidance_found.inputs

    def guide(self, scale: float) -> None:
        kind = type(self.pipeline).__name__
        if self.takes_guidance:
            own = next(iter(self.scale.values()), None)
            if scale != own:
                raise ValueError(
                    f"The network of {kind} takes guidance as an input, which is {own} here, got {scale}. Set the "
                    "guidance of the triplets."
                )
        elif scale <= 1:
            self.guidance = 1.0
        elif not self.has_guidance:
            raise UnsupportedPipelineError(f"{kind} has no guidance, got guidance {scale}. Set it to 1.")
        elif not self.guides_by_two_passes:
            raise UnsupportedPipelineError(
                f"{kind} guides in a way that two passes cannot repeat ({self.guidance_found.kind}), got guidance "
                f"{scale}. Set it to 1."
            )
        else:
            self.guidance = scale + self._offset

    @cached_property
    def structure(self) -> Any:
        """Batch axis of every leaf of the conditioning; None if a batch is not made of its prompts' encodings."""
        try:
            return find_axes(*(self._encoding([PROMPTS[0]] * count) for count in (1, 2)))
        except CALL_ERRORS:
            return None

    @cached_property
    def axes(self) -> Any:
        """`structure`, if the network's answers to rows in one batch equal those to each alone; otherwise None."""
        if self.structure is None:
            return None
        trees = tuple(self._encoding([prompt]) for prompt in PROMPTS)
        try:
            error = batch_error(self, PromptConditioning(trees, self.structure))
        except CALL_ERRORS:
            return None
        rounding = 64 * torch.finfo(self.dtype).eps
        return self.structure if error <= max(_BATCH_TOLERANCE, rounding) else None

    def prepare(self) -> None:
        """Find out now what else needs the network, before its pipeline's parts move to different devices."""
        _ = self.axes, self.unconditional

    def encode(self, prompts: Sequence[str], device: str | torch.device) -> Conditioning:
        """Return the conditioning of prompts, each encoded alone. The network is not evaluated.

        That of the empty prompt is what the pipeline guides away from, see `unconditional`.
        """
        trees = tuple(
            map_leaves(self._encoding([prompt]), self._intern) if prompt else self.unconditional for prompt in prompts
        )
        return PromptConditioning(trees, self.axes).to(device)

    @cached_property
    def unconditional(self) -> dict[str, Any]:
        """The conditioning that the pipeline guides away from, with the adapter's guidance as an input."""
        two_passes = self.guidance_found.two_passes
        if two_passes is None:
            return map_leaves(self._encoding([""]), self._intern)
        guided = replace(two_passes, options={**two_passes.options, **self.scale})
        return map_leaves(unconditional(self.call, self.calibration, guided), self._intern)

    def _encoding(self, prompts: Sequence[str]) -> dict[str, Any]:
        trace = self.call.run(
            prompts, STEPS, {**self.calibration.off, **self.scale}, on_network=stop_at(self.component)
        )
        return self.calibration.conditioning_of(trace.calls[-1])

    def _intern(self, leaf: Any) -> Any:
        """Return the same object for equal tensors, so that what prompts share is stored and compared once."""
        if not isinstance(leaf, Tensor):
            return leaf
        known = next((other for other in self._shared if equal(other, leaf)), None)
        if known is None:
            self._shared = [*self._shared[-63:], leaf]
        return leaf if known is None else known

    def predict(self, network: Network, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what the scheduler would receive for latents `(B, ...)`, in the sign of the pipeline.

        Args:
            timestep: `(B,)`; for a flow 1000 (1 - t), for a diffusion model the scheduler's.
        """
        if self.calibration.flow is not None:
            timestep = self.timesteps_at(1 - timestep.double() / self.calibration.flow.num_train_timesteps)
        return self.predict_at(network, sample, timestep, conditioning)

    def timesteps_at(self, t: Tensor) -> Tensor:
        """Return the scheduler's timesteps at times t `(B,)`, 0 noise and 1 data."""
        flow = self.calibration.flow
        return 1000 * (1 - t) if flow is None else flow.timestep_at(t)

    def predict_at(self, network: Network, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what the scheduler would receive for latents `(B, ...)` and its own timesteps `(B,)`."""
        form, dtype = self.calibration.sample, _dtype(network)
        dtypes = {self.dtype: dtype} if dtype != self.dtype else {}
        conditioning = cast(PromptConditioning, conditioning)
        if dtypes:
            conditioning = conditioning.to(None, dtypes)
        answers: list[Tensor] = []
        order: list[int] = []
        for rows, arguments in conditioning.groups():
            part, times = (sample, timestep) if len(rows) == len(sample) else (sample[rows], timestep[rows])
            own = {form.name: form.of(part, dtypes.get(form.dtype, form.dtype), arguments.get(form.name))}
            for time in self.calibration.times:
                time_dtype = time.dtype or torch.float64
                own[time.name] = time.of(times, dtypes.get(time_dtype, time_dtype))
            answers.append(self.calibration.evaluate(network, {**arguments, **own}))
            order += rows
        if len(answers) == 1:
            return answers[0]
        back = torch.tensor(order, device=sample.device).argsort()
        return torch.cat(answers)[back]

    def solve(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        num_inference_steps: int,
        scheduler: Any = None,
        record: bool = False,
        **options: Any,
    ) -> Trace:
        """Run the stock call from noise `(B, ...)`, with its own guidance; the data are the last step's result.

        Args:
            record: keep all steps, not only the last.
            options: arguments of the stock call, such as guidance_scale.
        """
        return self.call.run(
            prompts,
            num_inference_steps,
            {**self.scale, **options, **self.call.latents_only},
            noise=(noise, self.calibration.noise_place),
            guided=True,
            scheduler=scheduler,
            record=record,
        )

    @property
    def guidance_arguments(self) -> dict[str, Any]:
        return {**self.calibration.off, **self.scale}

    def call_arguments(self, prompt: str, num_inference_steps: int, guidance: float = 1.0) -> dict[str, Any]:
        guided = {} if guidance == 1 or self.scale_argument is None else {self.scale_argument: guidance}
        steps = {**self.call.prompted([prompt]), self.call.steps: num_inference_steps}
        output = {self.call.output_type: "pil"} if self.call.output_type else {}
        return {**steps, **self.options, **self.guidance_arguments, **guided, **output}

    def decode(self, latents: Tensor, output_type: str = "pil", gradient: bool = False, seed: int = 0) -> Any:
        """Return the images of latents `(B, ...)` by the end of the stock call; the network is not evaluated.

        Args:
            output_type: "pil" for a list of images, "pt" for a tensor, "np" for an array.
            gradient: keep the gradient with respect to the latents, for "pt".
            seed: of a decoder that is random, which the self-test refuses.

        Raises:
            UnsupportedPipelineError: the call has no argument output_type, and the images are no tensors.
        """
        images = [self._decode_row(row[None], output_type, gradient, seed) for row in latents]
        if output_type == "pt" and not isinstance(images[0], Tensor):
            raise UnsupportedPipelineError(
                f"{type(self.pipeline).__name__} returns a {type(images[0]).__name__}, not a tensor, for "
                "output_type='pt'. Choose a loss or metric that needs no decoded images."
            )
        if isinstance(images[0], Tensor):
            return torch.cat(images)
        return (
            np.concatenate(images) if isinstance(images[0], np.ndarray) else [image for row in images for image in row]
        )

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Decode latents to images `(B, 3, H, W)` in [-1, 1], float32, with their gradient."""
        return 2 * self.decode(latents, "pt", gradient=torch.is_grad_enabled()).float() - 1

    def _decode_row(self, latents: Tensor, output_type: str, gradient: bool, seed: int) -> Any:
        def to_device(leaf: Any) -> Any:
            return leaf.to(latents.device) if isinstance(leaf, Tensor) else leaf

        def step(scheduler_step: Any, *args: Any, **kwargs: Any) -> Any:
            result = scheduler_step(*args, **kwargs)
            return with_sample(result, latents.to(first_sample(result)))

        options = {**self.calibration.off, **({self.call.output_type: output_type} if self.call.output_type else {})}
        trace = self.call.run(
            PROMPTS[:1],
            STEPS,
            options,
            on_network=blank_network(self.component, map_leaves(self.calibration.answer.blank, to_device)),
            on_step=step,
            seed=seed,
            encoded=[map_leaves(part, to_device) for part in self.calibration.trace.encoded],
            gradient=gradient,
        )
        return images_of(trace.output)


def batch_error(denoiser: PipelineDenoiser, together: PromptConditioning) -> float:
    """Return the relative difference of the answers to rows in one batch from the answers to each alone."""
    generator = torch.Generator().manual_seed(0)
    count = len(together)
    device = device_of(denoiser.network)
    together = together.to(device)
    sample = torch.randn(count, *denoiser.latent_shape, generator=generator).to(device)
    timestep = denoiser.timesteps_at(torch.linspace(0.3, 0.7, count, device=device))
    with torch.no_grad():
        joined = denoiser.predict_at(denoiser.network, sample, timestep, together)
        alone = [
            denoiser.predict_at(denoiser.network, sample[i : i + 1], timestep[i : i + 1], together.select([i]))
            for i in range(count)
        ]
    single = torch.cat(alone)
    return float((joined - single).abs().max() / single.abs().max())


def _dtype(network: Any) -> torch.dtype:
    """Return the dtype of a network's computations, also of one that is wrapped or quantized."""
    dtype = getattr(network, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    return next(weight.dtype for weight in network.parameters() if weight.is_floating_point())
