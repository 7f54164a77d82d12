"""The manifest: what it has to hold, what may differ in it, and what is said then."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rectified_diffusers.data.dataset import TripletDataset, verify_triplets
from rectified_diffusers.data.manifest import FORMAT, Manifest, settle_manifest
from rectified_diffusers.data.shards import shard_path, write_shard


def make(origin: Any = None, **changes: Any) -> Manifest:
    settings = {
        "format": FORMAT,
        "num_triplets": 4,
        "triplets_per_shard": 4,
        "num_prompts": 1,
        "storage_dtype": "float16",
        "latent_shape": [4, 8, 8],
        "text_embeddings": {"hidden_states": [77, 16]},
    }
    return Manifest.of({**settings, **changes}, origin or {"teacher": "a"})


def test_people_can_read_a_manifest(tmp_path):
    assert settle_manifest(tmp_path, make()) == make()
    text = (tmp_path / "manifest.json").read_text()
    assert text.startswith('{\n  "format": 1,\n  "num_triplets": 4,\n')
    assert text.endswith('  "made_with": {\n    "teacher": "a"\n  }\n}\n')
    found = Manifest.read(tmp_path)
    assert found == make()
    assert (found.num_shards, found.rows(0), found.latent_shape) == (1, 4, (4, 8, 8))
    assert found.text_embeddings == {"hidden_states": (77, 16)}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_triplets", 0, "a number from 1 to 1,000,000,000"),
        ("triplets_per_shard", True, "a number from 1 to 1,000,000,000"),
        ("num_prompts", 1.5, "a number from 1 to 1,000,000,000"),
        ("storage_dtype", "int8", "one of float16, bfloat16, float32"),
        ("latent_shape", [4, 8, 0], "one to four numbers from 1 to 1,000,000,000"),
        ("latent_shape", [2, 4, 8, 8, 8], "one to four numbers from 1 to 1,000,000,000"),
        ("call_options", "[1]", "a JSON object as text, or nothing"),
        ("call_options", {"height": 8}, "a JSON object as text, or nothing"),
        ("text_embeddings", {"hidden_states": [0]}, "shapes by name, or nothing"),
    ],
)
def test_an_entry_of_no_use_raises(tmp_path, name, value, expected):
    settle_manifest(tmp_path, make(**{name: value}))
    with pytest.raises(ValueError, match=f"manifest.json: expected {name} to be {expected}, got .*; restore it"):
        Manifest.read(tmp_path)


def test_a_manifest_without_triplets_may_be_removed(tmp_path: Path):
    settle_manifest(tmp_path, make())
    told = r"expected num_triplets = 4, got 5\. Use the settings in .* to continue, or choose another output_dir\."
    with pytest.raises(ValueError, match=rf"{told} There are no triplets yet: to start again, remove that file\.$"):
        settle_manifest(tmp_path, make(num_triplets=5))
    shard_path(tmp_path, 0).touch()
    with pytest.raises(ValueError, match=rf"{told}$"):
        settle_manifest(tmp_path, make(num_triplets=5))


def test_another_place_of_the_teacher_is_told_and_no_error(tmp_path, caplog):
    settle_manifest(tmp_path, make())
    with caplog.at_level(logging.WARNING):
        assert settle_manifest(tmp_path, make({"teacher": "b"})) == make()
    expected = f"The triplets in {tmp_path} were started with teacher = 'a', now it is 'b'."
    assert caplog.messages == [expected]


def test_shards_are_tied_to_the_settings_in_any_order():
    manifest = make()
    assert Manifest.of(dict(reversed(manifest.settings.items()))).identity == manifest.identity
    assert make({"teacher": "b"}).identity == manifest.identity
    assert make(num_triplets=5).identity != manifest.identity


def write_triplets(folder: Path, **changes: Any) -> None:
    """Write three shards of two triplets in the format of `generate_triplets`."""
    manifest = make(num_triplets=6, triplets_per_shard=2, text_embeddings=None, **changes)
    manifest.write(folder)
    for shard in range(3):
        noise = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(shard)).half()
        header = {"shard": shard, "manifest": manifest.identity, "prompts": ["a", "a"]}
        write_shard(shard_path(folder, shard), {"noise": noise, "data": noise.clone()}, header)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_triplets", 8), ("num_triplets", 4), ("triplets_per_shard", 3), ("num_prompts", 2), ("seed", 1),
     ("latent_shape", [4, 8, 9]), ("storage_dtype", "float32"), ("text_embeddings", {"hidden_states": [77, 16]})],
)  # fmt: skip
@pytest.mark.parametrize("function", [TripletDataset, verify_triplets, Manifest.read])
def test_a_changed_value_is_reported_as_damage_of_the_manifest(tmp_path, function, name, value):
    """The shards are intact: nobody is to be sent to delete them."""
    write_triplets(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=r"manifest\.json was changed: none of the 3 readable shards") as caught:
        function(tmp_path)
    assert "elete" not in str(caught.value)
    assert "Restore manifest.json as it was and keep the shards" in str(caught.value)
    with pytest.raises(ValueError, match=r"manifest\.json was changed"):
        settle_manifest(tmp_path, make())


def test_one_shard_of_its_own_vouches_for_a_manifest(tmp_path):
    write_triplets(tmp_path / "other", seed=1)
    write_triplets(tmp_path)
    for shard in (0, 2):
        shutil.copy(shard_path(tmp_path / "other", shard), tmp_path)
    with pytest.raises(ValueError, match=r"2 of 3 shards .* not sound:\n.*00000.* does not belong to the manifest"):
        verify_triplets(tmp_path)
    shard_path(tmp_path, 1).write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"manifest\.json was changed: none of the 2 readable shards"):
        verify_triplets(tmp_path)
    assert verify_triplets(tmp_path / "other").manifest.origin == {"teacher": "a"}
