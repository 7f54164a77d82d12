"""The manifest: what it has to hold, what may differ in it, and what is said then."""

import logging
from pathlib import Path
from typing import Any

import pytest

from rectified_diffusers.data.manifest import identity, new_manifest, read_manifest, settle_manifest
from rectified_diffusers.data.shards import shard_path


def make(**changes: Any) -> dict[str, Any]:
    settings = {
        "num_triplets": 4,
        "triplets_per_shard": 4,
        "num_prompts": 1,
        "storage_dtype": "float16",
        "latent_shape": [4, 8, 8],
        "text_embeddings": {"hidden_states": [77, 16]},
        "made_with": {"teacher": "a"},
    }
    return new_manifest(**{**settings, **changes})


def test_people_can_read_a_manifest(tmp_path):
    assert settle_manifest(tmp_path, make()) == make()
    assert (tmp_path / "manifest.json").read_text().startswith('{\n  "format": 1,\n  "num_triplets": 4,\n')
    assert read_manifest(tmp_path) == make()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_triplets", 0, "a number of at least 1"),
        ("triplets_per_shard", True, "a number of at least 1"),
        ("num_prompts", 1.5, "a number of at least 1"),
        ("storage_dtype", "int8", "one of float16, bfloat16, float32"),
        ("latent_shape", [4, 8, 0], "three numbers of at least 1"),
        ("latent_shape", [8, 8], "three numbers of at least 1"),
        ("text_embeddings", {"hidden_states": [0]}, "shapes by name, or nothing"),
    ],
)
def test_an_entry_of_no_use_raises(tmp_path, name, value, expected):
    settle_manifest(tmp_path, make(**{name: value}))
    with pytest.raises(ValueError, match=f"manifest.json: expected {name} to be {expected}, got .*; restore it"):
        read_manifest(tmp_path)


def test_a_manifest_without_triplets_may_be_removed(tmp_path: Path):
    settle_manifest(tmp_path, make())
    told = r"expected num_triplets = 4, got 5\. Use the settings in .* to go on, or choose another output_dir\."
    with pytest.raises(ValueError, match=rf"{told} No triplets are there yet: to begin anew, remove that file\.$"):
        settle_manifest(tmp_path, make(num_triplets=5))
    shard_path(tmp_path, 0).touch()
    with pytest.raises(ValueError, match=rf"{told}$"):
        settle_manifest(tmp_path, make(num_triplets=5))


def test_another_place_of_the_teacher_is_told_and_no_error(tmp_path, caplog):
    settle_manifest(tmp_path, make())
    with caplog.at_level(logging.WARNING):
        assert settle_manifest(tmp_path, make(made_with={"teacher": "b"})) == make()
    expected = f"The triplets in {tmp_path} were begun with teacher = 'a', now it is 'b'; going on."
    assert caplog.messages == [expected]


def test_shards_are_tied_to_the_settings_in_any_order():
    manifest = make()
    assert identity(dict(reversed(manifest.items()))) == identity(manifest)
    assert identity(make(made_with={})) == identity(manifest)
    assert identity(make(num_triplets=5)) != identity(manifest)
