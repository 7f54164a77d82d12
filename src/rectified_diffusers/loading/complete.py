"""Refuse models of which weights are missing or left over, where diffusers and transformers only warn.

Both libraries fill missing weights with random numbers and ignore those that they do not know; both can say which, to
who asks `from_pretrained` for `output_loading_info`. A pipeline loads its parts by itself and does not ask, so for the
time of a load of ours `from_pretrained` of their base classes asks.
"""

import functools
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

# Numbers of positions, which older releases of transformers saved with CLIP models; not weights.
_NOT_WEIGHTS = re.compile(r"(^|\.)position_ids$")
# The libraries' warnings of what is an error here.
_REPORT = re.compile("LOAD REPORT|Some weights of|TRAIN this model")
# the libraries' warnings of what is an error here
_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
_active: ContextVar[bool] = ContextVar("complete_components", default=False)


@contextmanager
def complete_components() -> Iterator[None]:
    """Let every model that `from_pretrained` loads inside, in this thread, be complete or an error.

    Raises:
        ValueError: weights of a model are missing or unexpected, or its folder holds an adapter's config, by which
            transformers would load another model in its place.
    """
    _install()
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


@functools.cache
def _install() -> None:
    for base in (ModelMixin, PreTrainedModel):
        load: Any = base.from_pretrained
        setattr(base, load.__name__, classmethod(_checked(load.__func__)))
        logging.getLogger(base.__module__).addFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return not (_active.get() and _REPORT.search(record.getMessage()))


def _checked(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `from_pretrained` of a base class; outside of `complete_components` it does what it did."""

    @functools.wraps(load)
    def from_pretrained(cls: type[Any], source: Any, *args: Any, **options: Any) -> Any:
        if not _active.get() or source is None or options.get("output_loading_info"):
            return load(cls, source, *args, **options)
        name = options.get("subfolder") or Path(str(source)).name
        if issubclass(cls, PreTrainedModel):
            _refuse_adapter(name, source, options)
        model, info = load(cls, source, *args, output_loading_info=True, **options)
        _require_complete(name, type(model), info)
        return model

    return from_pretrained


def _require_complete(name: str, model_class: type[Any], info: dict[str, Any]) -> None:
    for kind, keys in (("missing", info["missing_keys"]), ("unexpected", info["unexpected_keys"])):
        keys = sorted(key for key in keys if not _NOT_WEIGHTS.search(key))
        if keys:
            raise ValueError(
                f"{name}: {len(keys)} weights are {kind}, the first {keys[0]!r}, so this is no complete "
                f"{model_class.__name__} as this release of its library names the weights. Download or save it again; "
                f"to use it all the same, load the {name} by its own class and pass it to from_pretrained."
            )


def require_weights(pipeline: Any, source: Any) -> None:
    """Raise a ValueError if a part of a pipeline has weights that were not in the file it was loaded from."""
    for name, part in pipeline.components.items():
        weights = part.named_parameters() if isinstance(part, Module) else ()
        if missing := [key for key, weight in weights if weight.is_meta]:
            raise ValueError(
                f"{source} lacks {len(missing)} weights of the {name}, the first {missing[0]!r}. Download it again, "
                f"or load the {name} by its own class and pass it to from_single_file."
            )


def _refuse_adapter(name: str, source: Any, options: dict[str, Any]) -> None:
    hub = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
    if find_adapter_config_file(source, **hub) is not None:
        raise ValueError(
            f"{name} holds an adapter_config.json, by which transformers would load an adapter and the model that it "
            "names, expected plain weights. Remove the file, and load the adapter by load_lora_weights."
        )
