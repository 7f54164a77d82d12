"""Pipelines for rectified flows with the architecture of Stable Diffusion XL; all but the scheduler is inherited."""

from diffusers import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from rectified_diffusers.pipelines.calls import one_step_by_default
from rectified_diffusers.pipelines.mixin import RectifiedFlowMixin, StartFromImage


class RectifiedFlowXLPipeline(RectifiedFlowMixin, StableDiffusionXLPipeline):
    """Text to image with the architecture of Stable Diffusion XL: StableDiffusionXLPipeline, in one step."""

    __call__ = one_step_by_default(StableDiffusionXLPipeline.__call__)


class RectifiedFlowXLImg2ImgPipeline(StartFromImage, StableDiffusionXLImg2ImgPipeline):
    """Image to image with the architecture of Stable Diffusion XL, at any strength in one step."""

    __call__ = one_step_by_default(StableDiffusionXLImg2ImgPipeline.__call__)


class RectifiedFlowXLInpaintPipeline(StartFromImage, StableDiffusionXLInpaintPipeline):
    """Inpainting with the architecture of Stable Diffusion XL, at any strength in one step."""

    __call__ = one_step_by_default(StableDiffusionXLInpaintPipeline.__call__)


class RectifiedFlowXLControlNetPipeline(RectifiedFlowMixin, StableDiffusionXLControlNetPipeline):
    """Text and conditioning images to image with the architecture of Stable Diffusion XL, in one step."""

    __call__ = one_step_by_default(StableDiffusionXLControlNetPipeline.__call__)


class RectifiedFlowXLControlNetImg2ImgPipeline(StartFromImage, StableDiffusionXLControlNetImg2ImgPipeline):
    """Image to image with a ControlNet and the architecture of Stable Diffusion XL, at any strength in one step."""

    __call__ = one_step_by_default(StableDiffusionXLControlNetImg2ImgPipeline.__call__)


class RectifiedFlowXLControlNetInpaintPipeline(StartFromImage, StableDiffusionXLControlNetInpaintPipeline):
    """Inpainting with a ControlNet and the architecture of Stable Diffusion XL, at any strength in one step."""

    __call__ = one_step_by_default(StableDiffusionXLControlNetInpaintPipeline.__call__)
