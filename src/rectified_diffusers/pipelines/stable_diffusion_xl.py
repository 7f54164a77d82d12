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
    """Text to image with the architecture of Stable Diffusion XL: StableDiffusionXLPipeline, in one step.

    Example:
        ```python
        pipeline = RectifiedFlowXLPipeline.from_pretrained("XL-FLOW")
        image = pipeline("a red apple").images[0]
        ```
    """

    __call__ = one_step_by_default(StableDiffusionXLPipeline.__call__)


class RectifiedFlowXLImg2ImgPipeline(StartFromImage, StableDiffusionXLImg2ImgPipeline):
    """Image to image with the architecture of Stable Diffusion XL, at any strength in one step.

    Example:
        ```python
        pipeline = RectifiedFlowXLPipeline.from_pretrained("XL-FLOW")
        img2img = RectifiedFlowXLImg2ImgPipeline.from_pipe(pipeline)
        edited = img2img("a red apple", image=image, strength=0.7).images[0]
        ```
    """

    __call__ = one_step_by_default(StableDiffusionXLImg2ImgPipeline.__call__)


class RectifiedFlowXLInpaintPipeline(StartFromImage, StableDiffusionXLInpaintPipeline):
    """Inpainting with the architecture of Stable Diffusion XL, at any strength in one step.

    Example:
        ```python
        pipeline = RectifiedFlowXLPipeline.from_pretrained("XL-FLOW")
        inpaint = RectifiedFlowXLInpaintPipeline.from_pipe(pipeline)
        edited = inpaint("a red apple", image=image, mask_image=mask).images[0]
        ```
    """

    __call__ = one_step_by_default(StableDiffusionXLInpaintPipeline.__call__)


class RectifiedFlowXLControlNetPipeline(RectifiedFlowMixin, StableDiffusionXLControlNetPipeline):
    """Text and conditioning images to image with the architecture of Stable Diffusion XL, in one step.

    Example:
        ```python
        pipeline = RectifiedFlowXLPipeline.from_pretrained("XL-FLOW")
        controlnet = ControlNetModel.from_pretrained("diffusers/controlnet-canny-sdxl-1.0")
        controlled = RectifiedFlowXLControlNetPipeline.from_pipe(pipeline, controlnet=controlnet)
        generated = controlled("a glass bird", image=edges).images[0]
        ```
    """

    __call__ = one_step_by_default(StableDiffusionXLControlNetPipeline.__call__)


class RectifiedFlowXLControlNetImg2ImgPipeline(StartFromImage, StableDiffusionXLControlNetImg2ImgPipeline):
    """Image to image with a ControlNet and the architecture of Stable Diffusion XL, at any strength in one step.

    Example:
        ```python
        pipeline = RectifiedFlowXLPipeline.from_pretrained("XL-FLOW")
        controlnet = ControlNetModel.from_pretrained("diffusers/controlnet-canny-sdxl-1.0")
        controlled = RectifiedFlowXLControlNetImg2ImgPipeline.from_pipe(pipeline, controlnet=controlnet)
        edited = controlled("a glass bird", image=image, control_image=edges, strength=0.7).images[0]
        ```
    """

    __call__ = one_step_by_default(StableDiffusionXLControlNetImg2ImgPipeline.__call__)


class RectifiedFlowXLControlNetInpaintPipeline(StartFromImage, StableDiffusionXLControlNetInpaintPipeline):
    """Inpainting with a ControlNet and the architecture of Stable Diffusion XL, at any strength in one step.

    Example:
        ```python
        pipeline = RectifiedFlowXLPipeline.from_pretrained("XL-FLOW")
        controlnet = ControlNetModel.from_pretrained("diffusers/controlnet-canny-sdxl-1.0")
        controlled = RectifiedFlowXLControlNetInpaintPipeline.from_pipe(pipeline, controlnet=controlnet)
        edited = controlled("a glass bird", image=image, mask_image=mask, control_image=edges).images[0]
        ```
    """

    __call__ = one_step_by_default(StableDiffusionXLControlNetInpaintPipeline.__call__)
