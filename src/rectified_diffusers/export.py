"""The model for programs that do not know this package: ONNX graphs, a stock pipeline, the U-Net in one file."""

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from rectified_diffusers.arguments import require_count, require_pipeline
from rectified_diffusers.saving import make_readable, save_pipeline
from rectified_diffusers.schedulers import RectifiedFlowEulerScheduler
from rectified_diffusers.weights.lora import refuse_lora
from rectified_diffusers.weights.original_layout import original_unet_layout

StockScheduler = Literal["dpm_solver++", "unipc"]
UNetFormat = Literal["comfyui", "ldm"]
_SCHEDULERS = {"dpm_solver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
OPSET = 17


def export_diffusers(
    pipeline: Any, output_dir: str | Path, scheduler: StockScheduler = "unipc", solver_order: int = 2
) -> None:
    """Save a pipeline that stock diffusers loads and runs, by folding the sign of the velocity into the U-Net.

    Stock flow schedulers want noise - data where our models predict data - noise, so the weight and bias of `conv_out`
    are negated, which is exact. Saved is the stock text-to-image class, StableDiffusionPipeline or its XL, with
    DPM-Solver++ or UniPC on flow sigmas; `from_pipe` of other stock classes works from there. The pipeline that is
    passed is left as it is. Mind three things:

    - The U-Net is asked at whole timesteps, at 999 where ours asks at 1000, in one step too. DPM-Solver++, and UniPC
      before diffusers 0.37, also take the noise for the state at t = 0.001.
    - The stock class defaults to 50 steps at guidance 7.5; say `num_inference_steps` and `guidance_scale`.
    - What has the sign of the original U-Net, a LoRA or a weight delta on `conv_out`, has the wrong one here, and our
      own pipelines must be told: `scheduler=RectifiedFlowEulerScheduler(velocity_direction="noise")`.

    Args:
        pipeline: a diffusers pipeline with a RectifiedFlowEulerScheduler and a UNet2DConditionModel.
        scheduler: the stock solver that the folder names. FlowMatchEulerDiscreteScheduler cannot be: the Stable
            Diffusion pipelines need an init_noise_sigma, which it does not have.
        solver_order: 1 is the Euler method; 2 is better from a few steps on, and the same as 1 in one step.
    """
    require_pipeline("export_diffusers", pipeline, "unet", "scheduler", "components")
    require_count("solver_order", solver_order)
    solver = _stock_solver(pipeline.scheduler, scheduler, solver_order)
    if type(pipeline.unet) is not UNet2DConditionModel:
        raise ValueError(f"stock pipelines run a UNet2DConditionModel, and this is a {type(pipeline.unet).__name__}.")
    _refuse_lora(pipeline)
    stock = StableDiffusionXLPipeline if hasattr(pipeline, "text_encoder_2") else StableDiffusionPipeline
    names = inspect.signature(stock.__init__).parameters
    beyond = [name for name, part in pipeline.components.items() if part is not None and name not in names]
    if beyond:
        raise ValueError(
            f"a {stock.__name__} has no {', '.join(beyond)}; export {stock.__name__}.from_pipe(pipeline, "
            f"scheduler=pipeline.scheduler), and save the {', '.join(beyond)} beside it."
        )
    parts = {name: pipeline.config[name] for name in names if name in pipeline.config}
    parts |= {name: part for name, part in pipeline.components.items() if name in names}
    if pipeline.scheduler.config["velocity_direction"] == "data":
        parts["unet"] = fold_sign(pipeline.unet)
    save_pipeline(stock(**{**parts, "scheduler": solver}), output_dir)


def _stock_solver(ours: Any, scheduler: StockScheduler, solver_order: int) -> SchedulerMixin:
    """Make the stock scheduler that walks from noise to data as ours does."""
    if not isinstance(ours, RectifiedFlowEulerScheduler):
        raise ValueError(
            "export_diffusers makes a rectified flow stock, one with a RectifiedFlowEulerScheduler; got "
            f"{type(ours).__name__}. A stock pipeline needs no export: use its save_pretrained."
        )
    if scheduler not in _SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(_SCHEDULERS)}, got {scheduler!r}.")
    return _SCHEDULERS[scheduler](
        num_train_timesteps=ours.config["num_train_timesteps"],
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=ours.config["shift"],
        solver_order=solver_order,
        steps_offset=1,  # nothing to a flow; without it the pipeline warns of an outdated config
    )


def fold_sign(unet: Any) -> Any:
    """Give a view of a U-Net that predicts the negative: `conv_out` is new and negated, all else is shared."""
    conv_out = copy.deepcopy(unet.conv_out)
    for parameter in conv_out.parameters():
        parameter.data.neg_()
    view = copy.copy(unet)
    view.__dict__["_modules"] = {**unet._modules, "conv_out": conv_out}
    return view


def export_unet(pipeline: Any, path: str | Path, unet_format: UNetFormat = "comfyui") -> None:
    """Save a pipeline's U-Net to one file, under the names of the original Stable Diffusion checkpoints.

    The names are those of `v1-5-pruned-emaonly.safetensors`, `model.diffusion_model.` in front, and the values keep
    their dtype; `UNet2DConditionModel.from_single_file` reads the file back. There are two kinds:

    - `comfyui` predicts noise - data, as flow models do there: the weight and bias of the last convolution are
      negated, which is exact. Its node ModelSamplingSD3 with shift 1 then walks as our scheduler does.
    - `ldm` is the U-Net as it is: a prediction of data - noise, which other programs' samplers do not expect.

    Args:
        pipeline: with a UNet2DConditionModel of the layout of Stable Diffusion 1.x or 2.x. `comfyui` needs our
            scheduler, which tells the sign.
        path: a file that ends in .safetensors; it is replaced.
    """
    require_pipeline("export_unet", pipeline, "unet", "scheduler")
    path, unet = Path(path), pipeline.unet
    if unet_format not in get_args(UNetFormat):
        raise ValueError(f"unet_format must be one of {', '.join(get_args(UNetFormat))}, got {unet_format!r}.")
    if path.suffix != ".safetensors":
        raise ValueError(f"a U-Net is exported to one file, whose name ends in .safetensors; got {str(path)!r}.")
    if type(unet) is not UNet2DConditionModel:
        raise ValueError(f"the original layout is of a UNet2DConditionModel, and this is a {type(unet).__name__}.")
    refuse_lora(unet.state_dict(), "the pipeline's unet")
    if unet_format == "comfyui":
        if not isinstance(pipeline.scheduler, RectifiedFlowEulerScheduler):
            raise ValueError(
                "the export for ComfyUI is of a rectified flow, with a RectifiedFlowEulerScheduler; got "
                f"{type(pipeline.scheduler).__name__}. The U-Net of a diffusion model needs no other sign: use 'ldm'."
            )
        if pipeline.scheduler.config["velocity_direction"] == "data":
            unet = fold_sign(unet)
    weights = original_unet_layout(unet.state_dict(), unet.config["layers_per_block"])
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata={"format": "pt"})


def _refuse_lora(pipeline: Any) -> None:
    """Raise if a part carries a LoRA: neither kind of export can keep it apart from the weights."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            try:
                refuse_lora(part.state_dict(), f"the pipeline's {name}")
            except ValueError as error:
                raise ValueError(f"{error} To export the model with it, call pipeline.fuse_lora() before.") from None


@dataclass(frozen=True)
class _Graph:
    """A part of a pipeline as an ONNX graph: what is called, on which tensors, and which dimensions may change."""

    function: Callable[..., Any]
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]


class _Called(nn.Module):
    """A module whose forward is a function of tensors; `part` holds the weights that the function uses."""

    def __init__(self, part: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.part, self.function = part, function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def export_onnx(pipeline: Any, output_dir: str | Path) -> None:
    """Save the text encoder, U-Net and VAE decoder as ONNX graphs, with tokenizer and scheduler, for onnxruntime.

    The folders and the names of inputs and outputs are those of diffusers' conversion script, which the ONNX copies
    of InstaFlow follow too:

        text_encoder/model.onnx   input_ids (B, L) int32          -> last_hidden_state (B, L, D), pooler_output (B, D)
        unet/model.onnx           sample (B, C, H, W), timestep (1,) float32, encoder_hidden_states (B, L, D)
                                                                  -> out_sample (B, C, H, W)
        vae_decoder/model.onnx    latent_sample (B, C, H, W)      -> sample (B, 3, fH, fW) in [-1, 1]

    B, H and W are free, H and W as multiples of what the U-Net halves them by; L is the tokenizer's. The prediction
    keeps its sign, data - noise for our models. latent_sample is data / scaling_factor, from vae_decoder/config.json.
    A graph is in the dtype of the pipeline; above 2 GB its weights are beside it, in model.onnx_data.
    """
    _check_onnx(pipeline)
    output_dir = Path(output_dir)
    for name, part, graph in (
        ("text_encoder", pipeline.text_encoder, _text_encoder_graph(pipeline)),
        ("unet", pipeline.unet, _unet_graph(pipeline)),
        ("vae_decoder", pipeline.vae, _vae_decoder_graph(pipeline)),
    ):
        folder = output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        _trace(part, graph, folder)
        save_config = part.save_config if hasattr(part, "save_config") else part.config.save_pretrained
        save_config(folder)
    pipeline.tokenizer.save_pretrained(output_dir / "tokenizer")
    pipeline.scheduler.save_pretrained(output_dir / "scheduler")
    make_readable(output_dir)


def _check_onnx(pipeline: Any) -> None:
    """Check that the pipeline has the three parts and no more, and that the packages are there."""
    names = ("text_encoder", "unet", "vae", "tokenizer", "scheduler")
    missing = [name for name in names if getattr(pipeline, name, None) is None]
    if missing or hasattr(pipeline, "text_encoder_2"):
        raise ValueError(
            f"export_onnx needs a pipeline of the Stable Diffusion family with one text encoder, a U-Net and a VAE; "
            f"got {type(pipeline).__name__}" + (f" without {', '.join(missing)}." if missing else ".")
        )
    _refuse_lora(pipeline)
    if pipeline.unet.dtype == torch.bfloat16:
        raise ValueError("onnxruntime cannot convolve bfloat16; load the pipeline in float32 or float16.")
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'the export to ONNX needs more packages: pip install "rectified_diffusers[onnx]".'
        ) from error


def _text_encoder_graph(pipeline: Any) -> _Graph:
    encoder = pipeline.text_encoder
    tokens = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    tokens = tokens.repeat(2, 1).to(encoder.device, torch.int32)

    def encode(input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = encoder(input_ids)
        return output.last_hidden_state, output.pooler_output

    outputs = ("last_hidden_state", "pooler_output")
    return _Graph(encode, {"input_ids": tokens}, outputs, {name: {0: "batch"} for name in ("input_ids", *outputs)})


def _unet_graph(pipeline: Any) -> _Graph:
    unet, kind = pipeline.unet, {"device": pipeline.unet.device, "dtype": pipeline.unet.dtype}
    size = _sample_size(unet)
    length, width = pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.hidden_size
    inputs = {
        "sample": torch.zeros(2, unet.config.in_channels, *size, **kind),
        # In float16, a timestep near 1000 would be rounded to halves.
        "timestep": torch.full((1,), 500.0, device=unet.device),
        "encoder_hidden_states": torch.zeros(2, length, width, **kind),
    }

    def predict(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return unet(sample, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]

    picture = {0: "batch", 2: "height", 3: "width"}
    dynamic = {"sample": picture, "out_sample": picture, "encoder_hidden_states": {0: "batch"}}
    return _Graph(predict, inputs, ("out_sample",), dynamic)


def _vae_decoder_graph(pipeline: Any) -> _Graph:
    vae = pipeline.vae
    latents = torch.zeros(
        2, vae.config.latent_channels, *_sample_size(pipeline.unet), device=vae.device, dtype=vae.dtype
    )

    def decode(latent_sample: Tensor) -> Tensor:
        return vae.decode(latent_sample, return_dict=False)[0]

    dynamic = {
        "latent_sample": {0: "batch", 2: "height", 3: "width"},
        "sample": {0: "batch", 2: "pixel_height", 3: "pixel_width"},
    }
    return _Graph(decode, {"latent_sample": latents}, ("sample",), dynamic)


def _sample_size(unet: Any) -> tuple[int, int]:
    size = unet.config.sample_size
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def _trace(part: nn.Module, graph: _Graph, folder: Path) -> None:
    """Write a graph to model.onnx in a folder, weights above the format's limit of 2 GB to one file beside it."""
    # The exporter through TorchScript: the one that every torch since 2.4 has, and forty times as fast as the newer.
    options: dict[str, Any] = {"opset_version": OPSET}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False
    with tempfile.TemporaryDirectory(dir=folder) as temporary, warnings.catch_warnings(), torch.no_grad():
        # Python values that tracing makes constant: sizes that no input of ours changes, and its own deprecation.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Called(part, graph.function).eval(),
            tuple(graph.inputs.values()),
            str(Path(temporary) / "model.onnx"),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes=graph.dynamic,
            **options,
        )
        gather(Path(temporary), folder)


def gather(traced: Path, folder: Path) -> None:
    """Move a traced model.onnx to a folder; weights that torch wrote to a file each become one, model.onnx_data."""
    for name in ("model.onnx", "model.onnx_data"):
        (folder / name).unlink(missing_ok=True)
    if len(list(traced.iterdir())) == 1:
        (traced / "model.onnx").replace(folder / "model.onnx")
        return
    import onnx

    onnx.save_model(
        onnx.load(traced / "model.onnx"),
        folder / "model.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="model.onnx_data",
    )
