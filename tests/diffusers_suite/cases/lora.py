"""LoRA through the standard methods: load, stack, weigh, fuse, delete, save."""
# pyright: reportMissingImports=false

from typing import ClassVar

from rectified_diffusers import RectifiedFlowEulerScheduler, RectifiedFlowPipeline

from ..lora import test_lora_layers_sd as sd
from .judge import lora_tests

TestLoraStock = type("TestLoraStock", (sd.StableDiffusionLoRATests,), lora_tests(sd.StableDiffusionLoRATests))


class TestLoraOurs(TestLoraStock):
    pipeline_class = RectifiedFlowPipeline
    scheduler_cls = RectifiedFlowEulerScheduler
    scheduler_kwargs: ClassVar[dict] = {}
