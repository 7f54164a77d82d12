"""Optimize the speed of a pipeline, reversibly: every switch is one context manager of this folder."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from torch import nn
from typing_extensions import Self

from rectified_diffusers.checks import require_pipeline, require_plain_weights
from rectified_diffusers.loading.errors import remedies
from rectified_diffusers.speed.attention import blockwise_attention as use_blockwise_attention
from rectified_diffusers.speed.caches import cached_prompts, cached_times, watched
from rectified_diffusers.speed.compilation import compiled
from rectified_diffusers.speed.cpu import SWITCHES, cpu_kind
from rectified_diffusers.speed.packing import packed_weights
from rectified_diffusers.speed.patching import can_keep_memory, images_on_device, kept_memory, replaced
from rectified_diffusers.speed.precision import converted, fast_dtype, latents_in_float32
from rectified_diffusers.speed.projections import can_fuse, fused_projections
from rectified_diffusers.speed.upsampling import folded_upsampling

Switch = bool | Literal["auto"]
_MARK = "_optimized_by_rectified_diffusers"


@dataclass
class Optimized:
    """Record of what `optimize` did to a pipeline, to undo it; also a context manager that undoes it on exit.

    Example:
        ```python
        with optimize(pipeline) as optimized:
            print(optimized.switches)
            image = pipeline("a red apple").images[0]
        ```
    """

    pipeline: Any
    switches: dict[str, Any]
    _undo: ExitStack = field(default_factory=ExitStack, repr=False)
    _forget: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def forget(self) -> None:
        """Drop everything precomputed from weights; call it after writing to them through `parameter.data`."""
        for each in self._forget:
            each()

    def restore(self) -> None:
        """Restore the pipeline bit for bit; what was fused into weights that `optimize` replaced is lost."""
        self._undo.close()

    def __reduce__(self) -> Any:
        return type(None), ()  # copies and pickles of a pipeline are not optimized

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def optimize(
    pipeline: DiffusionPipeline,
    *,
    lossless: bool = False,
    dtype: torch.dtype | Literal["auto"] | None = "auto",
    channels_last: Switch = "auto",
    blockwise_attention: Switch = "auto",
    fold_upsampling: Switch = "auto",
    pack_weights: Switch = "auto",
    fuse_qkv: Switch = "auto",
    compile: Switch = "auto",
    compile_mode: str = "reduce-overhead",
    decoder: AutoencoderTiny | str | os.PathLike[str] | None = None,
    cache_prompts: bool = True,
    cache_times: Switch = "auto",
    keep_memory: Switch = "auto",
) -> Optimized:
    """Optimize the speed of a pipeline, in place, on its device; `docs/speed.md` has each switch's gain and cost.

    "auto" depends on the device, and on a CPU on its instructions; `tune` measures instead. Extensions that already
    act on images (ControlNets, LoRAs, callbacks) keep working; load and fuse weights before this call where possible.
    The original weights are kept in memory, for `restore`; copies and pickles of the pipeline are not optimized.

    Args:
        pipeline: with the architecture of Stable Diffusion or SDXL, ours or diffusers' own, without CPU offload.
        lossless: disable every "auto" switch that would change a bit of an image.
        dtype: of the models; auto is float16 on CUDA (bfloat16 for SDXL) and MPS, bfloat16 on a CPU with instructions
            for it, else none. None keeps each dtype. The latents stay in float32.
        channels_last: of the convolutions; auto is on for CUDA and CPUs.
        blockwise_attention: our own order of attention's operations; auto is on for bfloat16 on a CPU without AMX.
        fold_upsampling: upsampling and convolution in one, with 4/9 of the products; auto is on.
        pack_weights: keep bfloat16 weights in oneDNN's layout too; auto is on for bfloat16 on a CPU without AMX.
        fuse_qkv: query, key and value in one multiplication; auto is on for CUDA, where a LoRA allows it.
        compile: U-Net, decoder and text encoders by torch.compile, minutes at the first image; auto is on for CUDA.
        compile_mode: of torch.compile; the default creates CUDA graphs.
        decoder: an AutoencoderTiny, or its folder or Hub id ("madebyollin/taesd" for Stable Diffusion 1.5), instead of
            the VAE: much faster and a little less exact.
        cache_prompts: keep the embeddings of the last 64 prompts.
        cache_times: keep the embeddings of the timesteps; auto is on for CPUs, unless compiled.
        keep_memory: of the entire process: return none to the system before `restore`; auto is on for CPUs with glibc.
    """
    pipe = _checked(pipeline)
    requested = {
        "dtype": dtype,
        "compile": compile,
        "channels_last": channels_last,
        "blockwise_attention": blockwise_attention,
        "fold_upsampling": fold_upsampling,
        "pack_weights": pack_weights,
        "fuse_qkv": fuse_qkv,
        "cache_prompts": cache_prompts,
        "cache_times": cache_times,
        "keep_memory": keep_memory,
    }
    switches = _choose(pipe, lossless, requested) | {"decoder": None if decoder is None else _tiny(decoder, pipe)}
    return _turn_on(Optimized(pipe, switches), compile_mode)


def is_optimized(pipeline: Any) -> bool:
    """Return whether a pipeline is optimized; its weights may be rounded then, until `restore`."""
    return getattr(pipeline, _MARK, None) is not None


def _choose(pipeline: Any, lossless: bool, requested: dict[str, Any]) -> dict[str, Any]:
    """Replace each "auto" by the setting for the pipeline's device; refuse invalid values of a switch."""
    for name, value in requested.items():
        if name != "dtype" and value not in (True, False, "auto"):
            raise ValueError(f"{name} must be True, False or 'auto', got {value!r}.")
    device = pipeline.unet.device
    on_cpu, on_cuda = device.type == "cpu", device.type == "cuda"
    dtype = requested["dtype"]
    if not (dtype in ("auto", None) or isinstance(dtype, torch.dtype)):
        raise TypeError(f"dtype must be a torch.dtype such as torch.float16, 'auto' or None, got {dtype!r}.")
    if dtype == "auto":
        dtype = None if lossless else fast_dtype(device, wide_range="text_encoder_2" in pipeline.components)
    computed_in = pipeline.unet.dtype if dtype is None else dtype
    compiles = (on_cuda and not lossless) if requested["compile"] == "auto" else requested["compile"]
    on_this_cpu = SWITCHES[cpu_kind()] if on_cpu else {}
    in_bfloat16 = not lossless and computed_in == torch.bfloat16 and not compiles
    automatic = {
        "compile": compiles,
        "channels_last": not lossless and on_this_cpu.get("channels_last", on_cuda),
        "blockwise_attention": in_bfloat16 and on_this_cpu.get("blockwise_attention", False),
        "fold_upsampling": not lossless and on_this_cpu.get("fold_upsampling", True),
        "pack_weights": in_bfloat16 and on_this_cpu.get("pack_weights", False),
        "fuse_qkv": not lossless and on_cuda and can_fuse(pipeline.unet),
        "cache_times": on_cpu and not compiles,
        "keep_memory": on_cpu and can_keep_memory(),
    }
    chosen = {**requested, "dtype": dtype}
    return {name: automatic[name] if value == "auto" else value for name, value in chosen.items()}


def _checked(pipeline: Any) -> Any:
    require_pipeline("optimize", pipeline, "unet", "vae")
    if is_optimized(pipeline):
        raise ValueError("This pipeline is already optimized: call restore() on that result first.")
    require_plain_weights("optimize", pipeline.components)
    models = {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}
    if offloaded := [name for name, model in models.items() if hasattr(model, "_hf_hook")]:
        raise ValueError(
            f"CPU offload moves the weights of {', '.join(offloaded)}. Call remove_all_hooks() on the pipeline, move "
            "it to one device, then optimize."
        )
    return pipeline


def _tiny(decoder: AutoencoderTiny | str | os.PathLike[str], pipeline: Any) -> AutoencoderTiny:
    """Return the small decoder, loaded if necessary, after checking that it reads the same latents as the VAE."""
    tiny: Any = decoder
    if isinstance(decoder, (str, os.PathLike)):
        with remedies(decoder):
            tiny = AutoencoderTiny.from_pretrained(decoder, use_safetensors=True)
    if not isinstance(tiny, AutoencoderTiny):
        raise TypeError(f"decoder must be an AutoencoderTiny, its folder or its Hub id, got {type(tiny).__name__}.")
    vae = pipeline.vae
    found, expected = (
        (each.config["latent_channels"], 2 ** (len(each.config[blocks]) - 1))
        for each, blocks in ((tiny, "decoder_block_out_channels"), (vae, "block_out_channels"))
    )
    if found != expected:
        raise ValueError(
            f"The decoder reads latents of {found[0]} channels at 1/{found[1]} of the size, expected {expected[0]} at "
            f"1/{expected[1]}. Use the AutoencoderTiny of this family of models."
        )
    return tiny.to(vae.device, vae.dtype).eval()


def _turn_on(result: Optimized, compile_mode: str) -> Optimized:
    """Turn on what `result.switches` says, all of it or, on an error, nothing."""
    try:
        _enter_switches(result, compile_mode)
    except BaseException:
        result.restore()
        raise
    return result


def _enter_switches(result: Optimized, compile_mode: str) -> None:
    """Enter the contexts of the enabled switches; they are exited in reverse order."""
    pipe, on, stack = result.pipeline, result.switches, result._undo
    stack.enter_context(replaced(pipe, _MARK, result))
    if on["decoder"] is not None:
        stack.callback(pipe.register_modules, vae=pipe.vae)
        pipe.register_modules(vae=on["decoder"])
    models = {name: each for name, each in pipe.components.items() if isinstance(each, nn.Module)}
    for name, model in models.items():
        layout = on["channels_last"] and name in ("unet", "vae", "controlnet")
        stack.enter_context(converted(model, on["dtype"], layout))
    if pipe.unet.dtype.itemsize == 2:
        stack.enter_context(latents_in_float32(pipe))
    for model in (pipe.unet, pipe.vae):
        if on["blockwise_attention"]:
            stack.enter_context(use_blockwise_attention(model))
    for model in (pipe.unet, pipe.vae.decoder):
        if on["fold_upsampling"]:
            result._forget.append(stack.enter_context(folded_upsampling(model, on["pack_weights"])))
    for model in models.values():
        if on["pack_weights"]:  # after folding: the layers that it replaced are not packed
            result._forget.append(stack.enter_context(packed_weights(model)))
    if on["fuse_qkv"]:
        result._forget.append(stack.enter_context(fused_projections(pipe.unet)))
    if on["cache_prompts"]:
        result._forget.append(stack.enter_context(cached_prompts(pipe)))
    if on["cache_times"]:
        result._forget.append(stack.enter_context(cached_times(pipe.unet)))
    if on["compile"]:
        stack.enter_context(compiled(pipe, mode=compile_mode))
    if getattr(pipe, "image_processor", None) is not None:
        stack.enter_context(images_on_device(pipe))
    if on["keep_memory"]:
        stack.enter_context(kept_memory())
    stack.enter_context(watched(pipe, result.forget))
    stack.enter_context(_guarded(pipe, models))


def _guarded(pipeline: Any, models: dict[str, nn.Module]) -> Any:
    """Refuse to generate with a model that was exchanged after `optimize`, to which its switches do not apply."""
    stock = pipeline.check_inputs

    def check_inputs(*args: Any, **kwargs: Any) -> Any:
        for name, model in models.items():
            if getattr(pipeline, name) is not model:
                raise ValueError(f"{name} was exchanged after optimize. Call restore() before, and optimize again.")
        return stock(*args, **kwargs)

    return replaced(pipeline, "check_inputs", check_inputs)
