"""Turn a test class of diffusers into a pair: the same tests on our pipeline and on the stock one."""

import inspect
import re
from typing import Any

import diffusers.pipelines
import pytest

from rectified_diffusers import RectifiedFlowEulerScheduler

# Left out, of both: a test that names a scheduler, because it assigns a diffusion scheduler, which ours refuses (see
# RectifiedFlowMixin); one with an expected slice, because those numbers belong to another tokenizer; one that
# downloads Stable Diffusion 1.5.
_LEFT_OUT = re.compile(r"\w+Scheduler\b|KarrasDiffusionSchedulers|expected_(pipe_)?slice = [^N]|sd_repo_id")


# Of the LoRA tests: those that load a LoRA as a pickle, and one that expects a LoRA of which nothing fits to be taken.
_LORA_LEFT_OUT = re.compile(r"lora_weights\.bin|no_op_state_dict")


def lora_tests(stock: Any) -> dict[str, None]:
    """Name the LoRA tests that are left out of both, as the namespace of a test class that goes without them."""
    tests = [name for name in dir(stock) if name.startswith("test_") and inspect.isfunction(getattr(stock, name))]
    return {name: None for name in tests if _LORA_LEFT_OUT.search(inspect.getsource(getattr(stock, name)))}


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
        namespace["pipeline_class"] = pipeline_class
        # The test of encode_prompt finds a class by its name in this module, to read the names of what it returns off
        # the source: those of the method that ours inherits.
        setattr(diffusers.pipelines, pipeline_class.__name__, stock.pipeline_class)

        def get_dummy_components(self: Any, *args: Any, **kwargs: Any) -> Any:
            components = super(judged_class, self).get_dummy_components(*args, **kwargs)
            return {**components, "scheduler": RectifiedFlowEulerScheduler()}

        @pytest.fixture(autouse=True)
        def _no_pickles(self: Any, monkeypatch: pytest.MonkeyPatch) -> None:
            """Save as safetensors where a test of diffusers saves pickles on its way: ours refuses to load those."""
            save = pipeline_class.save_pretrained

            def save_safely(pipeline: Any, *args: Any, **kwargs: Any) -> None:
                save(pipeline, *args, **{**kwargs, "safe_serialization": True})

            monkeypatch.setattr(pipeline_class, "save_pretrained", save_safely)

        namespace["get_dummy_components"] = get_dummy_components
        namespace["_no_pickles"] = _no_pickles
    judged_class = type(stock.__name__, (stock,), namespace)
    return judged_class


def _is_left_out(test: Any) -> bool:
    return _LEFT_OUT.search(inspect.getsource(test)) is not None
