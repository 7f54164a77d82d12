"""Loading through the real client of the Hub, from a server that serves the published layout and fails on demand."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from tests.hub.client import HubError, load
from tests.hub.conftest import INSTAFLOW, OURS, TWO_FLOW
from tests.hub.server import Fault, Repository
from tests.marks import slow_but
from tests.original_layout import original_layout
from tests.tiny import make_tiny_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
REPLACED = [
    "INFO: The checkpoint's PNDMScheduler is a diffusion scheduler; RectifiedFlowEulerScheduler takes its place."
]
OUR_LOADERS = ["RectifiedFlowPipeline", "DiffusionPipeline", "AutoPipelineForText2Image"]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    """A cache that the tests that damage nothing fill together."""
    return str(tmp_path_factory.mktemp("cache"))


def files_of(cache: str, pattern: str) -> list[Path]:
    return sorted(Path(cache).rglob(pattern))


# What loads


def test_first_download_then_the_cache_then_offline(hub, client, cache, expected):
    hub.requests.clear()
    first = client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache)
    assert (first.pipeline, first.scheduler) == ("RectifiedFlowPipeline", "RectifiedFlowEulerScheduler")
    assert first.messages == REPLACED
    assert first.latents == expected
    published = hub.repositories[INSTAFLOW].commits[hub.repositories[INSTAFLOW].names["main"]]
    assert hub.downloads() == sorted(published.keys() - {"README.md", ".gitattributes"})  # each once
    assert len(hub.requests) <= 40

    hub.requests.clear()
    assert client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache).latents == expected
    assert hub.downloads() == []
    assert len(hub.requests) <= 3  # is there a newer version?

    hub.requests.clear()
    again = client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache, local_files_only=True)
    assert again == first
    assert hub.requests == []

    assert huggingface_hub.constants.HF_HUB_OFFLINE  # this process is the one that is offline
    assert load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache) == first
    assert hub.requests == []


@pytest.mark.parametrize("repository", slow_but([INSTAFLOW, OURS], [INSTAFLOW, TWO_FLOW, OURS]))
@pytest.mark.parametrize("loader", OUR_LOADERS)
def test_every_loader_gives_our_pipeline(client, shared_cache, expected, loader, repository):
    loaded = client.load(loader, repository, cache_dir=shared_cache)
    assert (loaded.pipeline, loaded.scheduler) == ("RectifiedFlowPipeline", "RectifiedFlowEulerScheduler")
    assert loaded.module == "rectified_diffusers.pipelines.scheduler"
    assert loaded.messages == ([] if repository == OURS else REPLACED)
    assert (loaded.latents == expected) == (repository != TWO_FLOW)  # its newest version has other weights


@pytest.mark.parametrize("repository", [INSTAFLOW, OURS])
def test_the_stock_pipeline_given_our_scheduler(client, shared_cache, expected, repository):
    arguments = {"scheduler": "RectifiedFlowEulerScheduler", "cache_dir": shared_cache}
    loaded = client.load("StableDiffusionPipeline", repository, **arguments)
    assert (loaded.pipeline, loaded.scheduler) == ("StableDiffusionPipeline", "RectifiedFlowEulerScheduler")
    assert loaded.latents == expected


def test_the_stock_pipeline_by_itself_keeps_the_stored_scheduler(client, shared_cache, expected):
    """The trap that the published checkpoints are, and that what we save is not."""
    trapped = client.load("StableDiffusionPipeline", INSTAFLOW, cache_dir=shared_cache)
    assert trapped.scheduler == "PNDMScheduler"
    assert trapped.latents != expected
    ours = client.load("StableDiffusionPipeline", OURS, cache_dir=shared_cache)
    assert ours.scheduler == "RectifiedFlowEulerScheduler"
    assert ours.latents == expected


@pytest.mark.parametrize("loader", OUR_LOADERS)
def test_a_passed_diffusion_scheduler_is_refused(client, shared_cache, loader):
    with pytest.raises(HubError, match="needs a RectifiedFlowEulerScheduler, got PNDMScheduler"):
        client.load(loader, INSTAFLOW, scheduler="PNDMScheduler", cache_dir=shared_cache)


def test_a_version_is_pinned_by_tag_or_hash(hub, client, shared_cache, expected):
    repository = hub.repositories[TWO_FLOW]
    newest = client.load("DiffusionPipeline", TWO_FLOW, cache_dir=shared_cache).latents
    assert newest != expected
    for revision in ("v1", repository.names["v1"]):
        pinned = client.load("DiffusionPipeline", TWO_FLOW, revision=revision, cache_dir=shared_cache)
        assert pinned.latents == expected
    hub.requests.clear()
    offline = client.load(
        "RectifiedFlowPipeline", TWO_FLOW, revision="v1", cache_dir=shared_cache, local_files_only=True
    )
    assert offline.latents == expected
    assert hub.requests == []


def test_a_single_file_has_its_settings_from_the_repository_of_stable_diffusion(hub, client, tmp_path, expected):
    """Nothing in one file says how large a model is: diffusers takes it for Stable Diffusion 1.5's settings."""
    save_file(original_layout(make_tiny_pipeline("flow")), tmp_path / "flow.safetensors")
    repository = hub.repositories[STABLE_DIFFUSION] = Repository()
    published = hub.repositories[INSTAFLOW]
    files = dict(published.commits[published.names["main"]])
    index = json.loads(files["model_index.json"])
    files["model_index.json"] = json.dumps({**index, "_class_name": "StableDiffusionPipeline"}).encode()
    repository.commit(files)
    hub.requests.clear()
    arguments = {"method": "from_single_file", "cache_dir": str(tmp_path)}
    loaded = client.load("RectifiedFlowPipeline", str(tmp_path / "flow.safetensors"), **arguments)
    assert (loaded.pipeline, loaded.scheduler) == ("RectifiedFlowPipeline", "RectifiedFlowEulerScheduler")
    assert loaded.messages == REPLACED
    torch.testing.assert_close(torch.tensor(loaded.latents), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]


# What fails on the way


def test_a_connection_cut_once_is_taken_up_where_it_broke_off(hub, client, cache, expected):
    hub.faults = {UNET: Fault(cuts=1)}
    hub.requests.clear()
    if int(huggingface_hub.__version__.split(".")[0]) < 1:  # which goes on only when it is asked again
        with pytest.raises(HubError, match="Connection broken"):
            client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache)
    assert client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache).latents == expected
    assert hub.faults[UNET].cuts == 0
    assert hub.downloads().count(UNET) == 2


def test_a_connection_cut_for_good_leaves_nothing_that_is_taken_for_whole(hub, client, cache, expected):
    hub.faults = {UNET: Fault(cuts=1000)}
    with pytest.raises(HubError, match=r"closed connection|IncompleteRead|Connection broken|Consistency check failed"):
        client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache)
    assert files_of(cache, UNET) == []
    hub.recover()
    assert client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache).latents == expected
    assert not files_of(cache, "*.incomplete")


def test_a_half_filled_cache_says_offline_what_is_missing(hub, client, cache):
    hub.faults = {UNET: Fault(cuts=1000)}
    with pytest.raises(HubError):
        client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache)
    with pytest.raises(HubError) as error:
        client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache, local_files_only=True)
    assert error.value.types[0] in ("IncompleteSnapshotError", "OSError")  # by the client's age
    assert "diffusion_pytorch_model" in str(error.value)


def test_an_empty_cache_offline(hub, client, cache):
    hub.requests.clear()
    with pytest.raises(HubError) as error:
        client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache, local_files_only=True)
    assert error.value.types[0] == "LocalEntryNotFoundError"
    assert hub.requests == []


def test_a_hub_out_of_order_falls_back_to_the_cache(hub, client, shared_cache, cache, expected):
    client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=shared_cache)
    hub.fail()
    assert client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=shared_cache).latents == expected
    with pytest.raises(HubError, match="503"):
        client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache)


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_any", 404)])
@pytest.mark.parametrize("loader", ["RectifiedFlowPipeline", "DiffusionPipeline"])
def test_a_repository_that_does_not_exist(client, cache, loader, token, status):
    """Which may be one that a stranger may not know of: the Hub's text says so, and it is among the causes."""
    with pytest.raises(HubError, match="Cannot load model somebody/nothing") as error:
        client.load(loader, "somebody/nothing", cache_dir=cache, token=token)
    assert "RepositoryNotFoundError" in error.value.types
    assert f"{status} Client Error" in str(error.value)
    assert "make sure you are authenticated" in str(error.value)


@pytest.mark.parametrize("loader", ["RectifiedFlowPipeline", "DiffusionPipeline"])
def test_a_revision_that_does_not_exist(client, cache, loader):
    with pytest.raises(HubError, match="Invalid rev id: v9"):
        client.load(loader, INSTAFLOW, revision="v9", cache_dir=cache)


def test_a_gated_repository(hub, client, cache, expected):
    open_to_all = hub.repositories[INSTAFLOW]
    hub.repositories["somebody/gated"] = Repository(open_to_all.commits, open_to_all.names, token="hf_good")
    for token, status in ((None, 401), ("hf_other", 403)):
        with pytest.raises(HubError, match="Access to model somebody/gated is restricted") as error:
            client.load("RectifiedFlowPipeline", "somebody/gated", cache_dir=cache, token=token)
        assert error.value.types[0] == "GatedRepoError"
        assert f"{status} Client Error" in str(error.value)
    loaded = client.load("RectifiedFlowPipeline", "somebody/gated", cache_dir=cache, token="hf_good")
    assert loaded.latents == expected


# What is not there, or not whole


def test_a_variant_that_does_not_exist(client, shared_cache):
    with pytest.raises(HubError) as error:
        client.load("RectifiedFlowPipeline", INSTAFLOW, variant="fp16", cache_dir=shared_cache)
    assert error.value.types[0] == "ValueError"
    assert f"`variant=fp16`, but {INSTAFLOW} has none" in error.value.texts[0]
    assert ".to(torch.float16)" in error.value.texts[0]
    # Loaded by diffusers' class, ours is asked too late to add the remedy.
    with pytest.raises(HubError, match="variant=fp16"):
        client.load("DiffusionPipeline", INSTAFLOW, variant="fp16", cache_dir=shared_cache)


@pytest.mark.parametrize(
    ("damage", "weights"),
    slow_but(
        [("cut off", UNET), ("a page", TEXT_ENCODER)],
        [(damage, weights) for damage in ("cut off", "a page") for weights in (UNET, TEXT_ENCODER)],
    ),
)
def test_a_damaged_file_is_named_with_what_to_do(client, cache, expected, weights, damage):
    client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache)
    file = next(path for path in files_of(cache, weights))
    content = Path(file).read_bytes()
    blob = Path(os.path.realpath(file))
    blob.write_bytes(content[:-100] if damage == "cut off" else b"<html>Please log in to the network</html>")
    with pytest.raises(HubError) as error:
        client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache)
    assert error.value.types[0] == "OSError"
    assert error.value.texts[0].startswith(f"{file} cannot be read: ")
    assert f"Delete {blob} and load again" in error.value.texts[0]
    with pytest.raises(HubError):  # as the text says
        client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache, force_download=True)
    blob.unlink()
    assert client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache).latents == expected
