"""Turn a test class of diffusers into a pair: the same tests on our pipeline and on the stock one."""

import inspect
import re
import sys
from typing import Any

import diffusers.pipelines
import pytest

from rectified_diffusers import RectifiedFlowEulerScheduler

# Left out, of both: a test that names a scheduler, because it assigns a diffusion scheduler, which ours refuses (see
# RectifiedFlowMixin); one with an expected slice, because those numbers belong to another tokenizer; one that
# downloads Stable Diffusion 1.5.
_LEFT_OUT = re.compile(r"\w+Scheduler\b|KarrasDiffusionSchedulers|expected_(pipe_)?slice = [^N]|sd_repo_id")


# Of the LoRA tests: those that load a LoRA as a pickle, one that expects a LoRA of which nothing fits to be taken, and
# one that saves a text encoder with a LoRA as a path to its base, which our loader does not follow.
_LORA_LEFT_OUT = re.compile(r"lora_weights\.bin|no_op_state_dict|pipe_from_pretrained")


def judged_lora(stock: Any, pipeline_class: type | None = None) -> Any:
    """Make a test class of `stock`'s LoRA tests, less those left out; on a pipeline of ours where one is given."""
    tests = [name for name in dir(stock) if name.startswith("test_") and inspect.isfunction(getattr(stock, name))]
    namespace: dict[str, Any] = {
        name: None for name in tests if _LORA_LEFT_OUT.search(inspect.getsource(getattr(stock, name)))
    }
    if pipeline_class is not None:
        namespace |= {
            "pipeline_class": pipeline_class,
            "scheduler_cls": RectifiedFlowEulerScheduler,
            "scheduler_kwargs": {},
        }
    return type(stock.__name__, (stock,), {"__module__": __name__, **namespace})


def judged(stock: Any, pipeline_class: type | None = None) -> Any:
    """Make a test class of `stock`'s tests, less those left out, on a pipeline of ours.

    Without `pipeline_class` it is on the stock pipeline with the stock scheduler: what ours is measured by. Where a
    test that is left out overrides one of a mixin, the mixin's own takes its place.
    """
    namespace: dict[str, Any] = {"__module__": __name__}
    for name in dir(stock):
        if name.startswith("test_") and callable(getattr(stock, name)):
            found = (vars(parent)[name] for parent in stock.__mro__ if name in vars(parent))
            namespace[name] = next((test for test in found if not _is_left_out(test)), None)
    if pipeline_class is not None:
        namespace |= _with_ours(stock, pipeline_class)
    return type(stock.__name__, (stock,), namespace)


def _with_ours(stock: Any, pipeline_class: Any) -> dict[str, Any]:
    """Return what a test class of `stock`'s tests differs in when they run on our pipeline with our scheduler."""
    # The test of encode_prompt finds a class by its name in this module, to read the names of what it returns off
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


def _is_left_out(test: Any) -> bool:
    return _LEFT_OUT.search(inspect.getsource(test)) is not None
