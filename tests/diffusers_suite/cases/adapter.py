"""T2I-Adapter, full, light and several: pipeline mixin."""
# pyright: reportMissingImports=false

from rectified_diffusers import RectifiedFlowAdapterPipeline

from ..pipelines.stable_diffusion_adapter import test_stable_diffusion_adapter as stock
from .judge import judged

TestAdapterFullStock = judged(stock.StableDiffusionFullAdapterPipelineFastTests)
TestAdapterFullOurs = judged(stock.StableDiffusionFullAdapterPipelineFastTests, RectifiedFlowAdapterPipeline)
TestAdapterLightStock = judged(stock.StableDiffusionLightAdapterPipelineFastTests)
TestAdapterLightOurs = judged(stock.StableDiffusionLightAdapterPipelineFastTests, RectifiedFlowAdapterPipeline)
TestAdapterSeveralStock = judged(stock.StableDiffusionMultiAdapterPipelineFastTests)
TestAdapterSeveralOurs = judged(stock.StableDiffusionMultiAdapterPipelineFastTests, RectifiedFlowAdapterPipeline)
