import pytest
import torch

from rectified_diffusers.evaluation.metrics import diversity


def test_it_is_the_mean_cosine_distance_of_pairs():
    features = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    pairs = [(i, j) for i in range(4) for j in range(i)]
    cosine = torch.nn.functional.cosine_similarity
    expected = [1 - cosine(own[i], own[j], dim=0).item() for own in features for i, j in pairs]
    assert diversity(features) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_it_knows_its_extremes():
    assert diversity(torch.ones(2, 3, 4) * torch.tensor([1.0, 2.0, 3.0])[:, None]) == pytest.approx(0, abs=1e-12)
    assert diversity(torch.eye(4)[None]) == pytest.approx(1)
    assert diversity(torch.tensor([[[1.0, 0], [-1, 0]]])) == pytest.approx(2)
