"""Load third-party files safely (LoRAs, single files, textual inversions, IP-Adapters): only safetensors, checked."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import _fetch_state_dict
from torch import Tensor, nn
from typing_extensions import Self

from rectified_diffusers.loading.complete import HUB_OPTIONS, require_weights
from rectified_diffusers.loading.downloads import checked_downloads
from rectified_diffusers.loading.lora_attach import (
    as_diffusers_reads_it,
    hotswapping,
    plan_attachment,
    require_attached,
    require_hotswap,
)
from rectified_diffusers.loading.lora_checks import attaching, check_lora, refuse_fused_lora
from rectified_diffusers.loading.safety import refuse_folder_of_pickles, refuse_pickle, safetensors_only

_TENSORS = "safetensors.torch.save_file(torch.load(file, weights_only=True), 'lora.safetensors')"
_WORD = "safetensors.torch.save_file({'<word>': vectors}, 'word.safetensors')"
_MODEL = "diffusers.StableDiffusionPipeline.from_single_file(file).save_pretrained(new_folder)"
_ADAPTER = (
    "safetensors.torch.save_file of its two dictionaries, as image_proj.* and ip_adapter.*; h94/IP-Adapter has a "
    ".safetensors file of each"
)
_FETCH_OPTIONS = ("weight_name", "use_safetensors", *HUB_OPTIONS)
_USER_AGENT = {"file_type": "attn_procs_weights", "framework": "pytorch"}
_ENCODER = "transformers.CLIPVisionModelWithProjection.from_pretrained(folder).save_pretrained(new_folder)"


class SafetensorsLoaders(DiffusionPipeline):
    """Loaders of a diffusers pipeline that refuse pickles without opening them and check LoRAs before attaching them.

    The names and defaults of the arguments are those of diffusers.
    """

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load one .safetensors file as diffusers does; refuse a .ckpt, or a file with missing weights."""
        refuse_pickle(pretrained_model_link_or_path, _MODEL)
        stock: Any = super()
        try:
            pipeline = stock.from_single_file(pretrained_model_link_or_path, **kwargs)
        except NotImplementedError as error:  # torch cannot move weights that diffusers did not find
            raise ValueError(
                f"{pretrained_model_link_or_path} lacks weights of the U-Net or of the VAE, expected all of them. "
                "Download it again, or load the folder that it was made from."
            ) from error
        require_weights(pipeline, pretrained_model_link_or_path)
        return pipeline

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA as diffusers does, in any spelling; each of its tensors is attached, or a ValueError is raised.

        A refused LoRA changes nothing in the pipeline. LyCORIS files other than LoCon and DoRA are refused: merge them
        with `apply_weight_delta(pipeline, file, scale)`.
        """
        stock: Any = super()
        load = stock.load_lora_weights
        options = {name: kwargs.pop(name) for name in _FETCH_OPTIONS if name in kwargs}
        models = {name: getattr(self, name, None) for name in self._lora_loadable_modules}
        models = {name: model for name, model in models.items() if isinstance(model, nn.Module)}
        with attaching(self, hotswap):
            weights, settings = _fetch(pretrained_model_name_or_path_or_dict, options)
            check_lora(weights, settings)
            plan = plan_attachment(weights, settings, models)
            if hotswap:
                require_hotswap(plan, adapter_name, models)
            weights, settings = as_diffusers_reads_it(plan, settings)
            with hotswapping(plan, adapter_name or "", models) if hotswap else nullcontext():
                load(weights, adapter_name=adapter_name, hotswap=hotswap, lora_settings=settings, **kwargs)
            require_attached(plan, adapter_name, models)

    def set_adapters(self, adapter_names: Any, adapter_weights: Any = None) -> None:
        """Activate and weight adapters as diffusers does; refuse it while a LoRA is fused, when it has no effect."""
        refuse_fused_lora(self)
        stock: Any = super()
        stock.set_adapters(adapter_names, adapter_weights)

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Read a LoRA as diffusers does, from safetensors, and check its values."""
        source = pretrained_model_name_or_path_or_dict
        if "lora_settings" in kwargs:  # from our load_lora_weights, which has read and checked the file
            return source, None, kwargs["lora_settings"]
        kwargs = _refuse_pickles(source, kwargs)
        stock: Any = super()
        with checked_downloads(source, kwargs.get("cache_dir")):
            weights, alphas, *metadata = stock.lora_state_dict(source, **kwargs)
        check_lora(weights, {"alphas": alphas, "metadata": metadata[0] if metadata else None})
        return weights, alphas, *metadata

    def load_textual_inversion(self, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> None:
        """Load textual inversion embeddings as diffusers does, from .safetensors or tensors; refuse a .bin or .pt."""
        refuse_pickle(kwargs.get("weight_name"), _WORD)
        for source in _each(pretrained_model_name_or_path):
            if isinstance(source, (str, os.PathLike)):
                if os.path.isfile(source):
                    refuse_pickle(source, _WORD)
                refuse_folder_of_pickles(Path(source, kwargs.get("subfolder") or ""), _WORD)
        stock: Any = super()
        with _all_checked(pretrained_model_name_or_path, kwargs.get("cache_dir")):
            stock.load_textual_inversion(pretrained_model_name_or_path, *args, **safetensors_only(kwargs))

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        subfolder: Any,
        weight_name: Any,
        image_encoder_folder: str | None = "image_encoder",
        **kwargs: Any,
    ) -> None:
        """Load IP-Adapters as diffusers does, from .safetensors or tensors; refuse a .bin."""
        for source in _each(pretrained_model_name_or_path_or_dict):
            if not isinstance(source, (str, os.PathLike)):  # tensors, for which the name is not read
                continue
            for name in _each(weight_name):
                refuse_pickle(name, _ADAPTER)
            for folder in _each(subfolder) if image_encoder_folder is not None else ():
                # As in diffusers: a bare name is next to the weights, a path starts at the root.
                beside = "" if "/" in str(image_encoder_folder) else folder or ""
                refuse_folder_of_pickles(Path(source, beside, str(image_encoder_folder)), _ENCODER)
        stock: Any = super()
        with _all_checked(pretrained_model_name_or_path_or_dict, kwargs.get("cache_dir")):
            stock.load_ip_adapter(
                pretrained_model_name_or_path_or_dict, subfolder, weight_name, image_encoder_folder, **kwargs
            )


def _refuse_pickles(source: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with which diffusers reads a LoRA from safetensors; refuse a source that is a pickle."""
    options, name = safetensors_only(options), options.get("weight_name")
    refuse_pickle(name, _TENSORS)
    if isinstance(source, (str, os.PathLike)) and name is None:
        if os.path.isfile(source):
            refuse_pickle(source, _TENSORS)
        refuse_folder_of_pickles(Path(source, options.get("subfolder") or ""), _TENSORS)
    return options


def _fetch(source: Any, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of a LoRA file under its own names, and PEFT's settings if the file has them."""
    options = {**dict.fromkeys(_FETCH_OPTIONS), **_refuse_pickles(source, options)}
    with checked_downloads(source, options["cache_dir"]):
        return _fetch_state_dict(source, user_agent=_USER_AGENT, allow_pickle=False, **options)


@contextmanager
def _all_checked(sources: Any, cache_dir: str | None) -> Iterator[None]:
    with ExitStack() as stack:
        for source in _each(sources):
            stack.enter_context(checked_downloads(source, cache_dir))
        yield


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
