"""Rectified flow for diffusers: text-to-image generation in one step.

Public names are loaded on first use: importing this package imports neither torch nor diffusers. It registers our
classes with diffusers once that is imported (see `registration`; RECTIFIED_DIFFUSERS_REGISTER=0 disables this).
"""

import importlib
from pathlib import Path
from typing import Any

import lazy_loader

from rectified_diffusers.pipelines.registration import register as register
from rectified_diffusers.pipelines.registration import register_unless_disabled

__version__ = "0.2.0"

_load, _, _lazy_names = lazy_loader.attach_stub(__name__, __file__)

# diffusers' own, because a saved pipeline names this package: the loader looks up a component's base class in it.
_OF_DIFFUSERS = ("ModelMixin", "SchedulerMixin")

__all__ = sorted({*_lazy_names, *_OF_DIFFUSERS, "__version__", "bundled_checkpoint", "register"})  # pyright: ignore


def bundled_checkpoint() -> Path:
    """Return the folder of the one-step emoji model that comes with the package, for `from_pretrained`."""
    folder = Path(__file__).parent / "assets" / "emoji-one-step"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"The bundled checkpoint is not in {folder}. It is part of the wheel: reinstall rectified_diffusers, or "
            "make it with the commands of examples/emoji."
        )
    return folder


def __getattr__(name: str) -> Any:
    if name in _OF_DIFFUSERS:
        return getattr(importlib.import_module("diffusers"), name)
    if name not in _lazy_names:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}.")
    return _load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_unless_disabled()
