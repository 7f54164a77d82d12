"""A Hub that is slow, out of order, moved, or sends something else: right weights, or an error that names what to do.

Whatever happened, the same call ends well once the Hub does: nothing half-loaded or damaged stays in the cache.
"""

import json
import os
import time
from pathlib import Path
from unittest import mock

import huggingface_hub.constants
import pytest
import torch
from diffusers.utils import constants
from safetensors.torch import save

from rectified_diffusers.cli.shared import load_pipeline
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.weights.components import swap_components
from rectified_diffusers.weights.delta import load_weight_delta
from tests.hub.client import HubError, Loaded, load, portable_errors, sample
from tests.hub.conftest import INSTAFLOW
from tests.hub.server import Fault, Repository
from tests.tiny import make_tiny_pipeline

pytestmark = pytest.mark.slow

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
CONFIG = "unet/config.json"
INDEX = "model_index.json"


def flipped(content: bytes) -> bytes:
    """Change a byte near the end: the header of a safetensors file and its length stay right."""
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def fails_then_ends_well(hub, client, cache, expected, fault: dict[str, Fault], words: str) -> HubError:
    hub.faults = fault
    with pytest.raises(HubError, match=words) as error:
        client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache)
    assert error.value.types[0] in ("OSError", "ConnectionError", "ValueError"), str(error.value)
    hub.recover()
    assert client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache).latents == expected
    assert not list(Path(cache).rglob("*.incomplete"))
    return error.value


@pytest.mark.parametrize("name", [UNET, TEXT_ENCODER, CONFIG])
def test_a_wrong_hash(hub, client, cache, expected, name):
    """The Hub's client compares lengths alone."""
    damage = {UNET: flipped, TEXT_ENCODER: flipped, CONFIG: lambda content: content.replace(b"8", b"9", 1)}[name]
    words = f"{INSTAFLOW}: {name} was damaged in the download: expected the hash .* load again"
    fails_then_ends_well(hub, client, cache, expected, {name: Fault(damage=damage)}, words)


def test_a_wrong_hash_of_what_the_commands_load(hub, client, cache, expected):
    """They load by diffusers' own class, whatever the pipeline is."""
    hub.faults = {UNET: Fault(damage=flipped)}
    with pytest.raises(HubError, match=f"{UNET} was damaged in the download"):
        client.call(load_by_command, INSTAFLOW, cache)
    hub.recover()
    assert client.call(load_by_command, INSTAFLOW, cache) == expected


def load_by_command(model: str, cache: str) -> object:
    return in_a_cache(cache, lambda: sample(load_pipeline(model, "cpu", "float32")).tolist())


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-100], lambda content: content[:0], lambda content: content + bytes(100)],
    ids=["shorter", "empty", "grown"],
)
def test_a_wrong_length(hub, client, cache, expected, damage):
    words = r"Consistency check failed|damaged in the download|could not be fetched"
    error = fails_then_ends_well(hub, client, cache, expected, {UNET: Fault(damage=damage)}, words)
    assert "diffusion_pytorch_model.safetensors" in str(error)


@pytest.mark.parametrize("status", [500, 502, 504])
@pytest.mark.parametrize("name", [INDEX, UNET, f"api/models/{INSTAFLOW}"])
def test_errors_of_the_server_then_well(hub, client, cache, expected, name, status):
    """Within one call, or with the next one."""
    hub.faults = {name: Fault(statuses=[status, status])}
    loaded: list[Loaded] = []
    errors: list[HubError] = []
    while not loaded and len(errors) < 3:
        try:
            loaded.append(client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache))
        except HubError as error:
            errors.append(error)
    assert loaded[0].latents == expected
    assert all(str(status) in str(error) and INSTAFLOW in error.texts[0] for error in errors)


def test_errors_of_the_server_for_good(hub, client, cache, expected):
    fault = {UNET: Fault(statuses=[503] * 100)}
    error = fails_then_ends_well(hub, client, cache, expected, fault, "503")
    assert INSTAFLOW in error.texts[0]


@pytest.mark.parametrize("name", [INDEX, UNET])
def test_a_loop_of_redirects_ends(hub, client, cache, expected, name):
    error = fails_then_ends_well(hub, client, cache, expected, {name: Fault(loop=True)}, "redirect")
    assert INSTAFLOW in error.texts[0]


def test_a_slow_answer(hub, client, cache, expected):
    hub.faults = {UNET: Fault(pause=0.1), INDEX: Fault(pause=0.1)}
    assert client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache).latents == expected


def test_an_answer_that_stops_coming(hub, client, cache, expected):
    """Longer than the client waits: it asks for the rest a few times, and gives up."""
    hub.faults = {UNET: Fault(pause=1.0)}
    with pytest.raises(HubError, match=r"could not be fetched: ReadTimeout|timed out|Timeout") as error:
        client.call(load_hastily, INSTAFLOW, cache_dir=cache)
    assert INSTAFLOW in str(error.value)
    hub.recover()
    assert client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache).latents == expected


def load_hastily(source: str, cache_dir: str) -> Loaded:
    """Load with a client that waits a twentieth of a second for the next byte of a file."""
    with mock.patch.object(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05):
        return load("RectifiedFlowPipeline", source, cache_dir=cache_dir)


def test_a_moved_repository(hub, client, cache, expected):
    hub.moved = {"somebody/old-name": INSTAFLOW}
    first = client.load("RectifiedFlowPipeline", "somebody/old-name", cache_dir=cache)
    assert first.latents == expected
    again = client.load("RectifiedFlowPipeline", "somebody/old-name", cache_dir=cache, local_files_only=True)
    assert again == first


def test_a_repository_of_pickles(hub, client, cache):
    published = hub.repositories[INSTAFLOW]
    files = dict(published.commits[published.names["main"]])
    files["unet/diffusion_pytorch_model.bin"] = files.pop(UNET)
    hub.repositories["somebody/pickles"] = Repository()
    hub.repositories["somebody/pickles"].commit(files)
    hub.requests.clear()
    words = r"somebody/pickles has weights as pickles \(unet/diffusion_pytorch_model.bin\).*Convert it once"
    with pytest.raises(HubError, match=words) as error:
        client.load("RectifiedFlowPipeline", "somebody/pickles", cache_dir=cache)
    assert error.value.types[0] == "OSError"
    assert not [name for name in hub.downloads() if name.endswith(".bin")]


def test_a_damaged_file_of_an_earlier_time_is_not_hashed_again(hub, client, cache, expected, tmp_path):
    """What was there before the call was compared when it came: a hash costs a second per gigabyte."""
    assert client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache).latents == expected
    (blob,) = {file.resolve() for file in Path(cache).rglob(INDEX)}
    text = json.loads(blob.read_bytes())
    blob.write_text(json.dumps(text, indent=3))  # by the user's own hand
    earlier = time.time() - 3600
    os.utime(blob, (earlier, earlier))
    assert client.load("RectifiedFlowPipeline", INSTAFLOW, cache_dir=cache).latents == expected


def damaged_once(hub, client, call, *given):
    """Do `call` twice with a damaged U-Net, LoRA or VAE on the Hub, then well; return what came of the last."""
    for _ in range(2):  # the second would find the first one's file in the cache
        with pytest.raises(HubError, match="was damaged in the download: expected the hash") as error:
            client.call(call, *given)
        assert error.value.types[0] == "OSError"
    hub.recover()
    return client.call(call, *given)


def in_a_cache(cache: str, work):
    """Do `work` with another folder as the cache of the client's process."""
    with (
        mock.patch.object(huggingface_hub.constants, "HF_HUB_CACHE", cache),
        mock.patch.object(constants, "HF_MODULES_CACHE", cache),
        portable_errors(),
    ):
        return work()


def delta_sum(source: str, cache: str) -> float:
    def work() -> float:
        weights = load_weight_delta(source).weights
        return sum(float(weights.read(name).double().sum()) for name in weights.shapes)

    return in_a_cache(cache, work)


def test_a_delta_by_its_hub_id_is_compared_with_its_hash(hub, client, cache):
    hub.faults = {UNET: Fault(damage=flipped)}
    unet = make_tiny_pipeline("flow").unet.state_dict()
    total = damaged_once(hub, client, delta_sum, INSTAFLOW, cache)
    assert total == pytest.approx(sum(float(weight.double().sum()) for weight in unet.values()))


def swapped(source: str, folder: str, cache: str) -> list[str]:
    pipeline = RectifiedFlowPipeline.from_pretrained(folder)
    return in_a_cache(cache, lambda: list(swap_components(pipeline, source).originals))


def test_parts_of_a_fine_tune_are_compared_with_their_hash(hub, client, cache, tmp_path):
    make_tiny_pipeline("flow").save_pretrained(tmp_path / "model")
    hub.faults = {"vae/diffusion_pytorch_model.safetensors": Fault(damage=flipped)}
    assert damaged_once(hub, client, swapped, INSTAFLOW, str(tmp_path / "model"), cache) == ["vae", "text_encoder"]


def with_lora(source: str, folder: str, cache: str) -> list[str]:
    pipeline = RectifiedFlowPipeline.from_pretrained(folder)

    def work() -> list[str]:
        try:
            pipeline.load_lora_weights(source, weight_name="lora.safetensors", cache_dir=cache)
        finally:
            attached = sorted(pipeline.get_list_adapters())
        return attached

    return in_a_cache(cache, work)


def test_a_lora_is_compared_with_its_hash(hub, client, cache, tmp_path):
    make_tiny_pipeline("flow").save_pretrained(tmp_path / "model")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = make_tiny_pipeline("flow").unet.get_submodule(layer.removeprefix("unet.")).in_features
    factors = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
    hub.repositories["somebody/style"] = Repository()
    hub.repositories["somebody/style"].commit({"lora.safetensors": save(factors)})
    hub.faults = {"lora.safetensors": Fault(damage=flipped)}
    assert damaged_once(hub, client, with_lora, "somebody/style", str(tmp_path / "model"), cache) == ["unet"]
