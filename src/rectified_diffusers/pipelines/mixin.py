"""Mixins for rectified flow in Stable Diffusion pipelines: our scheduler, one step by default, the rest inherited."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from typing_extensions import Self

from rectified_diffusers.loading.errors import dtype_option, remedies
from rectified_diffusers.loading.lora_checks import refuse_any_lora
from rectified_diffusers.loading.mixin import SafetensorsLoaders
from rectified_diffusers.loading.safety import refuse_foreign_code, safetensors_only
from rectified_diffusers.loading.saving import finish_saving
from rectified_diffusers.pipelines.calls import FiniteImageProcessor, one_encoding_at_a_time
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler

logger = logging.getLogger(__name__)

_PUSH_OPTIONS = ("commit_message", "private", "token", "create_pr", "safe_serialization", "variant")
_OWNERS: WeakKeyDictionary[SchedulerMixin, "ref[RectifiedFlowMixin]"] = WeakKeyDictionary()  # of the schedulers


class RectifiedFlowMixin(SafetensorsLoaders):
    """Make a diffusers pipeline sample a rectified flow, whatever scheduler its checkpoint was saved with.

    A diffusion scheduler that is stored in a checkpoint (the published InstaFlow checkpoints name PNDMScheduler) or
    comes from another pipeline through `from_pipe` is replaced with ours, with a message at info level. A scheduler
    that the caller passes or assigns must be ours; `None` selects the default.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        encode_prompt: Any = getattr(cls, "encode_prompt", None)
        if encode_prompt is not None:
            cls.encode_prompt = one_encoding_at_a_time(encode_prompt)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a checkpoint as `DiffusionPipeline.from_pretrained` does, with errors that explain the remedy.

        Loads in float32 by default: transformers 5 would otherwise load a half-precision text encoder as stored, next
        to diffusers' U-Net in float32. Weights are read only from safetensors; pickles are refused.
        """
        kwargs = safetensors_only(kwargs)
        if not kwargs.get("trust_remote_code"):
            # A portable save contains our scheduler's source; extract_init_dict uses the installed class instead.
            refuse_foreign_code(pretrained_model_name_or_path, replaced=[RectifiedFlowEulerScheduler.__name__])
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs |= dtype_option(torch.float32)
        where = {name: kwargs.get(name) for name in ("variant", "cache_dir", "revision")}
        with remedies(pretrained_model_name_or_path, **where):
            made: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return made

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Read a checkpoint's list of components, and replace a stored diffusion scheduler with ours."""
        library, class_name = config_dict.get("scheduler") or (None, "")
        ours = RectifiedFlowEulerScheduler.__name__
        if class_name == ours:  # a portable save names its own copy of the source, which is not needed here
            config_dict = {**config_dict, "scheduler": ["rectified_diffusers", ours]}
        # A stored flow scheduler is kept, so that __setattr__ refuses it: its models predict noise - data.
        if library == "diffusers" and not class_name.startswith("FlowMatch"):
            logger.info("The checkpoint's %s is a diffusion scheduler; %s takes its place.", class_name, ours)
            config_dict = {**config_dict, "scheduler": ["rectified_diffusers", ours]}
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Build this pipeline from another one's components; replace a diffusion scheduler with ours."""
        theirs: Any = pipeline.components.get("scheduler")
        if "scheduler" not in kwargs:
            kind = type(theirs) if isinstance(theirs, RectifiedFlowEulerScheduler) else RectifiedFlowEulerScheduler
            # From its config: our scheduler from a portable save keeps its settings, and a flow scheduler is refused.
            kwargs["scheduler"] = kind.from_config({} if theirs is None else theirs.config)
            if kind is not type(theirs):
                logger.info("%s of the given pipeline is replaced by %s.", type(theirs).__name__, kind.__name__)
        if isinstance(unet := pipeline.components.get("unet"), UNet2DConditionModel):
            kwargs.setdefault("unet", unet)  # diffusers carries over only components of exactly the annotated class
        made: Any = super().from_pipe(pipeline, **kwargs)
        return made

    def register_modules(self, **kwargs: Any) -> None:
        """Register the components; `scheduler=None` selects the default scheduler."""
        if "scheduler" in kwargs and kwargs["scheduler"] is None:
            kwargs["scheduler"] = RectifiedFlowEulerScheduler()
        super().register_modules(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # Construction ends here too, so this check covers both `pipeline.scheduler = ...` and `scheduler=...`.
        is_ours = isinstance(value, RectifiedFlowEulerScheduler)
        if name == "scheduler" and isinstance(value, SchedulerMixin) and not is_ours:
            raise ValueError(
                f"{type(self).__name__} needs a RectifiedFlowEulerScheduler, got {type(value).__name__}. Leave the "
                "scheduler out, or use the stock diffusers pipeline for a diffusion model."
            )
        if name == "scheduler" and is_ours:
            owner = _OWNERS.get(value, lambda: None)()
            if owner is not None and owner is not self:  # a call changes it: each pipeline has its own
                value = type(value).from_config(value.config)
            _OWNERS[value] = ref(self)
        if name == "image_processor" and type(value) is VaeImageProcessor:
            value = FiniteImageProcessor.from_config(value.config)
        super().__setattr__(name, value)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, readable by transformers 4 and 5; refuse a model with a LoRA attached."""
        refuse_any_lora(self)
        push_to_hub = kwargs.pop("push_to_hub", False)
        super().save_pretrained(save_directory, *args, **kwargs)
        finish_saving(self, Path(save_directory))
        if push_to_hub:  # saves once more, to its own folder
            options = {name: kwargs[name] for name in _PUSH_OPTIONS if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **options)


@contextmanager
def _skipping_last_layers(text_encoder: Any, clip_skip: int) -> Iterator[None]:
    """Make a CLIP text model return the output of `clip_skip` layers before its last one, through its final norm."""

    def request_layers(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_hidden_states": True}

    def return_layer(model: Any, args: tuple[Any, ...], output: Any) -> tuple[Tensor]:
        layers = len(output.hidden_states) - 1  # the first is the embedding
        if not 0 <= clip_skip <= layers:
            raise ValueError(f"clip_skip must be in [0, {layers}], the layers of the encoder, got {clip_skip}.")
        return (model.final_layer_norm(output.hidden_states[layers - clip_skip]),)

    with (
        text_encoder.register_forward_pre_hook(request_layers, with_kwargs=True),
        text_encoder.register_forward_hook(return_layer),
    ):
        yield


class OneTextEncoder(RectifiedFlowMixin):
    """Fix `clip_skip`: diffusers reads it through `text_encoder.text_model`, which transformers 5 removed.

    Adding that attribute to the model instead would mislead the LoRA loader, which depends on it.
    """

    text_encoder: Any

    def encode_prompt(
        self,
        prompt: Any,
        device: Any,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> Any:
        """Encode prompts as diffusers does; where it cannot skip layers, encode the prompt first and pass it on."""
        stock: Any = super()
        broken = self.text_encoder is not None and not hasattr(self.text_encoder, "text_model")
        if broken and clip_skip is not None and prompt_embeds is None:
            with _skipping_last_layers(self.text_encoder, clip_skip):
                prompt_embeds, _ = stock.encode_prompt(prompt, device, 1, False, lora_scale=lora_scale)
        return stock.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=lora_scale,
            clip_skip=clip_skip,
        )


class StartFromImage(RectifiedFlowMixin):
    """Start at t = 1 - strength, and spend all requested steps after it."""

    scheduler: RectifiedFlowEulerScheduler

    def get_timesteps(
        self,
        num_inference_steps: int,
        strength: float,
        device: str | torch.device,
        denoising_start: float | None = None,
    ) -> tuple[Tensor, int]:
        """Return the grid from t = 1 - strength to 1, which replaces the one that `__call__` just set from 0.

        The flow is continuous in t. Skipping the first steps of a full grid, as diffusion does, would leave a one-step
        model without any step.

        Args:
            num_inference_steps: N, spent between 1 - strength and 1; with `denoising_start`, between 0 and 1.
            strength: share of the flow that is run again, in (0, 1].
            denoising_start: Stable Diffusion XL's argument, instead of `strength`: continue another pipeline's
                latents, which end at this t by its `denoising_end`, on the same grid of N steps.
        """
        if denoising_start is not None:
            stock: Any = super()
            timesteps, left = stock.get_timesteps(num_inference_steps, strength, device, denoising_start)
            if left < 1:
                raise ValueError(
                    f"denoising_start={denoising_start} leaves none of num_inference_steps={num_inference_steps}. "
                    "Pass more steps to both pipelines, or strength instead of denoising_start."
                )
            return timesteps, left
        if not 0 < strength <= 1:
            raise ValueError(f"strength, the share of the flow that is run again, must be in (0, 1], got {strength}.")
        full = self.scheduler.sigmas[:-1]
        self.scheduler.set_timesteps(num_inference_steps, device, start=1 - strength)
        if not torch.allclose(self.scheduler.sigmas[:-1], strength * full):  # the caller's own grid: keep its shape
            timesteps = self.scheduler.config["num_train_timesteps"] * strength * full
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        return self.scheduler.timesteps, num_inference_steps
