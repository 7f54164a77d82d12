"""ControlNet of Stable Diffusion XL's shape, for text, pictures and inpainting, one and several."""
# pyright: reportMissingImports=false

from rectified_diffusers import (
    RectifiedFlowXLControlNetImg2ImgPipeline,
    RectifiedFlowXLControlNetInpaintPipeline,
    RectifiedFlowXLControlNetPipeline,
)

from ..pipelines.controlnet import test_controlnet_inpaint_sdxl as inpaint
from ..pipelines.controlnet import test_controlnet_sdxl as text
from ..pipelines.controlnet import test_controlnet_sdxl_img2img as img2img
from .judge import judged

TestXLControlNetStock = judged(text.StableDiffusionXLControlNetPipelineFastTests)
TestXLControlNetOurs = judged(text.StableDiffusionXLControlNetPipelineFastTests, RectifiedFlowXLControlNetPipeline)
TestXLControlNetSeveralStock = judged(text.StableDiffusionXLMultiControlNetPipelineFastTests)
TestXLControlNetSeveralOurs = judged(
    text.StableDiffusionXLMultiControlNetPipelineFastTests, RectifiedFlowXLControlNetPipeline
)
TestXLControlNetListOfOneStock = judged(text.StableDiffusionXLMultiControlNetOneModelPipelineFastTests)
TestXLControlNetListOfOneOurs = judged(
    text.StableDiffusionXLMultiControlNetOneModelPipelineFastTests, RectifiedFlowXLControlNetPipeline
)
TestXLControlNetSmallStock = judged(text.StableDiffusionSSD1BControlNetPipelineFastTests)
TestXLControlNetSmallOurs = judged(
    text.StableDiffusionSSD1BControlNetPipelineFastTests, RectifiedFlowXLControlNetPipeline
)
TestXLControlNetImg2ImgStock = judged(img2img.ControlNetPipelineSDXLImg2ImgFastTests)
TestXLControlNetImg2ImgOurs = judged(
    img2img.ControlNetPipelineSDXLImg2ImgFastTests, RectifiedFlowXLControlNetImg2ImgPipeline
)
TestXLControlNetInpaintStock = judged(inpaint.ControlNetPipelineSDXLFastTests)
TestXLControlNetInpaintOurs = judged(inpaint.ControlNetPipelineSDXLFastTests, RectifiedFlowXLControlNetInpaintPipeline)
