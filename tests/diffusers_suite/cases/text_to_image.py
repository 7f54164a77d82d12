"""Text to image: pipeline, memory and IP-Adapter mixins."""
# pyright: reportMissingImports=false

from rectified_diffusers import RectifiedFlowPipeline

from ..pipelines.stable_diffusion import test_stable_diffusion as stock
from .judge import judged

TestTextStock = judged(stock.TestStableDiffusionPipeline)
TestTextOurs = judged(stock.TestStableDiffusionPipeline, RectifiedFlowPipeline)
TestTextMemoryStock = judged(stock.TestStableDiffusionPipelineMemory)
TestTextMemoryOurs = judged(stock.TestStableDiffusionPipelineMemory, RectifiedFlowPipeline)
TestTextIPAdapterStock = judged(stock.TestStableDiffusionPipelineIPAdapter)
TestTextIPAdapterOurs = judged(stock.TestStableDiffusionPipelineIPAdapter, RectifiedFlowPipeline)
