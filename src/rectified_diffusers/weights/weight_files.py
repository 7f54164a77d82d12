"""Stored weights: read and write safetensors files one tensor at a time.

safetensors checks a file, but its reader either maps the entire file, whose pages stay in memory, or parses the header
again for each tensor. Its writer needs all tensors at once. This module therefore reads and writes tensors itself, so
that memory holds only the tensors in use.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rectified_diffusers.checks import require_type
from rectified_diffusers.files import write_atomically
from rectified_diffusers.loading.errors import remedies
from rectified_diffusers.loading.lora_checks import refuse_lora

StorageDtype = Literal["float32", "float16", "bfloat16"]
WeightSource = str | Path | Mapping[str, Tensor]

_WEIGHTS_NAME = "diffusion_pytorch_model"  # of every diffusers model
# Names of the dtypes in the header of a safetensors file.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALPHAS = {**_DTYPES, "I64": torch.int64, "I32": torch.int32}  # of LoRA files
_CODES = {str(dtype).removeprefix("torch."): code for code, dtype in _DTYPES.items()}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_CONVERT_FOLDER = (
    "Convert it once, if you trust it: "
    "UNet2DConditionModel.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)"
)


@dataclass(frozen=True)
class StoredWeights:
    """Named floating-point tensors in files or in a state dict, read one at a time.

    Args:
        name: used in metadata and errors: the Hub id, or the last part of a path.
        shapes: shape of each tensor by name.
        metadata: the texts in the file; empty for a sharded model or a state dict.
        read: returns one tensor on the CPU, in its stored dtype. For a state dict, a tensor that is on the CPU is
            returned itself.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    read: Callable[[str], Tensor]


def open_weights(source: WeightSource, variant: str | None = None) -> StoredWeights:
    """Open the weights of a U-Net; for files, only the headers are read.

    Args:
        source: Hub id or folder of a pipeline or of its U-Net, a safetensors file, or a state dict.
        variant: part of the file name in a folder or on the Hub, as in `from_pretrained`.
    """
    require_type(
        "a source of weights", source, (str, Path, Mapping), "Give a file, a folder, a Hub id or a state dict."
    )
    if isinstance(source, Mapping):
        for key, tensor in source.items():
            require_type(f"the weight {key!r}", tensor, Tensor, "Give a model's state_dict().")
        weights = _open_state_dict(cast(Mapping[str, Tensor], source), variant)
    else:
        weights = _open_files(*_find(source, variant))
    if not weights.shapes:
        raise ValueError(f"{weights.name} holds no tensors; expected the weights of a U-Net.")
    refuse_lora(weights.shapes, weights.name)
    return weights


def check_same_shapes(
    got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], whose: str, whose_expected: str
) -> None:
    """Check that two models have weights of the same names and shapes; the error names the first that differs."""
    unknown, missing = sorted(got.keys() - expected.keys()), sorted(expected.keys() - got.keys())
    remedy = "They are of different architectures: use models that share one, such as fine-tunes of one base."
    if unknown or missing:
        kind, names = ("unknown to", unknown) if unknown else ("missing from", missing)
        where, other = (whose_expected, whose) if unknown else (whose, whose_expected)
        raise ValueError(
            f"{len(names)} of the weights of {other} are {kind} {where}, first: {names[0]!r}; expected "
            f"{len(expected)} weights, got {len(got)}. {remedy}"
        )
    for name in sorted(expected):
        if got[name] != expected[name]:
            raise ValueError(
                f"The shape of {name!r} differs: expected {expected[name]} as in {whose_expected}, got {got[name]} in "
                f"{whose}. {remedy}"
            )


def write_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: StorageDtype,
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file atomically, reading one tensor at a time with `read`."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    size, end = getattr(torch, dtype).itemsize, 0
    for name, shape in shapes.items():
        begin, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in shapes:
                file.write(read(name).reshape(-1).view(torch.uint8).numpy().data)

    write_atomically(path, write)


def _open_state_dict(tensors: Mapping[str, Tensor], variant: str | None) -> StoredWeights:
    if variant is not None:
        raise ValueError(f"variant={variant!r} names a file in a folder, but a state dict was given. Leave it out.")
    for key, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point() and not key.endswith(".alpha"):
            raise _no_floats("the state dict", key, str(tensor.dtype))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return StoredWeights("the state dict", shapes, {}, lambda key: tensors[key].detach().to("cpu"))


@dataclass(frozen=True)
class _Place:
    """Location of a tensor: a file, the offset of its first byte, and the dtype and shape of its bytes."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _open_files(name: str, files: Sequence[Path]) -> StoredWeights:
    places: dict[str, _Place] = {}
    metadata: dict[str, str] = {}
    for path in files:
        try:
            start, header = read_header(path)
        except SafetensorError as error:
            raise ValueError(
                f"{name}: {path.name} is not a complete safetensors file ({error}); it was cut, damaged "
                "or is something else. Download or make it again."
            ) from error
        metadata = header.pop("__metadata__", None) or {}  # null is valid and means none
        for key, entry in header.items():
            dtypes = _ALPHAS if key.endswith(".alpha") else _DTYPES
            if entry["dtype"] not in dtypes:
                raise _no_floats(name, key, entry["dtype"])
            offset = start + entry["data_offsets"][0]
            places[key] = _Place(path, offset, dtypes[entry["dtype"]], tuple(entry["shape"]))
    shapes = {key: place.shape for key, place in places.items()}
    return StoredWeights(name, shapes, metadata if len(files) == 1 else {}, lambda key: _read(places[key]))


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the position of the first tensor of a safetensors file, and its header.

    Raises:
        SafetensorError: the header, the positions in it or the length of the file are wrong.
    """
    with safe_open(path, framework="pt"):
        pass
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


def _read(place: _Place) -> Tensor:
    content = bytearray(place.dtype.itemsize * math.prod(place.shape))
    with place.path.open("rb") as file:
        file.seek(place.offset)
        count = file.readinto(content)
    if count != len(content):
        raise ValueError(
            f"{place.path.name} became shorter while it was read: expected {len(content)} bytes, got {count}."
        )
    if not content:
        return torch.empty(place.shape, dtype=place.dtype)
    return torch.frombuffer(content, dtype=place.dtype).reshape(place.shape)


def _no_floats(name: str, key: str, dtype: str) -> ValueError:
    floats = f"{name}: expected weights of 16 to 64 bits floating point, got {dtype} in {key!r}"
    return ValueError(f"{floats}. Use the model without quantization.")


def _find(source: str | Path, variant: str | None) -> tuple[str, Sequence[Path]]:
    """Return the name of a source and its safetensors files; several files are the shards of a model."""
    path = Path(source)
    is_hub_id = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not path.parent.is_dir()
    if is_hub_id and not path.exists():
        return str(source), _find_in_folder(_download(str(source), variant), str(source), variant)
    name = path.resolve().parent.name if path.name == "unet" else path.resolve().name
    if path.is_dir():
        return name, _find_in_folder(path, name, variant)
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{name} is a pickle, which runs code when it is opened; expected safetensors. {_CONVERT_FOLDER}; for a "
            "file of a pipeline, StableDiffusionPipeline.from_single_file(file).save_pretrained(new_folder)."
        )
    if not path.is_file():
        raise FileNotFoundError(f"No file, folder or Hub id {str(source)!r} with the weights of a U-Net.")
    if variant is not None:
        raise ValueError(f"variant={variant!r} names a file in a folder, but {name} is a file. Leave it out.")
    return name, [path]


def _file_names(variant: str | None) -> tuple[str, str]:
    """Return the name of the file in which diffusers saves a model's weights, and that of the index of its shards."""
    part = "" if variant is None else f".{variant}"
    return f"{_WEIGHTS_NAME}{part}.safetensors", f"{_WEIGHTS_NAME}.safetensors.index{part}.json"


def _download(hub_id: str, variant: str | None) -> Path:
    """Download only the U-Net's weights, from its own repository or a pipeline's, or find them in the cache."""
    single, index = _file_names(variant)
    shards = single.replace(".safetensors", "-*-of-*.safetensors")
    patterns = [folder + name for folder in ("", "unet/") for name in (single, index, shards)]
    with remedies(hub_id):
        return Path(snapshot_download(hub_id, allow_patterns=patterns))


def _find_in_folder(folder: Path, name: str, variant: str | None) -> Sequence[Path]:
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    single, index = (folder / file for file in _file_names(variant))
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards_of(index, name)
    here = sorted(path.name for path in folder.glob(f"{_WEIGHTS_NAME}*"))
    remedy = "Give the folder of a pipeline or of its U-Net, and `variant` if the file name has one"
    if here and all(file.endswith(_PICKLES) for file in here):
        remedy = _CONVERT_FOLDER
    got = ", ".join(here) or "none"
    raise FileNotFoundError(f"{name}: expected {single.name} or {index.name}, got {got}. {remedy}.")


def _shards_of(index: Path, name: str) -> list[Path]:
    """Return the files that an index lists; each must exist in the same folder as the index."""
    try:
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{name}: {index.name} is no index of shards, with their names under weight_map "
            f"({type(error).__name__}). Download it again."
        ) from error
    for shard in sorted(listed, key=str):
        if not isinstance(shard, str) or Path(shard).name != shard or not (index.parent / shard).is_file():
            raise FileNotFoundError(
                f"{name}: expected the shard {shard!r} that {index.name} lists, got none. Download it again."
            )
    return [index.parent / shard for shard in sorted(listed)]
