"""The Stacked U-Net of InstaFlow-1.7B: two of diffusers' U-Nets in series, with no latents between them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from diffusers import UNet2DConditionModel
from diffusers.loaders import peft as diffusers_peft
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor
from typing_extensions import Self

from rectified_diffusers.flow.prediction import DiffusionAsFlow
from rectified_diffusers.models.velocity_unet import SIGNATURE, diffusion_inside, flow_times

logger = logging.getLogger(__name__)

SECOND = "second."

# Before diffusers 0.37, this table has no default, and `set_adapters` fails for a class that is not in it.
_expand_scales = diffusers_peft._SET_ADAPTER_SCALE_FN_MAPPING["UNet2DConditionModel"]
diffusers_peft._SET_ADAPTER_SCALE_FN_MAPPING.setdefault("StackedUNet", _expand_scales)


class StackedUNet(UNet2DConditionModel):
    """A U-Net whose last features feed a second one: the network of InstaFlow-1.7B (arXiv:2309.06380).

    features = first(x_t, t, text) without conv_norm_out, conv_act and conv_out; v = second(features, t, text) without
    conv_in. The features replace the output of that conv_in and are also the second U-Net's first skip connection. No
    weights are shared. With the blocks of Stable Diffusion 1.5 it has 1,719,017,924 parameters.

    The first U-Net is this model itself, so that code that reads a U-Net's config and layers reads the half that
    receives the latents. The other one is its submodule `second`. Save, load, LoRA, attention processors and gradient
    checkpointing are diffusers' and cover both. Extensions made for a plain U-Net are handled as follows:

    - a LoRA is applied to both halves (one that names a layer of `second` is loaded unchanged), as are FreeU and a
      `scale`;
    - the residuals of a ControlNet or a T2I-Adapter go into the first half: a ControlNet is a copy of its encoder;
    - an IP-Adapter is refused.

    Args: those of `UNet2DConditionModel`, for both halves, and
        diffusion_schedule: for a stack that outputs a diffusion prediction, which is converted to a velocity outside
            its layers as in a `DiffusionVelocityUNet`. `from_unet` keeps that of its U-Nets. If the stack predicts
            epsilon, the conversion multiplies the errors of the second half, which is new to its features, by 1 /
            alpha at the noise. Easier initializations for a stack are a U-Net that predicts v, and one whose flow was
            initialized from bare weights.

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
                "addition_embed_type='image_hint' joins a picture to the latents before conv_in, which the second "
                "half does not have. Stack U-Nets that take latents alone."
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
                f"The second half's answer is read as the first half's config says, got a {type(unet).__name__} with "
                f"diffusion_schedule {schedules[0]} and a {type(second).__name__} with {schedules[1]}. Stack two of "
                "one kind."
            )
        stacked: Any = cls.from_config(unet.config)
        weights = {**unet.state_dict(), **second.state_dict(prefix=SECOND)}
        removed = ("conv_norm_out.", "conv_out.", SECOND + "conv_in.")
        weights = {name: weight.clone() for name, weight in weights.items() if not name.startswith(removed)}
        _require_equal_shapes(stacked.state_dict(), weights)
        stacked.load_state_dict(weights, assign=True)  # keep their dtypes and devices
        return stacked.train(unet.training)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Run both halves on x_t with the same time and text; the arguments are those of `UNet2DConditionModel`.

        Args:
            sample: x_t, `(B, C, H, W)`; the result has its shape, except for the number of channels.
            timestep: in [0, 1000], scalar or `(B,)`.
            encoder_hidden_states: text embeddings, `(B, tokens, cross_attention_dim)`.
            down_block_additional_residuals: from a ControlNet; like the two that follow, only for the first half.
        """
        conditions: dict[str, Any] = {
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs,
            "added_cond_kwargs": added_cond_kwargs,
            "encoder_attention_mask": encoder_attention_mask,
        }
        residuals: dict[str, Any] = {
            "down_block_additional_residuals": down_block_additional_residuals,
            "mid_block_additional_residual": mid_block_additional_residual,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
        }
        first = super().forward

        def ask(sample: Tensor, timestep: Tensor | float | int) -> Tensor:
            features, *_ = first(
                sample, timestep, encoder_hidden_states, **conditions, **residuals, return_dict=False
            )  # (B, block_out_channels[0], H, W)
            return self.second(features, timestep, encoder_hidden_states, **conditions, return_dict=False)[0]

        if self.as_flow is None:
            velocity = ask(sample, timestep)
        else:
            velocity = self.as_flow(ask, sample, flow_times(sample, timestep))
        return UNet2DConditionOutput(sample=velocity) if return_dict else (velocity,)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Mapping[str, Any],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA for the stack, or one for a plain U-Net into both halves; pipelines call this with tensors.

        Args:
            pretrained_model_name_or_path_or_dict: weights by name, in any of diffusers' formats.
            prefix: of the names for this model, "unet" in a pipeline's files.
            hotswap: replace the weights of a loaded adapter of the same name.
            kwargs: diffusers' own, passed on.
        """
        weights = pretrained_model_name_or_path_or_dict
        if not isinstance(weights, Mapping):
            raise TypeError(
                f"StackedUNet.load_lora_adapter takes weights by name, got {type(weights).__name__}. Load a file with "
                "the pipeline's load_lora_weights, or read it with safetensors.torch.load_file first."
            )
        start = "" if prefix is None else f"{prefix}."
        if not any(name.startswith(start + SECOND) for name in weights):
            logger.info("The LoRA names no layer of the second U-Net: it is put onto both.")
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
        raise ValueError(
            "An IP-Adapter has weights for the attention layers of one U-Net, a StackedUNet has those of two. "
            "Use it with the U-Net that the stack was made from."
        )


StackedUNet.__init__.__signature__ = SIGNATURE  # pyright: ignore[reportFunctionMemberAccess]


def _pass_on(features: Tensor) -> Tensor:
    return features


def _require_equal_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` for the first weight that is missing from the stack or has another shape in it."""
    for name in sorted({*expected, *found}):
        shapes = [tuple(weights[name].shape) if name in weights else None for weights in (expected, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The stack expects {name!r} of shape {shapes[0]}, the given U-Nets have it with {shapes[1]}. Stack "
                "two plain U-Nets of one config, with no LoRA attached (fuse and unload it first)."
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
