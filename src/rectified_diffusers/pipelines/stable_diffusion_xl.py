"""Pipelines for rectified flows with the architecture of Stable Diffusion XL; all but the scheduler is inherited."""

from diffusers import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from rectified_diffusers.pipelines.mixin import RectifiedFlowMixin, StartFromImage, one_step_by_default


@one_step_by_default
class RectifiedFlowXLPipeline(RectifiedFlowMixin, StableDiffusionXLPipeline):
    """Text to image with the architecture of Stable Diffusion XL: StableDiffusionXLPipeline, in one step."""


@one_step_by_default
class RectifiedFlowXLImg2ImgPipeline(StartFromImage, StableDiffusionXLImg2ImgPipeline):
    """Image to image with the architecture of Stable Diffusion XL, at any strength in one step."""


@one_step_by_default
class RectifiedFlowXLInpaintPipeline(StartFromImage, StableDiffusionXLInpaintPipeline):
    """Inpainting with the architecture of Stable Diffusion XL, at any strength in one step."""


@one_step_by_default
class RectifiedFlowXLControlNetPipeline(RectifiedFlowMixin, StableDiffusionXLControlNetPipeline):
    """Text and conditioning images to image with the architecture of Stable Diffusion XL, in one step."""


@one_step_by_default
class RectifiedFlowXLControlNetImg2ImgPipeline(StartFromImage, StableDiffusionXLControlNetImg2ImgPipeline):
    """Image to image with a ControlNet and the architecture of Stable Diffusion XL, at any strength in one step."""


@one_step_by_default
class RectifiedFlowXLControlNetInpaintPipeline(StartFromImage, StableDiffusionXLControlNetInpaintPipeline):
    """Inpainting with a ControlNet and the architecture of Stable Diffusion XL, at any strength in one step."""
