"""Replace attributes temporarily; keep freed memory; convert images to PIL on the device.

A replacement belongs to one object. Copies and pickles of that object get the stock method, bound to themselves.
"""

import ctypes
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rectified_diffusers.images import require_finite_images

_ABSENT = object()


class Replacement:
    """A function in place of a method of `owner`."""

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.owner, self.name, self.__wrapped__ = owner, name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(type(self.owner), self.name).__get__(memo.get(id(self.owner), self.owner))

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)  # of the copy, which has no attributes of its own yet


class Hook:
    """A hook of one module; in its copies and pickles, `in_copies` takes its place, a function of a module."""

    def __init__(self, function: Callable[..., Any], in_copies: Callable[..., Any] | None = None) -> None:
        self.function, self.in_copies = function, in_copies or ignore

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.in_copies

    def __reduce__(self) -> Any:
        return _same, (self.in_copies,)


def ignore(*_: Any) -> None:
    """Do nothing."""


def _same(value: Any) -> Any:
    return value


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Shadow `owner.name` with an instance attribute; restore the previous state on exit."""
    before = vars(owner).get(name, _ABSENT)
    value = Replacement(owner, name, value) if callable(value) else value
    object.__setattr__(owner, name, value)  # bypasses registration as a pipeline's component or a module's submodule
    try:
        yield
    finally:
        if before is _ABSENT:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)


# From <malloc.h>: the size of free memory at the heap's end above which it is returned, and how many blocks may be
# requested from the system individually. Below are their defaults, which are restored on exit.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_TRIM, _DEFAULT_MMAPS = 128 * 1024, 65536


def can_keep_memory() -> bool:
    """Return whether the C library is glibc, which these settings belong to."""
    return platform.libc_ver()[0] == "glibc"


@contextmanager
def kept_memory() -> Iterator[None]:
    """Make the process keep freed memory: this affects the entire process, and only with glibc."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _DEFAULT_MMAPS)
        libc.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM)
        libc.malloc_trim(0)


def to_images(images: Tensor) -> list[Image.Image]:
    """Convert `(B, 3, H, W)` in [-1, 1] to images; in float32 the bytes equal those of diffusers' image processor."""
    require_finite_images(images)
    levels = ((images.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


@contextmanager
def images_on_device(pipeline: Any) -> Iterator[None]:
    """Convert images to bytes on the device before the transfer: a quarter of the data, and no arithmetic in numpy."""
    processor = pipeline.image_processor
    stock = processor.postprocess

    def postprocess(
        image: Any, output_type: str = "pil", do_denormalize: Sequence[bool] | None = None, **kwargs: Any
    ) -> Any:
        scales = processor.config.do_normalize if do_denormalize is None else all(do_denormalize)
        is_rgb = isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == 3
        if output_type == "pil" and scales and is_rgb and not kwargs:
            return to_images(image)
        return stock(image, output_type, do_denormalize, **kwargs)

    with replaced(processor, "postprocess", postprocess):
        yield
