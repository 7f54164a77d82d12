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
from torch import nn

from rectified_diffusers.checks import require_count, require_one_of, require_pipeline, require_plain_weights
from rectified_diffusers.loading.lora_checks import refuse_any_lora
from rectified_diffusers.loading.saving import save_pipeline
from rectified_diffusers.pipelines.scheduler import FLOW_TIMESTEPS, RectifiedFlowEulerScheduler, require_straight

StockScheduler = Literal["dpm_solver++", "unipc"]
_SCHEDULERS = {"dpm_solver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}


def export_diffusers(
    pipeline: Any, output_dir: str | Path, scheduler: StockScheduler = "unipc", solver_order: int = 1
) -> None:
    """Save a pipeline that stock diffusers loads and runs, by folding the sign of the velocity into the U-Net.

    Stock flow schedulers expect noise - data, but our models predict data - noise. Therefore the weight and bias of
    `conv_out` are negated, which is exact. The saved pipeline is the stock text-to-image class,
    StableDiffusionPipeline or its XL version, with UniPC or DPM-Solver++ on flow sigmas; `from_pipe` of other stock
    classes works from there. The given pipeline is not changed. Its images are those of our Euler steps, but for three
    roundings of the stock solvers: timesteps are integers, the grid ends at t = 0.999 before the last step, and
    DPM-Solver++ also begins there. Note two limits:

    - The stock class defaults to 50 steps at guidance 7.5; pass `num_inference_steps` and `guidance_scale`.
    - Anything with the sign of the original U-Net, such as a LoRA or a weight delta on `conv_out`, has the wrong sign
      here. Our own pipelines need `scheduler=RectifiedFlowEulerScheduler(velocity_direction="noise")`.

    Args:
        pipeline: a diffusers pipeline with a RectifiedFlowEulerScheduler and a UNet2DConditionModel.
        scheduler: the stock solver that the folder names. FlowMatchEulerDiscreteScheduler is not possible: the Stable
            Diffusion pipelines need an init_noise_sigma, which it does not have.
        solver_order: 1 is the Euler method, as in our pipelines. 2 follows a curved flow more closely with the same
            number of steps, and is the same as 1 in one step. A distilled model needs 1: its velocity is trained at
            t = 0 alone, so that what order 2 extrapolates from it is wrong.

    Example:
        ```python
        export_diffusers(pipeline, "stock")
        stock = StableDiffusionPipeline.from_pretrained("stock")
        image = stock("a red apple", num_inference_steps=1, guidance_scale=1.0).images[0]
        ```
    """
    require_pipeline("export_diffusers", pipeline, "unet", "scheduler", "components")
    require_count("solver_order", solver_order)
    if not isinstance(pipeline.scheduler, RectifiedFlowEulerScheduler):
        raise ValueError(
            "export_diffusers needs a rectified flow with a RectifiedFlowEulerScheduler, got "
            f"{type(pipeline.scheduler).__name__}. A stock pipeline needs no export: use its save_pretrained."
        )
    require_straight(pipeline.scheduler, "export_diffusers")
    require_one_of("scheduler", scheduler, _SCHEDULERS)
    solver = stock_solver(pipeline.scheduler, scheduler, solver_order)
    if type(pipeline.unet) is not UNet2DConditionModel:
        raise ValueError(f"stock pipelines need a UNet2DConditionModel, got {type(pipeline.unet).__name__}.")
    refuse_any_lora(pipeline)
    require_plain_weights("export_diffusers", pipeline.components)
    stock = StableDiffusionXLPipeline if hasattr(pipeline, "text_encoder_2") else StableDiffusionPipeline
    names = inspect.signature(stock.__init__).parameters
    beyond = [name for name, part in pipeline.components.items() if part is not None and name not in names]
    if beyond:
        text = f"a {stock.__name__} has no {', '.join(beyond)}, which are saved separately. Export"
        raise ValueError(f"{text} {stock.__name__}.from_pipe(pipeline, scheduler=pipeline.scheduler).")
    parts = {name: pipeline.config[name] for name in names if name in pipeline.config}
    parts |= {name: part for name, part in pipeline.components.items() if name in names}
    if pipeline.scheduler.config["velocity_direction"] == "data":
        parts["unet"] = fold_sign(pipeline.unet)
    save_pipeline(stock(**{**parts, "scheduler": solver}), output_dir)


def stock_solver(ours: RectifiedFlowEulerScheduler, scheduler: StockScheduler, solver_order: int) -> SchedulerMixin:
    """Return the stock scheduler that integrates from noise to data as ours does."""
    count = ours.config["num_train_timesteps"]
    # UniPC corrects each state by the next velocity. The Euler method does not, and where a velocity depends on t, as
    # a distilled one does, the correction changes the image more than the second order.
    uncorrected = {"disable_corrector": list(range(count))} if scheduler == "unipc" and solver_order == 1 else {}
    solver = _SCHEDULERS[scheduler](
        # A stock solver evaluates the network at `num_train_timesteps` less a rounding error, truncated to an integer:
        # with `count`, noise would be at 999 instead of 1000, the only timestep that a distilled model knows.
        num_train_timesteps=count + 1,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=ours.config["shift"],
        solver_order=solver_order,
        steps_offset=1,  # no effect on a flow; without it the pipeline warns about an outdated config
        **uncorrected,
    )
    solver.register_to_config(**{FLOW_TIMESTEPS: count})
    return solver


def fold_sign(unet: Any) -> Any:
    """Return a view of a U-Net that predicts the negative: `conv_out` is a negated copy, the rest is shared."""
    conv_out = copy.copy(unet.conv_out)
    for attribute in ("forward", "_diffusers_hook"):  # of offloading, which compute with the original's weights
        conv_out.__dict__.pop(attribute, None)
    negated = {name: nn.Parameter(-parameter.detach(), False) for name, parameter in conv_out.named_parameters()}
    conv_out.__dict__["_parameters"] = negated
    view = copy.copy(unet)
    view.__dict__["_modules"] = {**unet._modules, "conv_out": conv_out}
    return view
