"""LoRA through the standard methods: load, stack, weigh, fuse, delete, save."""
# pyright: reportMissingImports=false

from rectified_diffusers import RectifiedFlowPipeline

from ..lora import test_lora_layers_sd as sd
from .judge import judged_lora

TestLoraStock = judged_lora(sd.StableDiffusionLoRATests)
TestLoraOurs = judged_lora(sd.StableDiffusionLoRATests, RectifiedFlowPipeline)
