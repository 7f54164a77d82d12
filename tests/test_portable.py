"""The portable save: equal pictures where our package is not installed, and errors for what would not be equal."""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import dynamic_modules_utils
from peft import LoraConfig

import rectified_diffusers
from rectified_diffusers import RectifiedFlowEulerScheduler, RectifiedFlowImg2ImgPipeline, RectifiedFlowPipeline
from rectified_diffusers.export import portable
from rectified_diffusers.export.portable import SCHEDULER_MODULE, save_portable
from tests.hub.client import HubError, can_import, load, sample, save_again, start_client
from tests.hub.server import Repository, read_files, the_hub
from tests.tiny import make_components, make_tiny_pipeline, make_tiny_xl_pipeline


def make_pipeline() -> Any:
    """Build a pipeline whose scheduler's settings matter for the picture."""
    pipeline = make_tiny_pipeline("flow")
    pipeline.scheduler = RectifiedFlowEulerScheduler(shift=2.0)
    return pipeline


@pytest.fixture(autouse=True)
def _modules_cache(tmp_path_factory, monkeypatch):
    """Keep what this process trusts out of the cache of whoever runs the tests."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    monkeypatch.setattr(sys, "path", sys.path[:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("portable") / "new"
    save_portable(make_pipeline(), folder)
    return folder


@pytest.fixture(scope="module")
def stranger():
    """A process in which `import rectified_diffusers` fails."""
    with start_client(with_us=False) as client:
        yield client


COMMUNITY = """
from diffusers import StableDiffusionPipeline


class CommunityPipeline(StableDiffusionPipeline):
    pass
"""


@pytest.fixture(scope="module")
def community(tmp_path_factory):
    """A folder with a pipeline class of its own, as `custom_pipeline` takes it."""
    folder = tmp_path_factory.mktemp("community")
    (folder / "pipeline.py").write_text(COMMUNITY)
    return str(folder)


@pytest.fixture(scope="module")
def expected():
    return sample(make_pipeline()).tolist()


def weights_and_names(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, except those in which diffusers and transformers record place and time."""
    names = ("model_index.json", "scheduler_config.json", ".py", ".safetensors")
    return {name: content for name, content in read_files(folder).items() if name.endswith(names)}


# Where the package is not installed


def test_the_stranger_does_not_have_the_package(stranger):
    assert not stranger.call(can_import, "rectified_diffusers")
    assert can_import("rectified_diffusers")


@pytest.mark.parametrize("loader", ["DiffusionPipeline", "StableDiffusionPipeline", "AutoPipelineForText2Image"])
def test_a_stranger_loads_the_folder_and_gets_equal_pictures(stranger, folder, expected, loader):
    loaded = stranger.load(loader, str(folder), trust_remote_code=True)
    assert loaded.pipeline == "StableDiffusionPipeline"
    assert loaded.scheduler == "RectifiedFlowEulerScheduler"
    assert loaded.module == f"diffusers_modules.local.{SCHEDULER_MODULE}"
    assert loaded.latents == expected


def test_a_stranger_loads_it_from_the_hub(stranger, folder, expected, tmp_path):
    repository = the_hub().repositories["somebody/portable"] = Repository()
    repository.commit(read_files(folder))
    arguments = {"trust_remote_code": True, "cache_dir": str(tmp_path)}
    assert stranger.load("DiffusionPipeline", "somebody/portable", **arguments).latents == expected
    again = stranger.load("DiffusionPipeline", "somebody/portable", **arguments, local_files_only=True)
    assert again.latents == expected


@pytest.mark.skipif(
    "trust_remote_code" not in inspect.signature(dynamic_modules_utils.get_cached_module_file).parameters,
    reason="diffusers runs the code of a local folder unasked",
)
@pytest.mark.parametrize("loader", ["DiffusionPipeline", "StableDiffusionPipeline"])
def test_without_trust_it_is_an_error_that_says_so(stranger, folder, loader):
    with pytest.raises(HubError, match=f"custom code in {SCHEDULER_MODULE}.py(.|\n)*`trust_remote_code=True`"):
        stranger.load(loader, str(folder))


def test_a_stranger_opens_it_in_a_community_pipeline(stranger, folder, community, expected):
    loaded = stranger.load("DiffusionPipeline", str(folder), custom_pipeline=community, trust_remote_code=True)
    assert loaded.pipeline == "CommunityPipeline"
    assert loaded.latents == expected


def test_a_plain_save_does_not_load_there(stranger, tmp_path):
    """What the portable save is for."""
    make_pipeline().save_pretrained(tmp_path)
    with pytest.raises(HubError, match="no attribute RectifiedFlowPipeline"):
        stranger.load("DiffusionPipeline", str(tmp_path))


def test_a_strangers_own_save_lacks_the_source(stranger, folder, tmp_path, expected):
    """As the docstring says. The weights are whole, and with the package it loads."""
    stranger.call(save_again, str(folder), str(tmp_path))
    assert not list(tmp_path.rglob("*.py"))
    assert load("RectifiedFlowPipeline", str(tmp_path)).latents == expected


# Where it is installed


@pytest.mark.parametrize("loader", [RectifiedFlowPipeline, RectifiedFlowImg2ImgPipeline])
def test_with_the_package_there_is_nothing_to_trust(folder, loader):
    pipeline = loader.from_pretrained(folder)
    assert type(pipeline.scheduler) is RectifiedFlowEulerScheduler
    assert pipeline.scheduler.config.shift == 2.0


def test_with_the_package_the_pictures_are_equal(folder, expected):
    assert load("RectifiedFlowPipeline", str(folder)).latents == expected


@pytest.mark.parametrize("saved", ["portable", "plain"])
def test_with_the_package_a_community_pipeline_opens_both_saves(saved, folder, community, expected, tmp_path):
    if saved == "plain":
        make_pipeline().save_pretrained(folder := tmp_path)
    loaded = load("DiffusionPipeline", str(folder), custom_pipeline=community, trust_remote_code=True)
    assert loaded.pipeline == "CommunityPipeline"
    assert loaded.scheduler == "RectifiedFlowEulerScheduler"
    assert loaded.latents == expected


def test_the_shipped_scheduler_becomes_ours_with_its_settings(folder, expected):
    theirs = AutoPipelineForText2Image.from_pretrained(folder, trust_remote_code=True)
    assert type(theirs) is StableDiffusionPipeline
    assert not isinstance(theirs.scheduler, RectifiedFlowEulerScheduler)
    ours = RectifiedFlowPipeline.from_pipe(theirs)
    assert type(ours.scheduler) is RectifiedFlowEulerScheduler
    assert sample(ours).tolist() == expected


def test_a_portable_folder_is_saved_again(folder, tmp_path):
    save_portable(RectifiedFlowPipeline.from_pretrained(folder), tmp_path)
    assert weights_and_names(tmp_path) == weights_and_names(folder)


def test_the_stock_pipeline_with_our_scheduler_gives_the_same_folder(folder, tmp_path):
    scheduler = RectifiedFlowEulerScheduler(shift=2.0)
    save_portable(StableDiffusionPipeline(**make_components(), scheduler=scheduler), tmp_path)
    assert weights_and_names(tmp_path) == weights_and_names(folder)


def test_an_earlier_plain_save_is_replaced(folder, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    save_portable(make_pipeline(), tmp_path)
    assert weights_and_names(tmp_path) == weights_and_names(folder)


def test_the_index_names_the_stock_class_and_the_shipped_source(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == [SCHEDULER_MODULE, "RectifiedFlowEulerScheduler"]
    assert "rectified_diffusers" not in json.dumps(index)


def test_the_source_is_free_of_our_package(folder):
    source = (folder / "scheduler" / f"{SCHEDULER_MODULE}.py").read_text()
    assert "import rectified_diffusers" not in source
    assert "from rectified_diffusers" not in source


# Errors


def test_another_scheduler(tmp_path):
    stock = make_tiny_pipeline("diffusion")
    with pytest.raises(ValueError, match=r"got DDIMScheduler.*use save_pretrained"):
        save_portable(stock, tmp_path / "new")
    assert type(stock.scheduler) is DDIMScheduler
    assert not (tmp_path / "new").exists()


def test_a_scheduler_with_code_of_its_own(tmp_path):
    class Custom(RectifiedFlowEulerScheduler):
        pass

    pipeline = make_tiny_pipeline("flow")
    pipeline.scheduler = Custom()
    with pytest.raises(ValueError, match="needs a RectifiedFlowEulerScheduler, got Custom"):
        save_portable(pipeline, tmp_path)


def test_a_pipeline_that_starts_from_an_image(tmp_path):
    pipeline = RectifiedFlowImg2ImgPipeline.from_pipe(make_tiny_pipeline("flow"))
    with pytest.raises(ValueError, match=r"Img2ImgPipeline has code of its own.*RectifiedFlowPipeline.from_pipe"):
        save_portable(pipeline, tmp_path)
    save_portable(RectifiedFlowPipeline.from_pipe(pipeline), tmp_path)  # the remedy


@pytest.mark.parametrize("name", sorted(name for name in rectified_diffusers.__all__ if name.endswith("Pipeline")))
def test_of_ours_those_that_start_from_noise_are_portable(name):
    ours = getattr(rectified_diffusers, name)
    if "Img2Img" in name or "Inpaint" in name:
        with pytest.raises(ValueError, match="has code of its own"):
            portable._stock_class(ours)
    else:
        stock = portable._stock_class(ours)
        assert stock.__name__ == name.replace("RectifiedFlow", "StableDiffusion")
        assert issubclass(ours, stock)


def test_the_family_of_stable_diffusion_xl(tmp_path):
    ours = make_tiny_xl_pipeline()
    save_portable(ours, tmp_path)
    theirs = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(theirs) is StableDiffusionXLPipeline
    arguments = {"num_inference_steps": 1, "guidance_scale": 1.0}
    assert torch.equal(sample(theirs, **arguments), sample(ours, **arguments))


def test_a_pipeline_with_code_of_its_own(tmp_path):
    class Custom(RectifiedFlowPipeline):
        pass

    with pytest.raises(ValueError, match="Custom has code of its own that StableDiffusionPipeline of diffusers lacks"):
        save_portable(Custom.from_pipe(make_tiny_pipeline("flow")), tmp_path)


def test_a_model_of_this_package(tmp_path, monkeypatch):
    pipeline = make_tiny_pipeline("flow")

    class OurUNet(type(pipeline.unet)):
        pass

    monkeypatch.setattr(OurUNet, "__module__", "rectified_diffusers.models.stacked_unet")
    pipeline.unet.__class__ = OurUNet
    with pytest.raises(ValueError, match="unet is a OurUNet, which needs rectified_diffusers to load"):
        save_portable(pipeline, tmp_path)


def test_a_lora_attached(tmp_path):
    pipeline = make_tiny_pipeline("flow")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(ValueError, match=r"attached to the pipeline's unet.*fuse_lora\("):
        save_portable(pipeline, tmp_path)
    pipeline.unload_lora_weights()
    save_portable(pipeline, tmp_path)  # the remedy


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="taken is a file"):
        save_portable(make_tiny_pipeline("flow"), tmp_path / "taken")
