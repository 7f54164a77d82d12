"""The features of the FID: Inception-v3 as torch-fidelity has it, whose weights are those of the published figures."""

from pathlib import Path
from unittest.mock import patch
from urllib.error import URLError

import torch
from torch import Tensor, nn


class InceptionV3Features(nn.Module):
    """The 2,048 pooled features of the Inception-v3 that the FID (arXiv:1706.08500) is defined by.

    The network, its resize to 299 pixels and its preprocessing are torch-fidelity's, which follow the TensorFlow graph
    of the original.

    Args:
        weights: safetensors file in the layout of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, which
            is that of pytorch-fid too. None: torch-fidelity downloads it.
    """

    dimensions = 2048

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as library
        except ImportError as error:
            raise ImportError("InceptionV3Features needs torch-fidelity: pip install torch-fidelity") from error
        if weights is None:
            try:
                self.network = library.FeatureExtractorInceptionV3("inception-v3", ["2048"])
            except URLError as error:
                raise OSError(
                    f"The weights of Inception-v3 cannot be downloaded ({error}). Where there is a network, fetch "
                    f"{library.URL_INCEPTION_V3} and write safetensors.torch.save_file(torch.load(path, "
                    "weights_only=True), 'inception.safetensors'); then give inception_weights "
                    "(--inception-weights inception.safetensors)."
                ) from error
        else:
            tensors = _read(Path(weights))
            # A file that torch-fidelity is given it unpickles without restriction: hand it the tensors in the place
            # of those it would download instead.
            with patch.object(library, "load_state_dict_from_url", lambda *args, **kwargs: tensors):
                self.network = library.FeatureExtractorInceptionV3("inception-v3", ["2048"])
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, 2048)` float32 of images `(B, 3, H, W)` uint8, on the CPU or wherever the module is."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}.")
        return self.network(images.to(next(self.network.parameters()).device))[0]


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"no Inception-v3 weights at {path}: expected a safetensors file.")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"Inception-v3 weights must be a .safetensors file, got {path}. Convert a .pth file with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'inception.safetensors')."
        )
    tensors = load_file(path)
    if "Mixed_7c.branch_pool.conv.weight" not in tensors:
        raise ValueError(
            f"{path} has not the layout of torch-fidelity's Inception-v3: it lacks "
            f"'Mixed_7c.branch_pool.conv.weight', it has {sorted(tensors)[:3]}."
        )
    return tensors
