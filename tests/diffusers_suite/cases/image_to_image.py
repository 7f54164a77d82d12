"""Image to image and inpainting: pipeline and IP-Adapter mixins."""
# pyright: reportMissingImports=false

from rectified_diffusers import RectifiedFlowImg2ImgPipeline, RectifiedFlowInpaintPipeline

from ..pipelines.stable_diffusion import test_stable_diffusion_img2img as img2img
from ..pipelines.stable_diffusion import test_stable_diffusion_inpaint as inpaint
from .judge import judged

TestImg2ImgStock = judged(img2img.TestStableDiffusionImg2ImgPipeline)
TestImg2ImgOurs = judged(img2img.TestStableDiffusionImg2ImgPipeline, RectifiedFlowImg2ImgPipeline)
TestImg2ImgIPAdapterStock = judged(img2img.TestStableDiffusionImg2ImgPipelineIPAdapter)
TestImg2ImgIPAdapterOurs = judged(img2img.TestStableDiffusionImg2ImgPipelineIPAdapter, RectifiedFlowImg2ImgPipeline)
TestInpaintStock = judged(inpaint.TestStableDiffusionInpaintPipeline)
TestInpaintOurs = judged(inpaint.TestStableDiffusionInpaintPipeline, RectifiedFlowInpaintPipeline)
TestInpaintFourChannelsStock = judged(inpaint.TestStableDiffusionSimpleInpaintPipeline)
TestInpaintFourChannelsOurs = judged(inpaint.TestStableDiffusionSimpleInpaintPipeline, RectifiedFlowInpaintPipeline)

# It wants an error at strength 0.01, where Stable Diffusion is left with no step: a flow spends all of them there.
for ours in (TestInpaintOurs, TestInpaintFourChannelsOurs):
    ours.test_stable_diffusion_inpaint_strength_zero_test = None
del ours
