"""A diffusion U-Net that is a velocity model without any training, by matching signal-to-noise ratios."""

import copy
import inspect
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor
from typing_extensions import Self

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.flow.interpolation import VariancePreserving
from rectified_diffusers.flow.prediction import DIFFUSION_TYPES, DiffusionAsFlow
from rectified_diffusers.models.denoiser import is_diffusion
from rectified_diffusers.pipelines.scheduler import timestep_to_time

# The settings that determine alphas_cumprod, as named by diffusers' schedulers; DDIM's class supports all of them.
_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_SCHEDULE += ("trained_betas", "rescale_betas_zero_snr")


class DiffusionVelocityUNet(UNet2DConditionModel):
    """A diffusion U-Net inside, a velocity data - noise outside (cf. arXiv:2405.20320, arXiv:2506.02221).

    Each call scales x_t and shifts the time to where the diffusion has the same signal-to-noise ratio, evaluates the
    U-Net there, and converts its epsilon, v or sample to the velocity; the formulas are those of `DiffusionAsFlow`.
    With the weights of a diffusion model it is therefore that model's flow, except for the ends that its schedule does
    not reach. A reflow initialized with it need not unlearn epsilon, unlike one initialized with the bare weights.

    Names and shapes of the weights are those of the plain U-Net, so that LoRAs, weight deltas, IP-Adapters and textual
    inversion of the diffusion model fit. Limits:

    - A ControlNet or T2I-Adapter is called by the pipeline with x_t and the flow's timestep. One made for diffusion
      receives a different time and a sample too small by up to sqrt(2), and controls less well.
    - `export_diffusers`, which flips the sign of the last layer, refuses it.
    - U-Nets that take more than latents (inpainting with 9 channels) are refused.

    Args: those of `UNet2DConditionModel`, and
        diffusion_schedule: `prediction_type` and the settings that determine alphas_cumprod, as named by diffusers'
            schedulers. `from_unet` reads it from a scheduler.

    Example:
        ```python
        unet = DiffusionVelocityUNet.from_unet(teacher.unet, teacher.scheduler)
        flow = RectifiedFlowPipeline.from_pipe(teacher, unet=unet)
        image = flow("a red apple", num_inference_steps=25, guidance_scale=5.0).images[0]
        ```
    """

    def __init__(self, *, diffusion_schedule: dict[str, Any] | None = None, **config: Any) -> None:
        _require_schedule(diffusion_schedule)  # before allocating a network of a billion weights for nothing
        super().__init__(**config)
        self.register_to_config(diffusion_schedule=diffusion_schedule)
        self.as_flow = diffusion_inside(self.config)

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, scheduler: Any) -> Self:
        """Convert a diffusion U-Net to its velocity; weights are copied, dtypes and devices kept.

        Args:
            unet: predicts what the scheduler's config says.
            scheduler: a diffusion scheduler of diffusers; its `alphas_cumprod` and `prediction_type` are used.
        """
        return copy.deepcopy(cls.sharing(unet, scheduler))

    @classmethod
    def sharing(cls, unet: UNet2DConditionModel, scheduler: Any) -> Self:
        """As `from_unet`, with the weights of `unet` themselves: a change of one changes both."""
        if type(unet) is not UNet2DConditionModel:
            kind = type(unet).__name__
            raise UnsupportedPipelineError(f"Expected a plain UNet2DConditionModel of a diffusion model, got {kind}.")
        schedule = _read_schedule(scheduler)
        with torch.device("meta"):  # without memory for initial weights
            made: Any = cls.from_config({**unet.config, "diffusion_schedule": schedule})
        made.load_state_dict(unet.state_dict(), assign=True)
        return made.train(unet.training)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Return the velocity at x_t; all other arguments are passed unchanged to `UNet2DConditionModel`.

        Args:
            sample: x_t of the straight path, `(B, C, H, W)`; the result has its shape and dtype.
            timestep: of the flow, 1000 * (1 - t), scalar or `(B,)`.
            encoder_hidden_states: text embeddings, `(B, tokens, cross_attention_dim)`.
        """
        unet = super().forward

        def predict(inner_sample: Tensor, inner_timestep: Tensor) -> Tensor:
            return unet(inner_sample, inner_timestep, encoder_hidden_states, *args, return_dict=False, **kwargs)[0]

        velocity = self.as_flow(predict, sample, flow_times(sample, timestep))
        return UNet2DConditionOutput(sample=velocity) if return_dict else (velocity,)


def diffusion_inside(config: Any) -> DiffusionAsFlow:
    """Return the view as a flow of a U-Net with a `diffusion_schedule` in its config."""
    schedule = config["diffusion_schedule"]
    _require_schedule(schedule)
    if config["in_channels"] != config["out_channels"]:
        channels = f"in_channels={config['in_channels']} and out_channels={config['out_channels']}"
        raise ValueError(f"Expected a U-Net with as many input as output channels, got {channels}.")
    with torch.device("cpu"):  # also for a U-Net that is created on the meta device
        as_flow = DiffusionAsFlow(VariancePreserving(_alphas_cumprod(schedule)), schedule["prediction_type"])
    if as_flow.prediction_type == "epsilon" and as_flow.schedule.alphas_cumprod[-1] == 0:
        raise ValueError(
            "A U-Net that predicts epsilon has no flow on a schedule that ends in pure noise, where epsilon does not "
            "determine the data. Use one with prediction_type 'v_prediction'."
        )
    return as_flow


def flow_times(sample: Tensor, timestep: Tensor | float | int) -> Tensor:
    """Return the flow times `(B,)` of a U-Net's timestep, 1000 * (1 - t), scalar or `(B,)`; in float32 or wider."""
    precise = torch.promote_types(sample.dtype, torch.float32)
    return timestep_to_time(torch.as_tensor(timestep, dtype=precise, device=sample.device)).expand(len(sample))


def _signature() -> inspect.Signature:
    """Return the plain U-Net's arguments and our own: the loader takes the names in a config from a signature."""
    parameters = list(inspect.signature(UNet2DConditionModel.__init__).parameters.values())
    own = inspect.signature(DiffusionVelocityUNet.__init__).parameters["diffusion_schedule"]
    return inspect.Signature([*parameters, own])


SIGNATURE = _signature()
DiffusionVelocityUNet.__init__.__signature__ = SIGNATURE  # pyright: ignore[reportFunctionMemberAccess]


def _require_schedule(schedule: dict[str, Any] | None) -> None:
    if schedule is None or "prediction_type" not in schedule:
        raise ValueError(
            f"diffusion_schedule must contain the schedule and the prediction_type, got {schedule!r}. Create the "
            "model with DiffusionVelocityUNet.from_unet(unet, scheduler)."
        )


def _alphas_cumprod(schedule: dict[str, Any]) -> Tensor:
    return DDIMScheduler(**{name: value for name, value in schedule.items() if name in _SCHEDULE}).alphas_cumprod


def _read_schedule(scheduler: Any) -> dict[str, Any]:
    """Return the settings in a scheduler's config that determine its alphas_cumprod, after checking that they do."""
    config = getattr(scheduler, "config", {})
    kind = config.get("prediction_type")
    if not is_diffusion(scheduler):
        raise ValueError(
            f"Expected a diffusion scheduler with alphas_cumprod and a prediction_type out of {DIFFUSION_TYPES}, got "
            f"{type(scheduler).__name__} with {kind!r}. A flow needs no conversion."
        )
    schedule = {name: config[name] for name in _SCHEDULE if config.get(name) is not None}
    if "trained_betas" in schedule:
        schedule["trained_betas"] = torch.as_tensor(schedule["trained_betas"]).tolist()
    # Some schedulers replace an exact 0 at the end with 2^-24.
    if not torch.allclose(_alphas_cumprod(schedule), scheduler.alphas_cumprod.cpu(), rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"The config of the {type(scheduler).__name__} does not determine its alphas_cumprod, got {schedule}. "
            "Pass a scheduler of diffusers, such as DDIMScheduler.from_config(pipeline.scheduler.config)."
        )
    return {**schedule, "prediction_type": kind}
