"""Export a rectified flow as a pipeline that stock diffusers runs with its own solvers."""

import copy
import inspect
from pathlib import Path
from typing import Any, Literal

from diffusers import (
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from rectified_diffusers.checks import require_count, require_pipeline, require_plain_weights
from rectified_diffusers.loading.lora import refuse_any_lora
from rectified_diffusers.loading.saving import save_pipeline
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler, require_straight

StockScheduler = Literal["dpm_solver++", "unipc"]
_SCHEDULERS = {"dpm_solver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}


def export_diffusers(
    pipeline: Any, output_dir: str | Path, scheduler: StockScheduler = "unipc", solver_order: int = 2
) -> None:
    """Save a pipeline that stock diffusers loads and runs, by folding the sign of the velocity into the U-Net.

    Stock flow schedulers expect noise - data, but our models predict data - noise. Therefore the weight and bias of
    `conv_out` are negated, which is exact. The saved pipeline is the stock text-to-image class,
    StableDiffusionPipeline or its XL version, with DPM-Solver++ or UniPC on flow sigmas; `from_pipe` of other stock
    classes works from there. The given pipeline is not changed. Note three limits:

    - The U-Net is evaluated at integer timesteps, at 999 where ours uses 1000, also in one step. DPM-Solver++, and
      UniPC before diffusers 0.37, also treat the noise as the state at t = 0.001.
    - The stock class defaults to 50 steps at guidance 7.5; pass `num_inference_steps` and `guidance_scale`.
    - Anything with the sign of the original U-Net, such as a LoRA or a weight delta on `conv_out`, has the wrong sign
      here. Our own pipelines need `scheduler=RectifiedFlowEulerScheduler(velocity_direction="noise")`.

    Args:
        pipeline: a diffusers pipeline with a RectifiedFlowEulerScheduler and a UNet2DConditionModel.
        scheduler: the stock solver that the folder names. FlowMatchEulerDiscreteScheduler is not possible: the Stable
            Diffusion pipelines need an init_noise_sigma, which it does not have.
        solver_order: 1 is the Euler method; 2 is better from a few steps on, and the same as 1 in one step.

    Example:
        ```python
        export_diffusers(pipeline, "stock")
        stock = StableDiffusionPipeline.from_pretrained("stock")
        image = stock("a red apple", num_inference_steps=1, guidance_scale=1.0).images[0]
        ```
    """
    require_pipeline("export_diffusers", pipeline, "unet", "scheduler", "components")
    require_count("solver_order", solver_order)
    solver = _stock_solver(pipeline.scheduler, scheduler, solver_order)
    if type(pipeline.unet) is not UNet2DConditionModel:
        raise ValueError(f"stock pipelines need a UNet2DConditionModel, got {type(pipeline.unet).__name__}.")
    refuse_any_lora(pipeline)
    require_plain_weights("export_diffusers", pipeline.components)
    stock = StableDiffusionXLPipeline if hasattr(pipeline, "text_encoder_2") else StableDiffusionPipeline
    names = inspect.signature(stock.__init__).parameters
    beyond = [name for name, part in pipeline.components.items() if part is not None and name not in names]
    if beyond:
        raise ValueError(
            f"a {stock.__name__} has no {', '.join(beyond)}; export {stock.__name__}.from_pipe(pipeline, "
            f"scheduler=pipeline.scheduler), and save the {', '.join(beyond)} separately."
        )
    parts = {name: pipeline.config[name] for name in names if name in pipeline.config}
    parts |= {name: part for name, part in pipeline.components.items() if name in names}
    if pipeline.scheduler.config["velocity_direction"] == "data":
        parts["unet"] = fold_sign(pipeline.unet)
    save_pipeline(stock(**{**parts, "scheduler": solver}), output_dir)


def _stock_solver(ours: Any, scheduler: StockScheduler, solver_order: int) -> SchedulerMixin:
    """Return the stock scheduler that integrates from noise to data as ours does."""
    if not isinstance(ours, RectifiedFlowEulerScheduler):
        raise ValueError(
            "export_diffusers needs a rectified flow with a RectifiedFlowEulerScheduler, got "
            f"{type(ours).__name__}. A stock pipeline needs no export: use its save_pretrained."
        )
    require_straight(ours, "export_diffusers")
    if scheduler not in _SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(_SCHEDULERS)}, got {scheduler!r}.")
    return _SCHEDULERS[scheduler](
        num_train_timesteps=ours.config["num_train_timesteps"],
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=ours.config["shift"],
        solver_order=solver_order,
        steps_offset=1,  # no effect on a flow; without it the pipeline warns about an outdated config
    )


def fold_sign(unet: Any) -> Any:
    """Return a view of a U-Net that predicts the negative: `conv_out` is a negated copy, the rest is shared."""
    conv_out = copy.deepcopy(unet.conv_out)
    for parameter in conv_out.parameters():
        parameter.data.neg_()
    view = copy.copy(unet)
    view.__dict__["_modules"] = {**unet._modules, "conv_out": conv_out}
    return view
