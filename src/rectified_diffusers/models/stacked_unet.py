"""The Stacked U-Net of InstaFlow-1.7B: two of diffusers' U-Nets in series, with no latents between them."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor
from typing_extensions import Self

from rectified_diffusers.flow.prediction import DiffusionAsFlow
from rectified_diffusers.models.velocity_unet import SIGNATURE, diffusion_inside, flow_times

logger = logging.getLogger(__name__)

SECOND = "second."


class StackedUNet(UNet2DConditionModel):
    """A U-Net whose last features feed a second one: the network of InstaFlow-1.7B (arXiv:2309.06380).

    features = first(x_t, t, text) without conv_norm_out, conv_act and conv_out; v = second(features, t, text) without
    conv_in. The features replace the output of that conv_in and are also the second U-Net's first skip connection. No
    weights are shared. With the blocks of Stable Diffusion 1.5 it has 1,719,017,924 parameters.

    The first U-Net is this model itself, the other one its submodule `second`. Save, load, LoRA, attention processors
    and gradient checkpointing are diffusers' and cover both. Extensions for a plain U-Net are handled as follows:

    - a LoRA is applied to both halves (one that names a layer of `second` is loaded unchanged), as are FreeU and a
      `scale`;
    - the residuals of a ControlNet or a T2I-Adapter go into the first half: a ControlNet is a copy of its encoder;
    - an IP-Adapter is refused.

    Args: those of `UNet2DConditionModel`, for both halves, and
        diffusion_schedule: for a stack that outputs a diffusion prediction, which is converted to a velocity as in a
            `DiffusionVelocityUNet`. `from_unet` keeps that of its U-Nets. For epsilon, the conversion multiplies the
            errors of the second half by 1 / alpha at the noise; U-Nets that predict v are easier to stack.

    Example:
        ```python
        pipeline = RectifiedFlowPipeline.from_pretrained("XCLiu/2_rectified_flow_from_sd_1_5")
        pipeline.unet = StackedUNet.from_unet(pipeline.unet)
        trainer = DistillTrainer(pipeline, triplets, DistillConfig(output_dir=Path("stacked")))
        ```
    """

    def __init__(self, *, diffusion_schedule: dict[str, Any] | None = None, **config: Any) -> None:
        if config.get("addition_embed_type") == "image_hint":
            raise ValueError(
                "addition_embed_type='image_hint' adds an image to the latents before conv_in, which the second half "
                "does not have. Stack U-Nets that take only latents."
            )
        super().__init__(**config)
        features = self.config["block_out_channels"][0]
        self.second: Any = UNet2DConditionModel(**{**config, "in_channels": features, "center_input_sample": False})
        self.conv_norm_out = self.conv_act = None  # the U-Net's forward skips a norm that is None
        # Functions, not nn.Identity: a LoRA for layers called conv_in would be attached to a module of that name.
        del self.conv_out, self.second.conv_in
        self.conv_out, self.second.conv_in = _pass_on, _pass_on
        self.as_flow: DiffusionAsFlow | None = None
        if diffusion_schedule is not None:
            self.register_to_config(diffusion_schedule=diffusion_schedule)
            self.as_flow = diffusion_inside(self.config)

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, second: UNet2DConditionModel | None = None) -> Self:
        """Stack copies of a U-Net. The result needs training: the second half has not learned to read features.

        Args:
            unet: first half, without its output layers; dtypes and devices are kept.
            second: second half, of the same shape, without its conv_in; defaults to `unet`. The paper does not say how
                its second half was initialized; `UNet2DConditionModel.from_config(unet.config)` is random.
        """
        second = unet if second is None else second
        for given in (unet, second):
            if not isinstance(given, UNet2DConditionModel):
                raise TypeError(
                    f"Expected UNet2DConditionModels to stack, got {type(given).__name__}. Give pipeline.unet."
                )
        schedules = [given.config.get("diffusion_schedule") for given in (unet, second)]
        if schedules[0] != schedules[1]:
            raise ValueError(
                f"Expected two U-Nets with one diffusion_schedule, got a {type(unet).__name__} with {schedules[0]} "
                f"and a {type(second).__name__} with {schedules[1]}."
            )
        stacked: Any = cls.from_config(unet.config)
        weights = {**unet.state_dict(), **second.state_dict(prefix=SECOND)}
        removed = ("conv_norm_out.", "conv_out.", SECOND + "conv_in.")
        weights = {name: weight.clone() for name, weight in weights.items() if not name.startswith(removed)}
        _require_equal_shapes(stacked.state_dict(), weights)
        stacked.load_state_dict(weights, assign=True)  # keep their dtypes and devices
        return stacked.train(unet.training)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        *,
        return_dict: bool = True,
        **options: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Run both halves on x_t with the same time and text.

        Args:
            sample: x_t, `(B, C, H, W)`; the result has its shape, except for the number of channels.
            timestep: in [0, 1000], scalar or `(B,)`.
            encoder_hidden_states: text embeddings, `(B, tokens, cross_attention_dim)`.
            options: of `UNet2DConditionModel.forward`; the residuals of a ControlNet or T2I-Adapter are only for the
                first half.
        """
        first = super().forward
        shared = {name: value for name, value in options.items() if "additional_residual" not in name}

        def predict(sample: Tensor, timestep: Tensor | float | int) -> Tensor:
            # (B, block_out_channels[0], H, W)
            features = first(sample, timestep, encoder_hidden_states, **options, return_dict=False)[0]
            return self.second(features, timestep, encoder_hidden_states, **shared, return_dict=False)[0]

        if self.as_flow is None:
            velocity = predict(sample, timestep)
        else:
            velocity = self.as_flow(predict, sample, flow_times(sample, timestep))
        return UNet2DConditionOutput(sample=velocity) if return_dict else (velocity,)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Mapping[str, Any],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA for the stack, or one for a plain U-Net into both halves; pipelines call this with tensors."""
        weights = pretrained_model_name_or_path_or_dict
        if not isinstance(weights, Mapping):
            raise TypeError(
                f"StackedUNet.load_lora_adapter takes weights by name, got {type(weights).__name__}. Load a file with "
                "the pipeline's load_lora_weights."
            )
        start = "" if prefix is None else f"{prefix}."
        if not any(name.startswith(start + SECOND) for name in weights):
            logger.info("The LoRA names no layer of the second U-Net: it is applied to both.")
            weights = _onto_both(weights, start)
            for name in ("network_alphas", "metadata"):
                if kwargs.get(name):
                    kwargs[name] = _onto_both(kwargs[name], start)
        super().load_lora_adapter(dict(weights), hotswap=hotswap, **{**kwargs, "prefix": prefix})

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Enable FreeU (arXiv:2309.11497) in both halves."""
        super().enable_freeu(s1, s2, b1, b2)
        self.second.enable_freeu(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Disable FreeU in both halves."""
        super().disable_freeu()
        self.second.disable_freeu()

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("A StackedUNet cannot use an IP-Adapter, which has weights for the layers of one U-Net.")


StackedUNet.__init__.__signature__ = SIGNATURE  # pyright: ignore[reportFunctionMemberAccess]


def _pass_on(features: Tensor) -> Tensor:
    return features


def _require_equal_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` for the first weight that is missing from the stack or has another shape in it."""
    for name in sorted({*expected, *found}):
        shapes = [tuple(weights[name].shape) if name in weights else None for weights in (expected, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Expected {name!r} of shape {shapes[0]} in the U-Nets, got {shapes[1]}. Stack two plain U-Nets of "
                "one config, with no LoRA attached (fuse and unload it first)."
            )


def _onto_both(entries: Mapping[str, Any], start: str) -> dict[str, Any]:
    """Return the weights, alphas or metadata of a plain U-Net's LoRA with those of the second half added.

    `start` is the prefix of the names, "unet." in a pipeline's files; other names are kept unchanged.
    """
    both: dict[str, Any] = {}
    for key, value in entries.items():
        if not key.startswith(start):
            both[key] = value
            continue
        name = key.removeprefix(start)
        if name in ("rank_pattern", "alpha_pattern") and isinstance(value, Mapping):
            both[key] = {**value, **{f"^{SECOND}{layer.removeprefix('^')}": entry for layer, entry in value.items()}}
        elif isinstance(value, Tensor):  # copied: peft's hotswap writes into the old tensors
            both.update({start + half: value.clone() for half in _halves_with(name)})
        elif name.endswith(".alpha"):
            both.update({start + half: value for half in _halves_with(name)})
        else:
            both[key] = value
    return both


def _halves_with(name: str) -> Iterator[str]:
    """Yield the names in the stack of a plain U-Net's layer; conv_in and conv_out exist only once."""
    if not name.startswith("conv_out."):
        yield name
    if not name.startswith("conv_in."):
        yield SECOND + name
