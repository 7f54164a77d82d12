"""Save a pipeline for users without this package: a class of diffusers and the scheduler's source."""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from rectified_diffusers.checks import require_pipeline, require_plain_weights
from rectified_diffusers.loading.lora_checks import refuse_any_lora
from rectified_diffusers.loading.saving import save_pipeline
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler

PACKAGE = __name__.split(".")[0]
# The file in the folder `scheduler`, and the scheduler's library in the index: a file format. The name must differ
# from the libraries that diffusers loads from and from the folders of its pipelines.
SCHEDULER_MODULE = "rectified_flow_scheduler"


def save_portable(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Save a pipeline as a folder, or a repository for the Hub, that loads where this package is not installed.

    The folder names diffusers' own class, `StableDiffusionPipeline` for `RectifiedFlowPipeline`, and contains the
    source of our scheduler, which `trust_remote_code=True` lets diffusers run. Images are bit-identical. The example
    shows how to load and call it without this package.

    Pass the steps and the guidance: the stock class defaults to 50 steps at 7.5. To save such a pipeline again, copy
    the folder. With this package, `RectifiedFlowPipeline.from_pretrained(folder)` loads it like any other.

    Args:
        pipeline: one of ours that starts from noise (text to image, ControlNet), or one of diffusers with our
            scheduler. Pipelines that start from an image, and models of this package, need the package where they run.
        folder: created if it does not exist; an earlier save in it is replaced.

    Example:
        ```python
        save_portable(pipeline, "portable")
        image = DiffusionPipeline.from_pretrained("portable", trust_remote_code=True)(
            "a red apple", num_inference_steps=1, guidance_scale=1.0
        ).images[0]
        ```
    """
    folder = Path(folder)
    _check_components(pipeline)
    stock = _stock_class(type(pipeline))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be a folder or not exist yet, but {folder} is a file; choose another name.")
    save_pipeline(pipeline, folder)
    source = inspect.getsource(sys.modules[RectifiedFlowEulerScheduler.__module__])
    (folder / "scheduler" / f"{SCHEDULER_MODULE}.py").write_text(source, encoding="utf-8")
    # The index is written last: until then, the folder needs this package and loads with it.
    index_file = folder / DiffusionPipeline.config_name
    index = json.loads(index_file.read_text(encoding="utf-8"))
    index.pop("_name_or_path", None)  # its source on this machine
    index |= {"_class_name": stock.__name__, "scheduler": [SCHEDULER_MODULE, RectifiedFlowEulerScheduler.__name__]}
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_components(pipeline: DiffusionPipeline) -> None:
    """Check that each component can be loaded without this package."""
    require_pipeline("save_portable", pipeline, "components")
    components: dict[str, Any] = pipeline.components
    require_plain_weights("save_portable", components)
    scheduler = components.get("scheduler")
    if type(scheduler) is not RectifiedFlowEulerScheduler:
        raise ValueError(
            f"A portable save needs a RectifiedFlowEulerScheduler, got {type(scheduler).__name__}. Load a portable "
            "folder with RectifiedFlowPipeline.from_pretrained; use save_pretrained for a scheduler of diffusers."
        )
    for name, component in components.items():
        if name != "scheduler" and _library(type(component)) == PACKAGE:
            kind = type(component).__name__
            raise ValueError(f"{name} is a {kind}, which needs {PACKAGE} to load. Save it with save_pretrained.")
    refuse_any_lora(pipeline)


def _stock_class(pipeline_class: type[Any]) -> type[Any]:
    """Return the diffusers class that behaves like this one when it is given our scheduler."""
    stock = next(base for base in pipeline_class.__mro__ if _library(base) == "diffusers")
    adds_code = _library(pipeline_class) not in ("diffusers", PACKAGE)
    # Ours start from an image at t = 1 - strength. diffusers' skip the first steps of a full grid, which gives another
    # image, and in one step none.
    if adds_code or getattr(pipeline_class, "get_timesteps", None) is not getattr(stock, "get_timesteps", None):
        raise ValueError(
            f"{pipeline_class.__name__} has code of its own that {stock.__name__} of diffusers lacks. Save a class "
            "that starts from noise: save_portable(RectifiedFlowPipeline.from_pipe(pipeline), folder)."
        )
    return stock


def _library(kind: type[Any]) -> str:
    """Return the package that a class comes from."""
    return kind.__module__.split(".")[0]
