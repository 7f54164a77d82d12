"""ControlNet for text, pictures and inpainting, one and several."""
# pyright: reportMissingImports=false

from rectified_diffusers import (
    RectifiedFlowControlNetImg2ImgPipeline,
    RectifiedFlowControlNetInpaintPipeline,
    RectifiedFlowControlNetPipeline,
)

from ..pipelines.controlnet import test_controlnet as text
from ..pipelines.controlnet import test_controlnet_img2img as img2img
from ..pipelines.controlnet import test_controlnet_inpaint as inpaint
from .judge import judged

TestControlNetStock = judged(text.ControlNetPipelineFastTests)
TestControlNetOurs = judged(text.ControlNetPipelineFastTests, RectifiedFlowControlNetPipeline)
TestControlNetSeveralStock = judged(text.StableDiffusionMultiControlNetPipelineFastTests)
TestControlNetSeveralOurs = judged(
    text.StableDiffusionMultiControlNetPipelineFastTests, RectifiedFlowControlNetPipeline
)
TestControlNetListOfOneStock = judged(text.StableDiffusionMultiControlNetOneModelPipelineFastTests)
TestControlNetListOfOneOurs = judged(
    text.StableDiffusionMultiControlNetOneModelPipelineFastTests, RectifiedFlowControlNetPipeline
)
TestControlNetImg2ImgStock = judged(img2img.ControlNetImg2ImgPipelineFastTests)
TestControlNetImg2ImgOurs = judged(img2img.ControlNetImg2ImgPipelineFastTests, RectifiedFlowControlNetImg2ImgPipeline)
TestControlNetImg2ImgSeveralStock = judged(img2img.StableDiffusionMultiControlNetPipelineFastTests)
TestControlNetImg2ImgSeveralOurs = judged(
    img2img.StableDiffusionMultiControlNetPipelineFastTests, RectifiedFlowControlNetImg2ImgPipeline
)
TestControlNetInpaintStock = judged(inpaint.ControlNetInpaintPipelineFastTests)
TestControlNetInpaintOurs = judged(inpaint.ControlNetInpaintPipelineFastTests, RectifiedFlowControlNetInpaintPipeline)
TestControlNetInpaintSeveralStock = judged(inpaint.MultiControlNetInpaintPipelineFastTests)
TestControlNetInpaintSeveralOurs = judged(
    inpaint.MultiControlNetInpaintPipelineFastTests, RectifiedFlowControlNetInpaintPipeline
)
