"""Pipelines for rectified flows with the architecture of Stable Diffusion 1 and 2, by task."""

from diffusers import (
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from rectified_diffusers.pipelines.calls import one_step_by_default
from rectified_diffusers.pipelines.mixin import OneTextEncoder, StartFromImage


class RectifiedFlowPipeline(OneTextEncoder, StableDiffusionPipeline):
    """Text to image with a rectified flow such as InstaFlow (arXiv:2309.06380): StableDiffusionPipeline, in one step.

    It inherits every feature of StableDiffusionPipeline. For a 2-Rectified Flow, use `guidance_scale` in [1, 2] and a
    few steps. The distilled one-step model runs without guidance, which is the default here.

    Example:
        ```python
        pipeline = RectifiedFlowPipeline.from_pretrained("XCLiu/instaflow_0_9B_from_sd_1_5")
        image = pipeline("a red apple").images[0]  # one step, no guidance
        ```
    """

    __call__ = one_step_by_default(StableDiffusionPipeline.__call__)


class RectifiedFlowImg2ImgPipeline(StartFromImage, OneTextEncoder, StableDiffusionImg2ImgPipeline):
    """Image to image with a rectified flow: StableDiffusionImg2ImgPipeline, at any strength in one step.

    Example:
        ```python
        img2img = RectifiedFlowImg2ImgPipeline.from_pipe(pipeline)
        edited = img2img("a red apple", image=image, strength=0.7).images[0]
        ```
    """

    __call__ = one_step_by_default(StableDiffusionImg2ImgPipeline.__call__)


class RectifiedFlowInpaintPipeline(StartFromImage, OneTextEncoder, StableDiffusionInpaintPipeline):
    """Inpainting with a rectified flow: StableDiffusionInpaintPipeline, at any strength in one step.

    Example:
        ```python
        inpaint = RectifiedFlowInpaintPipeline.from_pipe(pipeline)
        edited = inpaint("a red apple", image=image, mask_image=mask).images[0]  # white areas are generated
        ```
    """

    __call__ = one_step_by_default(StableDiffusionInpaintPipeline.__call__)


class RectifiedFlowControlNetPipeline(OneTextEncoder, StableDiffusionControlNetPipeline):
    """Text and conditioning images to image with a rectified flow: StableDiffusionControlNetPipeline, in one step.

    `guess_mode` works as in diffusers; the authors' pipeline accepts it but does not apply it. A ControlNet acts only
    in steps that lie completely between `control_guidance_start` and `control_guidance_end`: in a single step, only
    from 0 to 1.

    Example:
        ```python
        controlnet = ControlNetModel.from_pretrained("lllyasviel/control_v11p_sd15_canny")
        controlled = RectifiedFlowControlNetPipeline.from_pipe(pipeline, controlnet=controlnet)
        generated = controlled("a glass bird", image=edges, controlnet_conditioning_scale=0.8).images[0]
        ```
    """

    __call__ = one_step_by_default(StableDiffusionControlNetPipeline.__call__)


class RectifiedFlowControlNetImg2ImgPipeline(StartFromImage, OneTextEncoder, StableDiffusionControlNetImg2ImgPipeline):
    """Image to image with a ControlNet: StableDiffusionControlNetImg2ImgPipeline, at any strength in one step.

    Example:
        ```python
        controlnet = ControlNetModel.from_pretrained("lllyasviel/control_v11p_sd15_canny")
        controlled = RectifiedFlowControlNetImg2ImgPipeline.from_pipe(pipeline, controlnet=controlnet)
        edited = controlled("a glass bird", image=image, control_image=edges, strength=0.7).images[0]
        ```
    """

    __call__ = one_step_by_default(StableDiffusionControlNetImg2ImgPipeline.__call__)


class RectifiedFlowControlNetInpaintPipeline(StartFromImage, OneTextEncoder, StableDiffusionControlNetInpaintPipeline):
    """Inpainting with a ControlNet: StableDiffusionControlNetInpaintPipeline, at any strength in one step.

    Example:
        ```python
        controlnet = ControlNetModel.from_pretrained("lllyasviel/control_v11p_sd15_canny")
        controlled = RectifiedFlowControlNetInpaintPipeline.from_pipe(pipeline, controlnet=controlnet)
        edited = controlled("a glass bird", image=image, mask_image=mask, control_image=edges).images[0]
        ```
    """

    __call__ = one_step_by_default(StableDiffusionControlNetInpaintPipeline.__call__)


class RectifiedFlowAdapterPipeline(OneTextEncoder, StableDiffusionAdapterPipeline):
    """Text to image with T2I-Adapters: StableDiffusionAdapterPipeline, in one step.

    Example:
        ```python
        adapter = T2IAdapter.from_pretrained("TencentARC/t2iadapter_canny_sd15v2")
        pipeline = RectifiedFlowAdapterPipeline.from_pretrained("2-rectified-flow", adapter=adapter)
        generated = pipeline("a glass bird", image=edges.convert("L")).images[0]
        ```
    """

    __call__ = one_step_by_default(StableDiffusionAdapterPipeline.__call__)
