"""Quantized networks as the frozen base of a LoRA (QLoRA, arXiv:2305.14314), made by diffusers' quantization configs.

int8 is torchao's weight-only int8, one float32 scale for each output. nf4 is bitsandbytes' four-bit NormalFloat, one
scale for each block of 64 weights. Both quantize the linear layers; everything else keeps its dtype.
"""

import sys
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torch import Tensor, nn

Quantization = Literal["int8", "nf4"]
_LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


def quantized_loading(
    source: str, kind: Quantization, precision: Literal["no", "bf16", "fp16"] = "bf16"
) -> PipelineQuantizationConfig:
    """Return the `quantization_config` for `DiffusionPipeline.from_pretrained` that quantizes a pipeline's networks.

    Text encoders and VAE are not quantized.

    Args:
        source: folder or Hub id of the pipeline.
        precision: that of the training, in which nf4 layers compute; int8 layers take that of their input.

    Raises:
        ImportError: the library of this quantization is not installed.
        ValueError: this quantization does not run on this machine, or the pipeline has no network for it.
    """
    config = _config_of(kind, precision)
    networks = _networks(source)
    if not networks:
        raise ValueError(f"{source} has no network of diffusers to quantize. Load it without quantization.")
    for name, network in networks.items():
        if network.load_config(source, subfolder=name).get("quantization_config") is not None:
            raise ValueError(
                f"The {name} of {source} is already quantized, got quantize={kind!r}. Leave out quantize to train on "
                "it as it is."
            )
    mapping: dict[str, Any] = dict.fromkeys(networks, config)
    return PipelineQuantizationConfig(quant_mapping=mapping)


def _config_of(kind: Quantization, precision: str) -> Any:
    library = _LIBRARIES[kind]
    try:
        config: Any
        if kind == "int8":
            from diffusers import TorchAoConfig
            from torchao.quantization import Int8WeightOnlyConfig

            # Without inductor's settings, which would change the precision of float32 products in the whole process.
            config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
        else:
            from diffusers import BitsAndBytesConfig

            dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        DiffusersAutoQuantizer.from_config(config).validate_environment()
    except ImportError as error:
        raise ImportError(
            f'quantize="{kind}" needs {library}: pip install "rectified_diffusers[quantization]" '
            f"({str(error).strip().splitlines()[0]})."
        ) from error
    except RuntimeError as error:
        others = " or ".join(f'"{other}"' for other in get_args(Quantization) if other != kind)
        raise ValueError(f'quantize="{kind}" does not run here: {error} Use {others}.') from error
    return config


def _networks(source: str) -> dict[str, Any]:
    """Return the classes of the networks that a pipeline's index names, without text encoders and VAE."""
    index: Any = DiffusionPipeline.load_config(source)
    classes = {
        name: getattr(sys.modules.get(str(entry[0])), str(entry[1]), None)
        for name, entry in index.items()
        if isinstance(entry, (list, tuple)) and len(entry) == 2
    }
    return {
        name: kind
        for name, kind in classes.items()
        if isinstance(kind, type) and issubclass(kind, ModelMixin) and not hasattr(kind, "decode")
    }


def quantization_of(network: Any) -> str | None:
    """Return "int8" or "nf4", the name of another quantization, or None for weights in floating point."""
    config = getattr(getattr(network, "config", None), "quantization_config", None)
    if config is not None:
        method = getattr(config, "quant_method", config)
        if type(getattr(config, "quant_type", None)).__name__ == "Int8WeightOnlyConfig":
            return "int8"
        if getattr(config, "load_in_4bit", False):
            return str(config.bnb_4bit_quant_type)
        return str(getattr(method, "value", method))
    if getattr(network, "hf_quantizer", None) is not None:
        return type(network.hf_quantizer).__name__
    weights = network.parameters() if isinstance(network, nn.Module) else ()
    return next((type(weight).__name__ for weight in weights if type(weight) is not nn.Parameter), None)


def is_base_of_lora(quantization: str) -> bool:
    """Return whether a LoRA is trained on a network with this quantization."""
    return quantization in get_args(Quantization)


def stored_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a quantized tensor consists of, with their names; a plain one is itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        value = getattr(tensor, part)
        if value is not None:
            yield from stored_tensors(f"{name}.{part}", value)
