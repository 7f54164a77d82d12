"""Pairs of test classes: diffusers' tests on our pipeline (`...Ours`) and the same on the stock one (`...Stock`).

This folder is copied into a checkout's `tests`, where the names of modules below are found.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import diffusers.pipelines
import pytest

import rectified_diffusers
from rectified_diffusers import RectifiedFlowEulerScheduler

# Left out of both: a test that names a scheduler, because it assigns a diffusion scheduler, which our pipelines refuse
# (see RectifiedFlowMixin); one with an expected slice, whose numbers belong to another tokenizer; one that downloads
# Stable Diffusion 1.5.
_LEFT_OUT = re.compile(r"\w+Scheduler\b|KarrasDiffusionSchedulers|expected_(pipe_)?slice = [^N]|sd_repo_id")
# Of the LoRA tests: those that load a LoRA as a pickle, one that expects a LoRA to load of which nothing fits, and one
# that saves a text encoder with a LoRA as a path to its base, which our loader does not follow.
_LORA_LEFT_OUT = re.compile(r"lora_weights\.bin|no_op_state_dict|pipe_from_pretrained")
# Of ours: it expects an error at strength 0.01, where Stable Diffusion has no step left; a flow uses all of them.
_LEFT_OUT_OF_OURS = ("test_stable_diffusion_inpaint_strength_zero_test",)

# Case -> module of diffusers' tests and our class -> name of the pair -> class of diffusers' tests.
CASES: Mapping[str, Mapping[tuple[str, str], Mapping[str, str]]] = {
    "text_to_image": {
        ("pipelines.stable_diffusion.test_stable_diffusion", "RectifiedFlowPipeline"): {
            "Text": "TestStableDiffusionPipeline",
            "TextMemory": "TestStableDiffusionPipelineMemory",
            "TextIPAdapter": "TestStableDiffusionPipelineIPAdapter",
        },
    },
    "image_to_image": {
        ("pipelines.stable_diffusion.test_stable_diffusion_img2img", "RectifiedFlowImg2ImgPipeline"): {
            "Img2Img": "TestStableDiffusionImg2ImgPipeline",
            "Img2ImgIPAdapter": "TestStableDiffusionImg2ImgPipelineIPAdapter",
        },
        ("pipelines.stable_diffusion.test_stable_diffusion_inpaint", "RectifiedFlowInpaintPipeline"): {
            "Inpaint": "TestStableDiffusionInpaintPipeline",
            "InpaintFourChannels": "TestStableDiffusionSimpleInpaintPipeline",
        },
    },
    "adapter": {
        ("pipelines.stable_diffusion_adapter.test_stable_diffusion_adapter", "RectifiedFlowAdapterPipeline"): {
            "AdapterFull": "StableDiffusionFullAdapterPipelineFastTests",
            "AdapterLight": "StableDiffusionLightAdapterPipelineFastTests",
            "AdapterSeveral": "StableDiffusionMultiAdapterPipelineFastTests",
        },
    },
    "controlnet": {
        ("pipelines.controlnet.test_controlnet", "RectifiedFlowControlNetPipeline"): {
            "ControlNet": "ControlNetPipelineFastTests",
            "ControlNetSeveral": "StableDiffusionMultiControlNetPipelineFastTests",
            "ControlNetListOfOne": "StableDiffusionMultiControlNetOneModelPipelineFastTests",
        },
        ("pipelines.controlnet.test_controlnet_img2img", "RectifiedFlowControlNetImg2ImgPipeline"): {
            "ControlNetImg2Img": "ControlNetImg2ImgPipelineFastTests",
            "ControlNetImg2ImgSeveral": "StableDiffusionMultiControlNetPipelineFastTests",
        },
        ("pipelines.controlnet.test_controlnet_inpaint", "RectifiedFlowControlNetInpaintPipeline"): {
            "ControlNetInpaint": "ControlNetInpaintPipelineFastTests",
            "ControlNetInpaintSeveral": "MultiControlNetInpaintPipelineFastTests",
        },
    },
    "xl": {
        ("pipelines.stable_diffusion_xl.test_stable_diffusion_xl", "RectifiedFlowXLPipeline"): {
            "XLText": "StableDiffusionXLPipelineFastTests",
        },
        ("pipelines.stable_diffusion_xl.test_stable_diffusion_xl_img2img", "RectifiedFlowXLImg2ImgPipeline"): {
            "XLImg2Img": "StableDiffusionXLImg2ImgPipelineFastTests",
            "XLRefiner": "StableDiffusionXLImg2ImgRefinerOnlyPipelineFastTests",
        },
        ("pipelines.stable_diffusion_xl.test_stable_diffusion_xl_inpaint", "RectifiedFlowXLInpaintPipeline"): {
            "XLInpaint": "StableDiffusionXLInpaintPipelineFastTests",
        },
    },
    "xl_controlnet": {
        ("pipelines.controlnet.test_controlnet_sdxl", "RectifiedFlowXLControlNetPipeline"): {
            "XLControlNet": "StableDiffusionXLControlNetPipelineFastTests",
            "XLControlNetSeveral": "StableDiffusionXLMultiControlNetPipelineFastTests",
            "XLControlNetListOfOne": "StableDiffusionXLMultiControlNetOneModelPipelineFastTests",
            "XLControlNetSmall": "StableDiffusionSSD1BControlNetPipelineFastTests",
        },
        ("pipelines.controlnet.test_controlnet_sdxl_img2img", "RectifiedFlowXLControlNetImg2ImgPipeline"): {
            "XLControlNetImg2Img": "ControlNetPipelineSDXLImg2ImgFastTests",
        },
        ("pipelines.controlnet.test_controlnet_inpaint_sdxl", "RectifiedFlowXLControlNetInpaintPipeline"): {
            "XLControlNetInpaint": "ControlNetPipelineSDXLFastTests",
        },
    },
    "lora": {
        ("lora.test_lora_layers_sd", "RectifiedFlowPipeline"): {"Lora": "StableDiffusionLoRATests"},
    },
    "xl_lora": {
        ("lora.test_lora_layers_sdxl", "RectifiedFlowXLPipeline"): {"XLLora": "StableDiffusionXLLoRATests"},
    },
}


def classes_of(case: str) -> dict[str, type]:
    """Return the test classes of a case by name: a pair for each of diffusers' classes."""
    classes: dict[str, type] = {}
    for (module, pipeline), pairs in CASES[case].items():
        theirs = importlib.import_module(f"..{module}", __package__)
        make = _lora_tests if module.startswith("lora.") else _pipeline_tests
        for name, stock in pairs.items():
            classes[f"Test{name}Stock"] = make(getattr(theirs, stock), None)
            classes[f"Test{name}Ours"] = make(getattr(theirs, stock), getattr(rectified_diffusers, pipeline))
    return classes


def _lora_tests(stock: Any, pipeline_class: type | None) -> type:
    tests = [name for name in dir(stock) if name.startswith("test_") and inspect.isfunction(getattr(stock, name))]
    namespace: dict[str, Any] = {
        name: None for name in tests if _LORA_LEFT_OUT.search(inspect.getsource(getattr(stock, name)))
    }
    if pipeline_class is not None:
        namespace |= {"pipeline_class": pipeline_class, "scheduler_cls": RectifiedFlowEulerScheduler}
        namespace |= {"scheduler_kwargs": {}}
    return type(stock.__name__, (stock,), {"__module__": __name__, **namespace})


def _pipeline_tests(stock: Any, pipeline_class: type | None) -> type:
    """Where a test that is left out overrides one of a mixin, the mixin's takes its place."""
    namespace: dict[str, Any] = {"__module__": __name__}
    for name in dir(stock):
        if name.startswith("test_") and callable(getattr(stock, name)):
            found = (vars(parent)[name] for parent in stock.__mro__ if name in vars(parent))
            namespace[name] = next((test for test in found if not _LEFT_OUT.search(inspect.getsource(test))), None)
    if pipeline_class is not None:
        namespace |= _with_ours(stock, pipeline_class) | dict.fromkeys(_LEFT_OUT_OF_OURS)
    return type(stock.__name__, (stock,), namespace)


def _with_ours(stock: Any, pipeline_class: Any) -> dict[str, Any]:
    """Return the attributes of a test class that run `stock`'s tests on our pipeline with our scheduler."""
    # The test of encode_prompt finds a class by its name in this module and reads the names of what it returns from
    # the source: those of the method that ours inherits.
    setattr(diffusers.pipelines, pipeline_class.__name__, stock.pipeline_class)

    @pytest.fixture(autouse=True)
    def _ours(self: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        # Many tests of Stable Diffusion XL name the stock class where others say `self.pipeline_class`.
        monkeypatch.setattr(sys.modules[stock.__module__], stock.pipeline_class.__name__, pipeline_class)
        save = pipeline_class.save_pretrained

        def save_safely(pipeline: Any, *args: Any, **kwargs: Any) -> None:
            """Save as safetensors where a test of diffusers saves pickles on its way: ours refuses to load those."""
            save(pipeline, *args, **{**kwargs, "safe_serialization": True})

        monkeypatch.setattr(pipeline_class, "save_pretrained", save_safely)

    makers = [name for name in dir(stock) if name.startswith("get_dummy_components")]
    return {"pipeline_class": pipeline_class, "_ours": _ours} | {
        name: _with_our_scheduler(stock, name) for name in makers
    }


def _with_our_scheduler(stock: Any, maker: str) -> Any:
    def make(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**getattr(stock, maker)(self, *args, **kwargs), "scheduler": RectifiedFlowEulerScheduler()}

    return make
