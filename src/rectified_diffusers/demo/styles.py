"""Apply LoRAs and weight deltas to one model, and remove them."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from rectified_diffusers.demo.requests import Style
from rectified_diffusers.loading.lora_checks import UNFIT, check_factor
from rectified_diffusers.loading.lora_file import is_lycoris
from rectified_diffusers.weights.delta import AppliedDelta, apply_weight_delta, load_weight_delta

MAX_LOADED = 8  # LoRAs that stay attached, active or not, so that moving a slider needs no loading
StyleKind = Literal["lora", "delta"]


def style_kind(path: Path) -> StyleKind:
    """Return whether a safetensors file is a LoRA or a weight delta, from its metadata and tensor names alone."""
    if path.suffix != ".safetensors":
        raise ValueError(
            f"A style is a .safetensors file, got {path.name!r}: other formats can run code when they are opened. "
            "Convert it to safetensors first."
        )
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a complete safetensors file ({error}). Download it again.") from error
    except OSError as error:
        raise ValueError(f"{path.name} can no longer be read ({error}). Upload it again.") from error
    if "rectified_diffusers" in metadata:
        return "delta"
    return "lora" if any("lora" in name for name in names) and not is_lycoris(names) else "delta"


class Styles:
    """The styles applied to a pipeline. Between two images, only the differences are changed.

    A LoRA is added in separate layers, so changing its scale is immediate. A delta is added to the weights themselves.
    Before it is added at another scale, it is removed bit for bit, which costs a pass over the U-Net and a copy of it.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._names = (f"style_{i}" for i in itertools.count())
        self._loras: dict[Path, str] = {}  # attached LoRAs and adapter names, least recently used first
        self._active: dict[Path, float] = {}
        self._deltas: dict[Path, float] = {}
        self._applied: AppliedDelta | None = None

    def apply(self, wanted: Sequence[Style]) -> None:
        """Apply these files at these scales and remove all others.

        Raises:
            ValueError: a file does not fit this model or is damaged. No style is then applied to the model.
        """
        loras, deltas = {}, {}
        for path, scale in wanted:
            if scale:
                is_lora = path in self._loras or (path not in self._deltas and style_kind(path) == "lora")
                (loras if is_lora else deltas)[path] = scale
        try:
            if deltas != self._deltas:
                self._change_deltas(deltas)
            if loras != self._active:
                self._change_loras(loras)
        except UNFIT as error:
            self.remove_all()
            names = ", ".join(path.name for path in (*deltas, *loras))
            raise ValueError(f"{names} cannot be applied to this model: {error}") from error

    def remove_all(self) -> None:
        """Restore the model to its loaded state and free the memory of the styles."""
        self._detach_loras()
        self._remove_deltas()

    def _change_deltas(self, deltas: dict[Path, float]) -> None:
        self._detach_loras()  # their layers rename the weights that a delta changes
        self._remove_deltas()
        if deltas:
            opened = [load_weight_delta(path) for path in deltas]
            self._applied = apply_weight_delta(self._pipeline, opened, list(deltas.values()))
            self._deltas = deltas

    def _change_loras(self, loras: dict[Path, float]) -> None:
        for path in loras:
            if path not in self._loras:
                self._attach(path)
            self._loras[path] = self._loras.pop(path)  # move to the end: most recently used
        while len(self._loras) > max(MAX_LOADED, len(loras)):
            oldest = next(iter(self._loras))
            self._pipeline.delete_adapters(self._loras.pop(oldest))
        if loras:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters([self._loras[path] for path in loras], list(loras.values()))
        elif self._loras:
            self._pipeline.disable_lora()
        self._active = loras

    def _attach(self, path: Path) -> None:
        name = next(self._names)
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                check_factor(key, file.get_tensor(key))  # only this package's pipelines check it themselves
        self._loras[path] = name  # first, so that a failure below is cleaned up too
        self._pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
        if not any(name in adapters for adapters in self._pipeline.get_list_adapters().values()):
            raise ValueError("none of its layers is in this model; it was made for another architecture")

    def _detach_loras(self) -> None:
        if self._loras:
            self._pipeline.unload_lora_weights()
        self._loras, self._active = {}, {}

    def _remove_deltas(self) -> None:
        if self._applied is not None:
            self._applied.take_back()
        self._applied, self._deltas = None, {}
