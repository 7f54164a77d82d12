"""Registration: both import orders, on and off, once; each in a process of its own where imports matter."""

import copy
import json
import os
import pickle
import subprocess
import sys
from types import ModuleType

import diffusers
import pytest
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils

import rectified_diffusers
from rectified_diffusers.pipelines import registration

CHECK_REGISTERED = """
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
import diffusers, rectified_diffusers
assert diffusers.RectifiedFlowPipeline is rectified_diffusers.RectifiedFlowPipeline
assert diffusers.RectifiedFlowEulerScheduler is rectified_diffusers.RectifiedFlowEulerScheduler
assert set(LOADABLE_CLASSES["rectified_diffusers"]) == {"SchedulerMixin", "ModelMixin"}
assert AUTO_TEXT2IMAGE_PIPELINES_MAPPING["rectified-flow"] is rectified_diffusers.RectifiedFlowPipeline
"""


# The two orders; the harder case of the first: diffusers is first imported by a module of ours that is not complete
# then. And registration switched off, then requested.
PROGRAMS = {
    "before diffusers": "from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler"
    + CHECK_REGISTERED,
    "after diffusers": "import diffusers; diffusers.AutoPipelineForText2Image; import rectified_diffusers"
    + CHECK_REGISTERED,
    "switched off": """
import os, sys
os.environ["RECTIFIED_DIFFUSERS_REGISTER"] = "0"
import rectified_diffusers
finders = list(sys.meta_path)
import diffusers
assert not hasattr(diffusers, "RectifiedFlowPipeline")
assert not any(type(finder).__module__.startswith("rectified_diffusers") for finder in finders)
rectified_diffusers.register()
assert "RectifiedFlowPipeline" not in vars(diffusers)  # not imported before somebody asks
assert diffusers.RectifiedFlowEulerScheduler.__module__ == "rectified_diffusers.pipelines.scheduler"
""",
}
# Each program in a fork of one process that has imported what diffusers takes seconds to import.
FORKS = """
import json, multiprocessing, sys
import torch, transformers.models.clip.modeling_clip, transformers.generation, peft
assert not {"diffusers", "rectified_diffusers"} & sys.modules.keys()
codes = {}
for name, program in json.loads(sys.argv[1]).items():
    process = multiprocessing.get_context("fork").Process(target=exec, args=(program, {}))
    process.start()
    process.join()
    codes[name] = process.exitcode
print(json.dumps(codes))
"""


def run(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the programs are forks")
def test_registered_in_either_order_and_switched_off():
    done = run(FORKS, json.dumps(PROGRAMS))
    assert json.loads(done.stdout) == dict.fromkeys(PROGRAMS, 0), done.stderr


def test_unknown_setting(monkeypatch):
    monkeypatch.setenv("RECTIFIED_DIFFUSERS_REGISTER", "no")
    with pytest.raises(ValueError, match=r"must be 0 \(off\) or 1 \(on, the default\), got 'no'"):
        registration.register_unless_disabled()


def test_registering_again_changes_nothing():
    def tables():
        mappings = [dict(mapping) for mapping in auto_pipeline.SUPPORTED_TASKS_MAPPINGS]
        return type(diffusers), list(sys.meta_path), dict(pipeline_loading_utils.LOADABLE_CLASSES), mappings

    before = tables()
    rectified_diffusers.register()
    assert tables() == before


@pytest.mark.parametrize("again", [lambda module: pickle.loads(pickle.dumps(module)), copy.copy, copy.deepcopy])  # noqa: S301
def test_the_module_can_be_pickled_and_copied(again):
    assert again(diffusers) is diffusers


def test_it_only_adds():
    class Diffusers(ModuleType):
        RectifiedFlowPipeline = "theirs"

        def __getattr__(self, name):
            if name == "RectifiedFlowEulerScheduler":
                return "theirs too"
            raise AttributeError(name)

    module = Diffusers("diffusers")
    registration._offer_classes(module)
    assert isinstance(module, Diffusers)
    assert module.RectifiedFlowPipeline == "theirs"
    assert module.RectifiedFlowEulerScheduler == "theirs too"
    with pytest.raises(AttributeError, match="NoSuchClass"):
        module.NoSuchClass  # noqa: B018


def test_a_missing_diffusers_is_still_reported_as_missing():
    # Python's own answer, not one of ours.
    hide = "import lazy_loader, sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    check = "try: import diffusers\nexcept ModuleNotFoundError as error: assert error.name == 'diffusers'"
    run(f"{hide}import rectified_diffusers\n{check}\nelse: raise AssertionError")


def test_every_offered_class_is_public():
    assert set(rectified_diffusers.__all__) >= registration._CLASSES
