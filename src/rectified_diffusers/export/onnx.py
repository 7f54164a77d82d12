"""Export a pipeline as ONNX graphs for onnxruntime."""

import inspect
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from rectified_diffusers.checks import require_pipeline, require_plain_weights
from rectified_diffusers.export.stock import stock_solver
from rectified_diffusers.loading.lora_checks import refuse_any_lora
from rectified_diffusers.loading.saving import make_readable
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler

OPSET = 17
INDEX = "model_index.json"


@dataclass(frozen=True)
class _Graph:
    """A component of a pipeline as an ONNX graph: the function, its input tensors, and the dynamic dimensions."""

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

    The folder is a pipeline for the ORTStableDiffusionPipeline and OVStableDiffusionPipeline of optimum, without a
    safety checker. The folders and the names of inputs and outputs are those of diffusers' conversion script, which
    the ONNX copies of InstaFlow also follow:

        text_encoder/model.onnx   input_ids (B, L) int32          -> last_hidden_state (B, L, D), pooler_output (B, D)
        unet/model.onnx           sample (B, C, H, W), timestep (1,) float32, encoder_hidden_states (B, L, D)
                                                                  -> out_sample (B, C, H, W)
        vae_decoder/model.onnx    latent_sample (B, C, H, W)      -> sample (B, 3, fH, fW) in [-1, 1]

    B, H and W are dynamic. H and W must be multiples of the U-Net's downsampling factor; L is the tokenizer's length.
    For a rectified flow, out_sample is noise - data, as the stock scheduler in the folder expects: UniPC on flow
    sigmas, set to the Euler method (see `export_diffusers`). A diffusion model keeps its prediction and its scheduler.
    latent_sample is data / scaling_factor, from vae_decoder/config.json. A graph has the dtype of the pipeline. Above
    2 GB, its weights are stored next to it, in model.onnx_data.

    Example:
        ```python
        export_onnx(pipeline, "onnx")
        ```
    """
    _check_onnx(pipeline)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / INDEX).unlink(missing_ok=True)  # written last: without it, nothing can be loaded
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
    scheduler = pipeline.scheduler
    if isinstance(scheduler, RectifiedFlowEulerScheduler):
        scheduler = stock_solver(scheduler, "unipc", solver_order=1)
    scheduler.save_pretrained(output_dir / "scheduler")
    _write_index(pipeline, scheduler, output_dir)
    make_readable(output_dir)


def _write_index(pipeline: Any, scheduler: Any, output_dir: Path) -> None:
    """Write the index of a stock pipeline of these parts, with the precision in which OpenVINO computes."""
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    stock = StableDiffusionPipeline(**parts, **absent, scheduler=scheduler, requires_safety_checker=False)
    # optimum passes unknown entries of the index to OVStableDiffusionPipeline. Without this one, OpenVINO computes in
    # bfloat16 where the processor can, and the image is about 10 of 255 levels off.
    ov_config = {"INFERENCE_PRECISION_HINT": "f32"}
    index = {**json.loads(stock.to_json_string()), "ov_config": ov_config}
    (output_dir / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_onnx(pipeline: Any) -> None:
    """Check that the pipeline has exactly the three components and that the required packages are installed."""
    require_pipeline("export_onnx", pipeline, "text_encoder", "unet", "vae", "tokenizer", "scheduler")
    if hasattr(pipeline, "text_encoder_2"):
        raise ValueError(f"export_onnx needs a pipeline with one text encoder, got {type(pipeline).__name__}.")
    refuse_any_lora(pipeline)
    require_plain_weights("export_onnx", pipeline.components)
    if pipeline.unet.dtype == torch.bfloat16:
        raise ValueError("onnxruntime cannot convolve bfloat16; load the pipeline in float32 or float16.")
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ImportError('export_onnx needs more packages: pip install "rectified_diffusers[onnx]".') from error


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
        # In float16, a timestep near 1000 would be rounded to a multiple of 0.5.
        "timestep": torch.full((1,), 500.0, device=unet.device),
        "encoder_hidden_states": torch.zeros(2, length, width, **kind),
    }

    # Exact, like `fold_sign`, and for any network.
    towards_data = pipeline.scheduler.config.get("velocity_direction") == "data"

    def predict(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        predicted = unet(sample, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        return -predicted if towards_data else predicted

    image = {0: "batch", 2: "height", 3: "width"}
    dynamic = {"sample": image, "out_sample": image, "encoder_hidden_states": {0: "batch"}}
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
    """Write a graph to model.onnx in a folder; weights above the format's limit of 2 GB go to one file next to it."""
    # The TorchScript exporter: every torch since 2.4 has it, and it is forty times as fast as the newer one.
    options: dict[str, Any] = {"opset_version": OPSET}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False
    with tempfile.TemporaryDirectory(dir=folder) as temporary, warnings.catch_warnings(), torch.no_grad():
        # Warnings about Python values that tracing makes constant (sizes that none of our inputs changes), and about
        # the exporter's own deprecation.
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
    """Move a traced model.onnx to a folder; merge weights that torch wrote to separate files into model.onnx_data."""
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
