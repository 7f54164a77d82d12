"""LoRA training (arXiv:2106.09685): a peft adapter on the student, saved in the format of diffusers."""

import copy
import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rectified_diffusers.training.config import TrainerConfig
from rectified_diffusers.training.sharding import trainable
from rectified_diffusers.weights.weight_files import write_weights

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file name that `pipeline.load_lora_weights(folder)` expects."""
PEFT_FILES = "adapter_config.json", "adapter_model.safetensors"
"""Further files for a network that diffusers loads no LoRA into: `PeftModel.from_pretrained(network, folder)` does."""


def add_lora(network: Any, config: TrainerConfig) -> Any:
    """Add a LoRA to a network, freeze the other weights, and return the network.

    The LoRA's product is zero, so the output does not change.

    Its first matrices are random, from the config's seed: equal configs start from equal adapters.
    """
    rank: Any = config.lora_rank
    alpha: Any = config.lora_alpha or rank
    _require_layers(network, config.lora_target_modules)
    network.requires_grad_(False)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="gaussian",
        target_modules=list(config.lora_target_modules),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if hasattr(network, "add_adapter"):
            network.add_adapter(settings)
        else:  # not every network of diffusers has it
            inject_adapter_in_model(settings, network)
    for weight in trainable(network):
        weight.data = weight.data.float()  # beside a quantized layer it has the dtype of that layer
    return network


def fuse_lora(network: Any) -> Any:
    """Return a copy of a network with the LoRA fused into the base weights, which other networks may share."""
    network = copy.deepcopy(network)
    if hasattr(network, "fuse_lora"):
        network.fuse_lora()
        network.unload_lora()
        return network
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    recurse_remove_peft_layers(network)
    del network.peft_config
    return network


@dataclass(frozen=True)
class Adapter:
    """The tensors and settings of a LoRA; later changes to the network do not affect them.

    Args:
        component: pipeline component that the network is: "unet" or "transformer".
        by_peft: whether only peft loads it, because the network has no `load_lora_adapter`.
    """

    component: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    by_peft: bool = False

    @classmethod
    def of(cls, network: Any, component: str) -> "Adapter":
        """Return a copy of the LoRA that `add_lora` added to a network."""
        tensors = {name: value.detach().clone() for name, value in get_peft_model_state_dict(network).items()}
        settings = network.peft_config["default"].to_dict()  # its sets have another order in each process
        settings = {name: sorted(part) if isinstance(part, set) else part for name, part in settings.items()}
        return cls(component, tensors, settings, not hasattr(network, "load_lora_adapter"))

    def save(self, pipeline_class: Any, folder: Path) -> None:
        """Save in the format of diffusers, with alpha, for `load_lora_weights(folder)` of such pipelines.

        A pipeline without it gets the file for `load_lora_adapter` of its network, with the component as prefix. A
        network without that gets `PEFT_FILES`, too.
        """
        save = pipeline_class.save_lora_weights if has_loader(pipeline_class, self.component) else self._save_plainly
        layers = {f"{self.component}_lora_layers": self.tensors}
        settings = {f"{self.component}_lora_adapter_metadata": self.settings}
        save(folder, weight_name=WEIGHTS, **layers, **settings)
        # Older safetensors write the metadata in a different order each time; equal runs must produce equal files.
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = dict(sorted(file.metadata().items()))
        tensors = dict(sorted(load_file(folder / WEIGHTS).items()))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        write_weights(folder / WEIGHTS, shapes, "float32", metadata, tensors.__getitem__)
        if self.by_peft:
            self._save_for_peft(folder)

    def _save_plainly(self, folder: Path, weight_name: str, **_: Any) -> None:
        named = {f"{self.component}.{name}": tensor.contiguous() for name, tensor in self.tensors.items()}
        LoraBaseMixin.write_lora_layers(
            named,
            str(folder),
            is_main_process=True,
            weight_name=weight_name,
            save_function=None,  # pyright: ignore[reportArgumentType]
            safe_serialization=True,
            lora_adapter_metadata={f"{self.component}.{name}": value for name, value in self.settings.items()},
        )

    def _save_for_peft(self, folder: Path) -> None:
        config, weights = PEFT_FILES
        (folder / config).write_text(json.dumps(self.settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tensors = {f"base_model.model.{name}": tensor for name, tensor in sorted(self.tensors.items())}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        write_weights(folder / weights, shapes, "float32", {"format": "pt"}, tensors.__getitem__)


def has_loader(pipeline_class: Any, component: str) -> bool:
    """Return whether a pipeline class saves and loads LoRAs of a component."""
    save = getattr(pipeline_class, "save_lora_weights", None)
    return save is not None and f"{component}_lora_layers" in inspect.signature(save).parameters


def _require_layers(network: Any, names: Iterable[str]) -> None:
    """Raise for a name that no layer name of the network ends with; peft ignores it if another name matches."""
    layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for name in names:
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            raise ValueError(
                f"{type(network).__name__} has no layer {name!r} to put a LoRA on. Its linear and convolution layers "
                f"end in {', '.join(sorted({layer.rpartition('.')[2] for layer in layers}))}; set lora_target_modules."
            )
