"""diffusers' modular pipelines: the stock blocks of SDXL sample our models, since the scheduler carries the flow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, ModularPipeline, StableDiffusionXLAutoBlocks, UniPCMultistepScheduler
from PIL import Image

from rectified_diffusers import RectifiedFlowEulerScheduler, RectifiedFlowXLImg2ImgPipeline, save_portable
from rectified_diffusers.export.stock import export_diffusers
from tests.tiny import make_tiny_xl_pipeline

PICTURE = Image.effect_noise((32, 32), 50).convert("RGB")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = make_tiny_xl_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def blocks_of(pipeline: Any, scale: float = 1.0) -> Any:
    """Return the stock blocks with the components of a pipeline, and this guidance."""
    blocks = StableDiffusionXLAutoBlocks().init_pipeline()
    known = {name: part for name, part in pipeline.components.items() if part is not None}
    blocks.update_components(**known, guider=ClassifierFreeGuidance(guidance_scale=scale))
    blocks.set_progress_bar_config(disable=True)
    return blocks


def latents_of(call: Any, **options: Any) -> torch.Tensor:
    """Call blocks or a pipeline with seed 0 and return the latents."""
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", **options}
    modular = isinstance(call, ModularPipeline)
    found: Any = call(prompt="a red apple", output="latents", **options) if modular else None
    return found if modular else call("a red apple", guidance_scale=1.0, **options).images


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_stock_blocks_sample_our_components(pipeline: Any, steps: int) -> None:
    found = latents_of(blocks_of(pipeline), num_inference_steps=steps)
    assert torch.equal(found, latents_of(pipeline, num_inference_steps=steps))


def test_guidance_is_that_of_the_pipeline(pipeline: Any) -> None:
    """Within rounding: the blocks run the two passes one after the other, the pipeline as one batch."""
    found = latents_of(blocks_of(pipeline, 3.0), num_inference_steps=2)
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", "num_inference_steps": 2}
    torch.testing.assert_close(found, pipeline("a red apple", guidance_scale=3.0, **options).images)


def test_stock_blocks_load_a_saved_folder(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    blocks = StableDiffusionXLAutoBlocks().init_pipeline(str(tmp_path))
    blocks.load_components()
    blocks.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    assert type(blocks.scheduler) is RectifiedFlowEulerScheduler
    found = latents_of(blocks, num_inference_steps=2)
    assert torch.equal(found, latents_of(pipeline, num_inference_steps=2))


def test_a_modular_pipeline_loads_a_stock_export(pipeline: Any, tmp_path: Path) -> None:
    """Its solver is UniPC on integer timesteps, so the image is that of the exported folder."""
    export_diffusers(pipeline, tmp_path)
    blocks = ModularPipeline.from_pretrained(str(tmp_path))
    blocks.load_components()
    blocks.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    assert type(blocks.scheduler) is UniPCMultistepScheduler
    expected = latents_of(pipeline, num_inference_steps=2)
    torch.testing.assert_close(latents_of(blocks, num_inference_steps=2), expected, atol=0.05, rtol=0)


def test_blocks_refuse_the_scheduler_of_a_portable_folder(pipeline: Any, tmp_path: Path) -> None:
    """Modular pipelines load no code from a component's folder, whatever trust_remote_code says.

    The lowest supported diffusers looks for an installed module of that name.
    """
    save_portable(pipeline, tmp_path)
    with pytest.raises((ValueError, ModuleNotFoundError), match="rectified_flow_scheduler"):
        StableDiffusionXLAutoBlocks().init_pipeline(str(tmp_path)).load_components(trust_remote_code=True)


def test_image_to_image_needs_our_class(pipeline: Any) -> None:
    """The stock blocks skip the first steps of the grid, which leaves one step at strength 0.5 without any."""
    options = {"image": PICTURE, "strength": 0.5, "num_inference_steps": 1}
    with pytest.raises(ValueError, match="timesteps must hold one value"):
        latents_of(blocks_of(pipeline), **options)
    ours = RectifiedFlowXLImg2ImgPipeline.from_pipe(pipeline)
    assert latents_of(ours, **options).isfinite().all()
