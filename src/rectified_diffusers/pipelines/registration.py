"""Register our classes with diffusers' loaders, so that `DiffusionPipeline.from_pretrained` finds them.

The loaders look up a pipeline as an attribute of the module `diffusers`, a component's library in `LOADABLE_CLASSES`,
and a pipeline for a task in the mappings of `AutoPipeline*`. None of these tables is public; only this module touches
them. It only adds entries: a name that diffusers itself has keeps its meaning.

`import rectified_diffusers` calls `register()` unless the environment sets RECTIFIED_DIFFUSERS_REGISTER=0. Importing
diffusers takes seconds, so nothing here imports it. A table that does not exist yet is extended right after its module
has been imported.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.split(".")[0]  # its attributes are the public classes: saved pipelines name it
ENVIRONMENT_VARIABLE = "RECTIFIED_DIFFUSERS_REGISTER"

# Pipeline classes by the AutoPipeline mapping that serves their task; the key links the pipelines of one family.
_FAMILIES = {
    "rectified-flow": "RectifiedFlow",
    "rectified-flow-controlnet": "RectifiedFlowControlNet",
    "rectified-flow-xl": "RectifiedFlowXL",
    "rectified-flow-xl-controlnet": "RectifiedFlowXLControlNet",
}
_AUTO_PIPELINES = {
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": {key: f"{family}Pipeline" for key, family in _FAMILIES.items()},
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": {key: f"{family}Img2ImgPipeline" for key, family in _FAMILIES.items()},
    "AUTO_INPAINT_PIPELINES_MAPPING": {key: f"{family}InpaintPipeline" for key, family in _FAMILIES.items()},
}
_CLASSES = {
    "RectifiedFlowEulerScheduler",
    "RectifiedFlowAdapterPipeline",  # AutoPipeline has no task for it
    *(name for mapping in _AUTO_PIPELINES.values() for name in mapping.values()),
}


def register() -> None:
    """Add our classes to the tables of diffusers, now or as soon as they exist. Repeated calls change nothing."""
    for name, extend in _EXTENSIONS.items():
        if name in sys.modules:
            extend(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def register_unless_disabled() -> None:
    """Call `register` unless the environment variable is 0."""
    setting = os.environ.get(ENVIRONMENT_VARIABLE, "1")
    if setting not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be 0 (off) or 1 (on, the default), got {setting!r}.")
    if setting == "1":
        register()


class _AfterImport(MetaPathFinder):
    """Import hook: find the modules of `_EXTENSIONS` as usual, and extend each right after its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _EXTENSIONS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            _call_after(spec.loader, _EXTENSIONS[fullname])
        return spec


def _call_after(loader: Any, extend: Callable[[ModuleType], None]) -> None:
    """Make this loader, which serves one import of one module, call `extend` on the module after executing it."""
    exec_module = loader.exec_module

    def exec_and_extend(module: ModuleType) -> None:
        exec_module(module)
        extend(sys.modules[module.__name__])  # diffusers replaces the module object during execution

    loader.exec_module = exec_and_extend


def _offer_classes(diffusers: ModuleType) -> None:
    """Make our classes attributes of the module `diffusers`, imported on access, after all names of its own."""
    stock = type(diffusers)
    if getattr(stock, "offers_rectified_flow", False):
        return

    class WithRectifiedFlow(stock):
        offers_rectified_flow = True

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)  # pyright: ignore[reportAttributeAccessIssue]
            except AttributeError:
                if name not in _CLASSES:
                    raise
                return getattr(importlib.import_module(PACKAGE), name)

        def __reduce__(self) -> Any:
            return importlib.import_module, (self.__name__,)  # pickle cannot find this class by its name

    diffusers.__class__ = WithRectifiedFlow


def _allow_components(pipeline_loading_utils: ModuleType) -> None:
    """Allow a saved pipeline to name this package as the library of a component."""
    methods = ["save_pretrained", "from_pretrained"]
    classes = {"SchedulerMixin": methods, "ModelMixin": methods}
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(PACKAGE, classes)


def _extend_auto_pipelines(auto_pipeline: ModuleType) -> None:
    """Let `AutoPipelineFor...` switch from one of our pipelines to ours for another task."""
    package = importlib.import_module(PACKAGE)
    for mapping, pipelines in _AUTO_PIPELINES.items():
        for key, name in pipelines.items():
            getattr(auto_pipeline, mapping).setdefault(key, getattr(package, name))


_EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "diffusers": _offer_classes,
    "diffusers.pipelines.pipeline_loading_utils": _allow_components,
    "diffusers.pipelines.auto_pipeline": _extend_auto_pipelines,
}
