"""Stable Diffusion XL's shape: text, image to image, its refiner and inpainting; pipeline and IP-Adapter mixins."""
# pyright: reportMissingImports=false

from rectified_diffusers import RectifiedFlowXLImg2ImgPipeline, RectifiedFlowXLInpaintPipeline, RectifiedFlowXLPipeline

from ..pipelines.stable_diffusion_xl import test_stable_diffusion_xl as text
from ..pipelines.stable_diffusion_xl import test_stable_diffusion_xl_img2img as img2img
from ..pipelines.stable_diffusion_xl import test_stable_diffusion_xl_inpaint as inpaint
from .judge import judged

TestXLTextStock = judged(text.StableDiffusionXLPipelineFastTests)
TestXLTextOurs = judged(text.StableDiffusionXLPipelineFastTests, RectifiedFlowXLPipeline)
TestXLImg2ImgStock = judged(img2img.StableDiffusionXLImg2ImgPipelineFastTests)
TestXLImg2ImgOurs = judged(img2img.StableDiffusionXLImg2ImgPipelineFastTests, RectifiedFlowXLImg2ImgPipeline)
TestXLRefinerStock = judged(img2img.StableDiffusionXLImg2ImgRefinerOnlyPipelineFastTests)
TestXLRefinerOurs = judged(
    img2img.StableDiffusionXLImg2ImgRefinerOnlyPipelineFastTests, RectifiedFlowXLImg2ImgPipeline
)
TestXLInpaintStock = judged(inpaint.StableDiffusionXLInpaintPipelineFastTests)
TestXLInpaintOurs = judged(inpaint.StableDiffusionXLInpaintPipelineFastTests, RectifiedFlowXLInpaintPipeline)
