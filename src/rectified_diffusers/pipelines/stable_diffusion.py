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
    """

    __call__ = one_step_by_default(StableDiffusionPipeline.__call__)


class RectifiedFlowImg2ImgPipeline(StartFromImage, OneTextEncoder, StableDiffusionImg2ImgPipeline):
    """Image to image with a rectified flow: StableDiffusionImg2ImgPipeline, at any strength in one step."""

    __call__ = one_step_by_default(StableDiffusionImg2ImgPipeline.__call__)


class RectifiedFlowInpaintPipeline(StartFromImage, OneTextEncoder, StableDiffusionInpaintPipeline):
    """Inpainting with a rectified flow: StableDiffusionInpaintPipeline, at any strength in one step."""

    __call__ = one_step_by_default(StableDiffusionInpaintPipeline.__call__)


class RectifiedFlowControlNetPipeline(OneTextEncoder, StableDiffusionControlNetPipeline):
    """Text and conditioning images to image with a rectified flow: StableDiffusionControlNetPipeline, in one step.

    `guess_mode` works as in diffusers; the authors' pipeline accepts it but does not apply it. A ControlNet acts only
    in steps that lie completely between `control_guidance_start` and `control_guidance_end`: in a single step, only
    from 0 to 1.
    """

    __call__ = one_step_by_default(StableDiffusionControlNetPipeline.__call__)


class RectifiedFlowControlNetImg2ImgPipeline(StartFromImage, OneTextEncoder, StableDiffusionControlNetImg2ImgPipeline):
    """Image to image with a ControlNet: StableDiffusionControlNetImg2ImgPipeline, at any strength in one step."""

    __call__ = one_step_by_default(StableDiffusionControlNetImg2ImgPipeline.__call__)


class RectifiedFlowControlNetInpaintPipeline(StartFromImage, OneTextEncoder, StableDiffusionControlNetInpaintPipeline):
    """Inpainting with a ControlNet: StableDiffusionControlNetInpaintPipeline, at any strength in one step."""

    __call__ = one_step_by_default(StableDiffusionControlNetInpaintPipeline.__call__)


class RectifiedFlowAdapterPipeline(OneTextEncoder, StableDiffusionAdapterPipeline):
    """Text to image with T2I-Adapters: StableDiffusionAdapterPipeline, in one step."""

    __call__ = one_step_by_default(StableDiffusionAdapterPipeline.__call__)
