"""Refuse models with missing or unexpected weights, where diffusers and transformers only warn.

Both libraries fill missing weights with random numbers and ignore unknown ones. Both report which when
`from_pretrained` is called with `output_loading_info`. A pipeline loads its components itself and does not pass this
option. Therefore, while one of our loaders runs, `from_pretrained` of their base classes passes it.
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

# Position indices that older releases of transformers saved with CLIP models; not weights.
_NOT_WEIGHTS = re.compile(r"(^|\.)position_ids$")
# The warnings of the libraries about conditions that are errors here.
_REPORT = re.compile("LOAD REPORT|Some weights of|TRAIN this model")
# Options of `from_pretrained` that locate a file on the Hub.
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
_active: ContextVar[bool] = ContextVar("complete_components", default=False)


@contextmanager
def complete_components() -> Iterator[None]:
    """Raise a ValueError for every incomplete model that `from_pretrained` loads inside this context, in this thread.

    It also refuses a folder with an adapter's config, for which transformers would load another model.
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
    """Wrap `from_pretrained` of a base class; outside of `complete_components` its behavior is unchanged."""

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
                f"{name}: {len(keys)} weights are {kind}, the first {keys[0]!r}, expected a complete "
                f"{model_class.__name__}. Download or save it again, or load the {name} by its own class and pass it "
                "to from_pretrained."
            )


def require_weights(pipeline: Any, source: Any) -> None:
    """Raise a ValueError if a component of a pipeline has weights that were not in the file it was loaded from."""
    for name, part in pipeline.components.items():
        weights = part.named_parameters() if isinstance(part, Module) else ()
        if missing := [key for key, weight in weights if weight.is_meta]:
            raise ValueError(
                f"{source} lacks {len(missing)} weights of the {name}, the first {missing[0]!r}. Download it again, "
                f"or load the {name} by its own class and pass it to from_single_file."
            )


def _refuse_adapter(name: str, source: Any, options: dict[str, Any]) -> None:
    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    if find_adapter_config_file(source, **hub) is not None:
        raise ValueError(
            f"{name} contains an adapter_config.json, with which transformers loads another model. Remove the file, "
            "and load the adapter by load_lora_weights."
        )
