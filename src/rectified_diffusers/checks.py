"""Checks of arguments that Python and torch would accept silently or refuse without a helpful message.

Each error says what was expected, what was received and what to do: a `TypeError` for a value of another type, a
`ValueError` for one out of range. Imports no torch; a tensor is recognized by its attributes.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")


class UnsupportedPipelineError(TypeError):
    """A pipeline that cannot be used. The message is one sentence that says why."""


def require_type(name: str, value: Any, expected: type | tuple[type, ...], remedy: str) -> None:
    """Raise unless `value` is an instance of `expected`."""
    if not isinstance(value, expected):
        kinds = expected if isinstance(expected, tuple) else (expected,)
        words = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} must be of type {words}, got {_shown(value)}. {remedy}")


def require_one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise unless `value` is one of the known names."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")


def require_count(name: str, value: Any, at_least: int = 1) -> None:
    """Raise unless `value` is a whole number of at least `at_least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number of at least {at_least}, got {_shown(value)}. Pass an int.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}.")


def require_number(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> None:
    """Raise unless `value` is a finite number in [low, high]."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {_shown(value)}. Pass a float.")
    if not (low <= value <= high and math.isfinite(value)):
        bounds = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a finite number {bounds}, got {value}.")


def require_texts(name: str, value: str | Sequence[str]) -> None:
    """Raise unless `value` is a text, or a list of at least one text."""
    if isinstance(value, str):
        return
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} must be a text or a list of texts, got {_shown(value)}. Pass one for each image.")
    if not value:
        raise ValueError(f"{name} must hold at least one text, got none. Pass '' for the unconditional model.")


def require_unicode(name: str, value: Any) -> None:
    """Raise if a text, or one of a list of texts, has half of a surrogate pair, which no tokenizer accepts."""
    for text in [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []:
        if isinstance(text, str) and not text.isascii() and _SURROGATE.search(text):
            raise ValueError(f"{name}: expected Unicode text, got half of a surrogate pair: {text[:80]!a}. Remove it.")


def require_finite(name: str, value: Any) -> None:
    """Raise unless `value` is a floating-point tensor without NaN and infinity."""
    if not hasattr(value, "is_floating_point"):
        raise TypeError(f"{name} must be a tensor, got {_shown(value)}. Make one with torch.as_tensor or torch.stack.")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be in floating point, got {value.dtype}. Convert it with .float().")
    if not bool(value.isfinite().all()):
        shape = tuple(value.shape)
        raise ValueError(f"{name} must be finite, got NaN or infinity in {shape} {value.dtype}. Find their origin.")


def require_latents(name: str, value: Any, channels: int | None = None) -> None:
    """Raise unless `value` is a batch of floating-point latents `(B, C, H, W)`, B at least 1, all finite."""
    require_finite(name, value)
    shape = tuple(value.shape)
    wanted = f"(B, {'C' if channels is None else channels}, H, W)"
    if value.ndim != 4 or 0 in shape or (channels is not None and shape[1] != channels):
        raise ValueError(f"{name} must be {wanted} with B at least 1, got {shape}. Encode images with this VAE.")


def require_pipeline(function: str, pipeline: Any, *parts: str) -> None:
    """Raise unless `pipeline` has the named parts, such as "unet", and none of them is missing."""
    missing = [part for part in parts if getattr(pipeline, part, None) is None]
    if missing:
        raise UnsupportedPipelineError(
            f"{function} needs a diffusers pipeline with {', '.join(parts)}, got {type(pipeline).__name__} without "
            f"{', '.join(missing)}. Load one with RectifiedFlowPipeline.from_pretrained(folder)."
        )


def require_plain_weights(function: str, models: Mapping[str, Any]) -> None:
    """Raise if a model is quantized or cast layer by layer: its weights are not those that it computes with."""
    for name, model in models.items():
        for module in model.modules() if hasattr(model, "modules") else ():
            if getattr(module, "weight_qtype", None) is not None:  # of quanto, also before freeze()
                raise ValueError(
                    f"{function} needs plain weights of 16 bits or more, got {type(module).__name__} in the {name}. "
                    "Load it without quantization."
                )
        for parameter in model.parameters() if hasattr(model, "parameters") else ():
            # Quantized weights are subclasses: of Parameter (bitsandbytes, GGUF) or of Tensor (torchao, quanto).
            if type(parameter).__name__ != "Parameter" or not parameter.is_floating_point() or parameter.itemsize < 2:
                raise ValueError(
                    f"{function} needs plain weights of 16 bits or more, got {type(parameter).__name__} in "
                    f"{parameter.dtype} in the {name}. Load it without quantization and layerwise casting."
                )


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} of type {type(value).__name__}"
