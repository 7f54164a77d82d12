"""Save a pipeline for users without this package: a class of diffusers and the scheduler's source."""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from rectified_diffusers.checks import require_pipeline, require_plain_weights
from rectified_diffusers.loading.saving import save_pipeline
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler

PACKAGE = __name__.split(".")[0]
# The file in the folder `scheduler`, and the scheduler's library in the index: a file format. The name must differ
# from the libraries that diffusers loads from and from the folders of its pipelines.
SCHEDULER_MODULE = "rectified_flow_scheduler"


def save_portable(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Save a pipeline as a folder, or a repository for the Hub, that loads where this package is not installed.

    The folder names diffusers' own class, `StableDiffusionPipeline` for `RectifiedFlowPipeline`, and contains the
    source of our scheduler next to its settings. Images are bit-identical. The example shows how to load and call it
    without this package.

    `trust_remote_code=True` lets diffusers run the scheduler's source. Pass the steps and the guidance: the stock
    class defaults to 50 steps at 7.5. To save such a pipeline again, copy the folder: `save_pretrained` omits the
    source.

    With this package, `RectifiedFlowPipeline.from_pretrained(folder)` loads the folder like any other: no trust
    needed, our defaults, our scheduler.

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
            f"A portable save ships the source of RectifiedFlowEulerScheduler, but the pipeline's scheduler is "
            f"{type(scheduler).__name__}. For a scheduler of diffusers, use save_pretrained; to save a portable "
            "folder again, load it with RectifiedFlowPipeline.from_pretrained."
        )
    for name, component in components.items():
        if name != "scheduler" and _library(type(component)) == PACKAGE:
            raise ValueError(
                f"{name} is a {type(component).__name__}, a model of {PACKAGE} that does not load without it. "
                "Save the pipeline with save_pretrained, for people who have the package."
            )
        if getattr(component, "peft_config", None):
            raise ValueError(
                f"{name} has a LoRA attached ({', '.join(component.peft_config)}), with which a saved model cannot be "
                "loaded. Call pipeline.fuse_lora() to keep it, then pipeline.unload_lora_weights(), and save again."
            )


def _stock_class(pipeline_class: type[Any]) -> type[Any]:
    """Return the diffusers class that behaves like this one when it is given our scheduler."""
    stock = next(base for base in pipeline_class.__mro__ if _library(base) == "diffusers")
    adds_code = _library(pipeline_class) not in ("diffusers", PACKAGE)
    # Ours start from an image at t = 1 - strength. diffusers' skip the first steps of a full grid, which gives another
    # image, and in one step none.
    if adds_code or getattr(pipeline_class, "get_timesteps", None) is not getattr(stock, "get_timesteps", None):
        raise ValueError(
            f"{pipeline_class.__name__} has code of its own that {stock.__name__} of diffusers lacks, so without it "
            "the images would differ. Save the same components by a class that starts from noise: "
            "save_portable(RectifiedFlowPipeline.from_pipe(pipeline), folder)."
        )
    return stock


def _library(kind: type[Any]) -> str:
    """Return the package that a class comes from."""
    return kind.__module__.split(".")[0]
