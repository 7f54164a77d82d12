import sys

import pytest
import torch
from safetensors.torch import save_file

from rectified_diffusers.evaluation.features import InceptionV3Features
from rectified_diffusers.evaluation.metrics import frechet_distance


def images_of(count, seed):
    return torch.randint(0, 256, (count, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_distance_agrees_with_torch_fidelity():
    """Its distance takes eigenvalues of a product where ours takes singular values of roots."""
    library = pytest.importorskip("torch_fidelity.metric_fid")
    mix = torch.randn(2, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = (torch.randn(200, 48, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2))
    x, y = x @ mix[0], y @ mix[1] + 0.3
    theirs = library.fid_statistics_to_metric(
        library.fid_features_to_statistics(x), library.fid_features_to_statistics(y), verbose=False
    )
    ours = frechet_distance(x, y)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


@pytest.mark.slow
def test_from_pictures_to_the_distance_it_agrees_with_torch_fidelity(inception_weights, tmp_path):
    """The whole path on one set of weights, to four digits: pictures, resize, features, statistics, distance."""
    from safetensors.torch import load_file
    from torch_fidelity import calculate_metrics

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, seed):
            self.images = images_of(24, seed) // (1 + seed)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i]

    torch.save(load_file(inception_weights), tmp_path / "inception.pth")
    first, second = Pictures(0), Pictures(1)
    theirs = calculate_metrics(
        input1=first,
        input2=second,
        fid=True,
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        feature_extractor_weights_path=str(tmp_path / "inception.pth"),
    )
    features = InceptionV3Features(inception_weights)
    distance = frechet_distance(features(first.images), features(second.images))
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_the_weights_of_the_file_are_those_of_the_network(inception_weights):
    from safetensors.torch import load_file

    features = InceptionV3Features(inception_weights)
    stored = load_file(inception_weights)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in features.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in features.parameters())
    found = features(images_of(1, 0))
    assert found.shape == (1, InceptionV3Features.dimensions)
    assert found.isfinite().all()
    assert found.std() > 0


def test_what_is_wrong_is_told(inception_weights, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="No Inception-v3 weights"):
        InceptionV3Features(tmp_path / "none.safetensors")
    (tmp_path / "inception.pth").touch()
    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        InceptionV3Features(tmp_path / "inception.pth")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not have the layout"):
        InceptionV3Features(tmp_path / "other.safetensors")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        InceptionV3Features(inception_weights)


def test_a_download_that_fails_says_what_to_do(no_network):
    with pytest.raises(OSError, match=r"cannot be downloaded .* then give inception_weights"):
        InceptionV3Features()


def test_without_a_file_torch_fidelity_downloads(inception_weights, monkeypatch):
    from safetensors.torch import load_file
    from torch_fidelity import feature_extractor_inceptionv3 as library

    asked = []
    weights = load_file(inception_weights)
    monkeypatch.setattr(library, "load_state_dict_from_url", lambda url, **kwargs: asked.append(url) or weights)
    InceptionV3Features()
    assert asked == [library.URL_INCEPTION_V3]
