"""A studio that is still being set up, so that the page can be opened while the model is loaded. Free of torch."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeAlias

from rectified_diffusers.demo.answers import Comparison

if TYPE_CHECKING:
    from rectified_diffusers.demo.studio import Studio


class ComingStudio:
    """Stands for a `Studio`: tells at once what the page shows of it; whoever asks for more waits until it is there.

    Args:
        name: of the model.
        comparison: what is drawn beside it.
        studio: the studio to be; if it fails, its error is everyone's who waits.
        can_sketch: whether it has a ControlNet.
    """

    def __init__(self, name: str, comparison: Comparison, studio: Future[Studio], *, can_sketch: bool) -> None:
        self.name = name
        self.comparison = comparison
        self.can_sketch = can_sketch
        self._studio = studio

    def about(self) -> str:
        return self._studio.result().about() if self._studio.done() else f"{self.name} · is being loaded"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self._studio.result(), name)


AnyStudio: TypeAlias = "Studio | ComingStudio"
