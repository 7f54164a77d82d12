"""Replace a pipeline's VAE and text encoder with a fine-tune's: the other half of adopting its style."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from rectified_diffusers.checks import require_pipeline
from rectified_diffusers.loading.errors import remedies
from rectified_diffusers.loading.lora_checks import refuse_lora
from rectified_diffusers.weights.weight_files import check_same_shapes


@dataclass(frozen=True)
class SwappedComponents:
    """Hold the components that `swap_components` removed from a pipeline, to restore them.

    Example:
        ```python
        swapped = swap_components(pipeline, "Lykon/dreamshaper-7")
        image = pipeline("a red apple").images[0]
        swapped.take_back()
        ```
    """

    pipeline: DiffusionPipeline
    originals: dict[str, nn.Module]

    def take_back(self) -> None:
        """Put the original components back: the same objects, on whatever device they are."""
        for name, original in self.originals.items():
            setattr(self.pipeline, name, original)


def swap_components(
    pipeline: DiffusionPipeline, fine_tune: str | Path, components: Sequence[str] = ("vae", "text_encoder")
) -> SwappedComponents:
    """Replace a pipeline's models with those of a fine-tune, on the same device and in the same dtype.

    The result holds the original models in memory for as long as it is kept.

    Args:
        fine_tune: folder or Hub id of a pipeline; only the named components are read.
        components: names of models in the pipeline; for the U-Net, use a weight delta instead (`apply_weight_delta`).
    """
    require_pipeline("swap_components", pipeline, "components")
    models = {name: value for name, value in pipeline.components.items() if isinstance(value, nn.Module)}
    replaced: dict[str, Any] = {}
    for name in components:
        if name not in models:
            raise ValueError(f"{type(pipeline).__name__} has no model {name!r}; its models: {', '.join(models)}.")
        replaced[name] = _load_like(models[name], fine_tune, name)
    for name, model in replaced.items():
        setattr(pipeline, name, model)
    return SwappedComponents(pipeline, {name: models[name] for name in replaced})


def _load_like(old: Any, fine_tune: str | Path, name: str) -> Any:
    whose, whose_expected = f"the fine-tune's {name}", f"the pipeline's {name}"
    refuse_lora(old.state_dict(), whose_expected)
    with remedies(fine_tune):
        new = type(old).from_pretrained(fine_tune, subfolder=name, use_safetensors=True)
    shapes, expected = ({key: tuple(weight.shape) for key, weight in m.state_dict().items()} for m in (new, old))
    check_same_shapes(shapes, expected, whose, whose_expected)
    scale, expected_scale = (getattr(model.config, "scaling_factor", None) for model in (new, old))
    if scale != expected_scale:  # of the latents: the U-Net was trained with one of them
        scales = f"The scaling_factor of {whose} is {scale}, expected {expected_scale} as in {whose_expected}"
        raise ValueError(f"{scales}. Leave {name!r} out of `components`.")
    if new.dtype != old.dtype:  # diffusers warns about every conversion, even between equal dtypes
        new = new.to(old.dtype)
    return new.to(old.device).train(old.training)
