"""Latents of a pipeline: shape, packing into tokens, and conversion between pixels and VAE-scaled latents."""

from typing import Any

from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def packs_latents(pipeline: Any) -> bool:
    """Return whether a pipeline takes and returns latents as tokens of 2 x 2 squares."""
    return isinstance(pipeline, FluxPipeline)


def pack(latents: Tensor) -> Tensor:
    """Convert latents `(B, C, H, W)` to Flux's tokens `(B, H W / 4, 4 C)`, squares of 2 x 2 row by row."""
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Convert Flux's tokens back to latents `(B, C, height, width)`."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def network_of(pipeline: Any) -> Any:
    unet = getattr(pipeline, "unet", None)
    return pipeline.transformer if unet is None else unet


def latent_channels(pipeline: Any) -> int:
    """Return the number of channels of a pipeline's latents."""
    channels = network_of(pipeline).config["in_channels"]
    return channels // 4 if packs_latents(pipeline) else channels


def latent_shape(pipeline: Any, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """Return channels, height and width of a pipeline's latents, for a size in pixels or for its default size.

    Works for any pipeline with a U-Net or a transformer whose latents are `(B, C, H, W)` or Flux's.
    """
    network = network_of(pipeline)
    own = pipeline.default_sample_size if packs_latents(pipeline) else network.config.get("sample_size")
    own_height, own_width = own if isinstance(own, (list, tuple)) else (own, own)
    factor = pipeline.vae_scale_factor
    # A transformer's patches must tile the latents; a U-Net pads.
    multiple = factor * (2 if packs_latents(pipeline) else network.config.get("patch_size") or 1)
    sizes: list[int] = []
    for name, pixels, default in (("height", height, own_height), ("width", width, own_width)):
        if pixels is None and default is None:
            raise ValueError(f"{type(network).__name__} does not say its sample_size; set {name} in the config.")
        if pixels is not None and (pixels < 1 or pixels % multiple):
            raise ValueError(f"{name} must be a multiple of {multiple} for this VAE, got {pixels}.")
        sizes.append(default if pixels is None else pixels // factor)
    return latent_channels(pipeline), sizes[0], sizes[1]


def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels `(B, 3, H, W)` in [-1, 1] to the mean of the VAE's latents, scaled, in its dtype."""
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return (latents - vae_shift(vae)) * vae.config.scaling_factor


def unscale(vae: Any, latents: Tensor) -> Tensor:
    """Convert VAE-scaled latents to the values that the VAE decodes, in the dtype of the latents."""
    return latents / vae.config.scaling_factor + vae_shift(vae)


def decode_to_images(pipeline: Any, latents: Tensor) -> list[Image.Image]:
    vae = pipeline.vae
    pixels = vae.decode(unscale(vae, latents).to(vae.dtype)).sample
    return pipeline.image_processor.postprocess(pixels, output_type="pil")


def vae_shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0
