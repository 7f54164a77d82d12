import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from rectified_diffusers.evaluation.features import MobileNetV2Features
from rectified_diffusers.evaluation.metrics import _centered, _square_root, frechet_distance, frechet_interval


def scipy_frechet(a, b):
    """The formula as printed, with the matrix square root of scipy: as pytorch-fid has it."""
    a, b = a.double().numpy(), b.double().numpy()
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * np.trace(root).real


@given(seed=st.integers(0, 2**31), mean=st.floats(-1e4, 1e4))
def test_statistics_are_those_of_numpy(seed, mean):
    features = torch.randn(23, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + mean
    ours_mean, centered = _centered(features)
    covariance = centered.T @ centered
    np.testing.assert_allclose(ours_mean, features.numpy().mean(0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-7, atol=1e-8)


def test_diagonal_gaussians_have_their_closed_form():
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    corners = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], dtype=torch.float64)
    first = corners * torch.tensor([1.0, 2.0, 3.0])
    second = corners * torch.tensor([4.0, 1.0, 3.0]) + torch.tensor([0.0, 0.0, 5.0])
    unbiased = 8 / 7
    assert frechet_distance(first, second) == pytest.approx(25 + unbiased * (9 + 1 + 0), rel=1e-12)


@given(seed=st.integers(0, 2**31))
def test_agrees_with_scipy_and_is_symmetric(seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, 12, 12, dtype=torch.float64, generator=generator)
    a = torch.randn(60, 12, dtype=torch.float64, generator=generator) @ mix[0]
    b = torch.randn(50, 12, dtype=torch.float64, generator=generator) @ mix[1] + 0.5
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(scipy_frechet(a, b), rel=1e-6)
    assert distance == pytest.approx(frechet_distance(b, a), rel=1e-10)


@given(seed=st.integers(0, 2**31), counts=st.sampled_from([(9, 7), (12, 12), (12, 30)]))
def test_few_images_in_many_dimensions_agree_with_the_roots_of_the_covariances(seed, counts):
    """On both sides of the case in which the matrix of images is smaller than that of dimensions."""
    a, b = (torch.randn(n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + n)) for n in counts)
    roots = [_square_root(x.T.cov()) for x in (a, b)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * cross
    # An eigenvalue of 0 is rounded to 1e-16, and its root is 1e-8: the way over the roots is the less exact one.
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-7)


def test_the_interval_leaves_groups_of_images_out_of_both_sets():
    x, y = torch.randn(2, 30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(30) % 3
    found = frechet_interval(x, y, groups)
    assert found.mean == frechet_distance(x, y)
    kept = [frechet_distance(x[groups != g], y[groups != g]) for g in range(3)]
    variance = 2 / 3 * sum((value - sum(kept) / 3) ** 2 for value in kept)  # equal groups: the usual formula
    assert sum(d**2 for d in found.deviations) == pytest.approx(variance)


@pytest.mark.parametrize("count", [5, 100])  # fewer images than dimensions, and more
def test_zero_on_itself(count):
    features = torch.randn(count, 20)
    assert 0 <= frechet_distance(features, features) < 1e-9


def test_a_singular_covariance_costs_no_digits():
    """In orthogonal subspaces the cross term is zero, and the distance that of means and traces."""
    a, b = torch.randn(2, 6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a[:, 20:], b[:, :20] = 0, 0
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.full((2, 3), torch.nan), torch.zeros(2, 3), "finite features"),
        (torch.zeros(2, 3), torch.full((2, 3), torch.inf), "finite features"),
        (torch.zeros(1, 3), torch.zeros(2, 3), "at least 2 images, got 1"),
        (torch.zeros(2, 3), torch.zeros(0, 3), "at least 2 images, got 0"),
    ],
)
def test_wrong_features_are_told(first, second, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(first, second)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    models = pytest.importorskip("torchvision.models")
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v2.safetensors"
    save_file(models.mobilenet_v2(weights=None).state_dict(), path)
    return path


def test_mobilenet_features_follow_torchvision(weights):
    """Same preprocessing and pooling as torchvision's own, up to its resize of 8-bit values."""
    import torchvision.transforms.v2.functional as vision
    from safetensors.torch import load_file
    from torchvision.models import mobilenet_v2

    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    ours = MobileNetV2Features(weights, size=64)(images)
    network = mobilenet_v2(weights=None).eval()
    network.load_state_dict(load_file(weights))
    network.classifier = torch.nn.Identity()
    pixels = vision.resize(images.float() / 255, [64, 64], antialias=True)
    pixels = vision.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert ours.shape == (2, MobileNetV2Features.dimensions)
    torch.testing.assert_close(ours, network(pixels).detach(), rtol=1e-4, atol=1e-5)


def test_a_download_that_fails_says_what_to_do(no_network):
    with pytest.raises(OSError, match=r"cannot be downloaded .* then give mobilenet_weights"):
        MobileNetV2Features(None)


def test_what_mobilenet_needs_is_told(weights, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="No MobileNetV2 weights"):
        MobileNetV2Features(tmp_path / "none.safetensors")
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        MobileNetV2Features(weights)
