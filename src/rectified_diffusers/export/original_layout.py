"""Export a U-Net with the weight names of the original Stable Diffusion checkpoints, for ComfyUI and others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from rectified_diffusers.checks import require_one_of, require_pipeline, require_plain_weights
from rectified_diffusers.export.stock import fold_sign
from rectified_diffusers.files import write_atomically
from rectified_diffusers.loading.lora_checks import refuse_lora
from rectified_diffusers.loading.original_names import original_names
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler, require_straight

PREFIX = "model.diffusion_model."


def original_unet_layout(weights: Mapping[str, Tensor], layers_per_block: int) -> dict[str, Tensor]:
    """Return a U-Net's weights renamed from diffusers' names to the original ones; the tensors are shared.

    The original numbers its blocks consecutively, one for each feature map that a skip connection carries: `conv_in`
    is input block 0, and every resolution adds `layers_per_block` blocks and one for its downsampling. The output
    blocks mirror them, with the upsampling inside the last block of a resolution.

    Args:
        weights: `unet.state_dict()`, of the layout of Stable Diffusion 1.x or 2.x; other names are an error.
        layers_per_block: resnets per resolution in the down blocks, from the U-Net's config; the up blocks have one
            more.
    """
    originals = original_names(weights, layers_per_block)
    if None in originals.values():
        name = next(name for name, original in originals.items() if original is None)
        raise ValueError(
            f"Expected the U-Net of a Stable Diffusion 1.x or 2.x, got the weight {name!r}, which has no place in the "
            "original layout. Save it with export_diffusers or save_pretrained."
        )
    return {f"{PREFIX}{originals[name]}": tensor for name, tensor in weights.items()}


UNetFormat = Literal["comfyui", "ldm"]


def export_unet(pipeline: Any, path: str | Path, unet_format: UNetFormat = "comfyui") -> None:
    """Save a pipeline's U-Net to one file, with the names of the original Stable Diffusion checkpoints.

    The names are those of `v1-5-pruned-emaonly.safetensors`, with the prefix `model.diffusion_model.`, and the values
    keep their dtype; `UNet2DConditionModel.from_single_file` reads the file back. There are two formats:

    - `comfyui` predicts noise - data, as flow models do there: the weight and bias of the last convolution are
      negated, which is exact. Its node ModelSamplingSD3 with shift 1 then takes the same steps as our scheduler.
    - `ldm` is the unchanged U-Net: it predicts data - noise, which other programs' samplers do not expect.

    Args:
        pipeline: with a UNet2DConditionModel of the layout of Stable Diffusion 1.x or 2.x. `comfyui` needs our
            scheduler, which defines the sign.
        path: a file that ends in .safetensors; it is replaced.

    Example:
        ```python
        export_unet(pipeline, "comfyui.safetensors")
        ```
    """
    require_pipeline("export_unet", pipeline, "unet", "scheduler")
    path, unet = Path(path), pipeline.unet
    require_one_of("unet_format", unet_format, get_args(UNetFormat))
    if path.suffix != ".safetensors":
        raise ValueError(f"path must be a file whose name ends in .safetensors, got {str(path)!r}.")
    if type(unet) is not UNet2DConditionModel:
        raise ValueError(f"the original layout needs a UNet2DConditionModel, got {type(unet).__name__}.")
    refuse_lora(unet.state_dict(), "the pipeline's unet")
    require_plain_weights("export_unet", {"unet": unet})
    if unet_format == "comfyui":
        if not isinstance(pipeline.scheduler, RectifiedFlowEulerScheduler):
            kind = type(pipeline.scheduler).__name__
            raise ValueError(f"comfyui needs a RectifiedFlowEulerScheduler, got {kind}. Use 'ldm' for diffusion.")
        require_straight(pipeline.scheduler, "export_unet for ComfyUI")
        if pipeline.scheduler.config["velocity_direction"] == "data":
            unet = fold_sign(unet)
    weights = original_unet_layout(unet.state_dict(), unet.config["layers_per_block"])
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))
