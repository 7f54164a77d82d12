"""Several folders of triplets as one."""

from pathlib import Path

import pytest
import torch
from benchmarks.triplet_memory import write_synthetic

from rectified_diffusers.data.dataset import JoinedTriplets, TripletDataset, open_triplets
from rectified_diffusers.training.prompts import PromptEncoder
from tests.data.test_triplets import generate
from tests.tiny import make_tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Return folders of six and of ten triplets, with different prompts and noise."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    generate(folders[0], num_triplets=6, seed=1, prompts=["the sea", "a cat"])
    generate(folders[1])
    return folders


def test_rows_are_those_of_the_folders_in_any_order(folders):
    joined, parts = JoinedTriplets(folders), [TripletDataset(folder) for folder in folders]
    assert len(joined) == 16
    rows = joined.rows(torch.tensor([15, 5, 6, 0, 5]))
    expected = [parts[1].rows([9]), parts[0].rows([5]), parts[1].rows([0]), parts[0].rows([0]), parts[0].rows([5])]
    assert rows.prompts == [part.prompts[0] for part in expected]
    for name in ("noise", "data"):
        assert torch.equal(getattr(rows, name), torch.cat([getattr(part, name) for part in expected]))
    assert len(joined.rows([])) == 0
    for index in (-1, 16):
        with pytest.raises(IndexError, match=rf"in \[0, 16\), got {index} for the joined triplets"):
            joined.rows([0, index])


def test_text_embeddings_go_along_or_are_refused(folders, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        generate(tmp_path / name, num_triplets=4, seed=seed, store_text_embeddings=True)
    joined = JoinedTriplets([tmp_path / "a", tmp_path / "b"])
    stored = TripletDataset(tmp_path / "b").rows([2]).text_embeddings["encoder_hidden_states"]
    assert torch.equal(joined.rows([1, 6]).text_embeddings["encoder_hidden_states"][1:], stored)
    with pytest.raises(ValueError, match=r"do not go with those in .*: expected text_embeddings None, got \{"):
        JoinedTriplets([folders[0], tmp_path / "a"])


def test_the_guidance_is_that_of_the_first_folder_and_none_where_no_manifest_has_it(folders, tmp_path):
    """Manifests of the previews have neither guidance nor text embeddings."""
    assert JoinedTriplets(folders).manifest.guidance_scale == 7.5
    for name in ("a", "b"):
        write_synthetic(tmp_path / name, num_triplets=8, triplets_per_shard=4)
    joined = JoinedTriplets([tmp_path / "a", tmp_path / "b"])
    assert joined.manifest.guidance_scale == 1
    assert joined.rows([3, 12]).text_embeddings == {}


def test_every_prompt_of_every_folder_is_remembered(folders):
    from rectified_diffusers.models.denoiser import Denoiser

    encoder = PromptEncoder(Denoiser.of(make_tiny_pipeline("flow")), torch.device("cpu"))
    encoder.remember(JoinedTriplets(folders))
    assert encoder.table.keys() == {"", "the sea", "a cat", "a red apple", "the café"}


def test_one_folder_is_opened_as_it_is_and_none_is_an_error(folders):
    assert type(open_triplets(folders[:1])) is TripletDataset
    assert type(open_triplets(folders)) is JoinedTriplets
    with pytest.raises(ValueError, match="at least one folder of triplets, got none"):
        open_triplets([])
    with pytest.raises(TypeError, match=r"folders must be of type list or tuple.*as a list\.$"):
        JoinedTriplets(str(folders[0]))  # pyright: ignore[reportArgumentType]


def test_a_folder_given_twice_counts_twice(folders):
    joined = JoinedTriplets([folders[0], folders[0]])
    assert len(joined) == 12
    assert torch.equal(joined.rows([3]).noise, joined.rows([9]).noise)
    assert "made_with" not in joined.manifest.settings["parts"][0]
