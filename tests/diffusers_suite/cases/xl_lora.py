"""LoRA of Stable Diffusion XL's shape, with both text encoders, through the standard methods."""
# pyright: reportMissingImports=false

from rectified_diffusers import RectifiedFlowXLPipeline

from ..lora import test_lora_layers_sdxl as sdxl
from .judge import judged_lora

TestXLLoraStock = judged_lora(sdxl.StableDiffusionXLLoRATests)
TestXLLoraOurs = judged_lora(sdxl.StableDiffusionXLLoRATests, RectifiedFlowXLPipeline)
