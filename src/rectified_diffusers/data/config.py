"""Options of triplet generation. Does not import torch, so that `--help` is fast."""

import json
import math
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal

from rectified_diffusers.options import check_options, option

# Three keywords, then the diffusers schedulers that solve the ODE of a noise schedule or of a flow.
Solver = Literal[
    "auto",
    "teacher",
    "dpm_solver++",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
]


@dataclass(frozen=True, kw_only=True)
class StoredTripletConfig:
    """Options shared by all functions that generate a folder of triplets."""

    least_steps: ClassVar[int] = 1

    num_triplets: int = option(MISSING, "Triplets to make.")
    num_inference_steps: int = option(25, "Solver steps of the teacher.")
    guidance_scale: float | None = option(1.0, "Classifier-free guidance of the teacher; 1 is none.")
    batch_size: int = option(16, "Triplets generated at once; the noise does not depend on it.")
    triplets_per_shard: int = option(256, "Triplets in a file, and what a killed process loses at most.")
    seed: int = option(0, "The noise of shard k is sampled from (seed, k).")
    storage_dtype: Literal["float16", "bfloat16", "float32"] = option(
        "float16", "Number format of stored noise and data; the noise is rounded to it before the teacher gets it."
    )
    store_text_embeddings: bool = option(
        False, "Store the prompts' embeddings, too: training runs no text encoder, shards are larger."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "Precision of the teacher's forward passes; its latents keep the number format it was loaded in."
    )

    def __post_init__(self) -> None:
        check_options(self)
        least = {"num_triplets": 1, "num_inference_steps": self.least_steps, "batch_size": 1, "triplets_per_shard": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}.")
        if self.guidance_scale is not None and not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale must be a finite number of at least 0, got {self.guidance_scale}.")


@dataclass(frozen=True, kw_only=True)
class TripletConfig(StoredTripletConfig):
    """Options of `generate_triplets`. Steps, solver and guidance follow InstaFlow on SD 1.5 (arXiv:2309.06380).

    Example:
        ```python
        config = TripletConfig(num_triplets=4, num_inference_steps=4, solver="HeunDiscreteScheduler")
        more = generate_triplets(teacher, read_prompts("prompts.txt"), "more-triplets", config)
        ```
    """

    num_triplets: int = option(MISSING, "Triplets to make; prompts repeat in order when there are fewer.")
    guidance_scale: float | None = option(
        None,
        "Guidance of the teacher, as its pipeline's call takes it. For Stable Diffusion, 1 is none; InstaFlow takes 5 "
        "for reflow, and 1.5 for its 2-Rectified Flow.",
        shown="that of its pipeline's call: 7.5 for Stable Diffusion, 5 for SDXL",
    )
    solver: Solver = option(
        "auto",
        "ODE solver: auto is dpm_solver++ for diffusion teachers and the teacher's own scheduler for flows; "
        "a class of diffusers is made from the teacher's schedule. Samplers that add noise are not among them.",
    )
    height: int | None = option(None, "Image height in pixels; none is the teacher's own.")
    width: int | None = option(None, "Image width in pixels; none is the teacher's own.")
    call_options: str | None = option(
        None,
        'Further arguments of the teacher\'s call as JSON, such as {"num_frames": 9}; for pipelines other than Stable '
        "Diffusion and SDXL.",
        metavar="JSON",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.arguments()
        for name in ("height", "width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 pixel or none, got {getattr(self, name)}.")

    def arguments(self) -> dict[str, Any]:
        """Return the set arguments of the teacher's call: height, width and `call_options`."""
        try:
            further = json.loads(self.call_options or "{}")
        except json.JSONDecodeError:
            further = None
        if not isinstance(further, dict):
            raise ValueError(f"call_options must be a JSON object of arguments by name, got {self.call_options!r}.")
        sizes = {"height": self.height, "width": self.width}
        return {**{name: size for name, size in sizes.items() if size is not None}, **further}


@dataclass(frozen=True, kw_only=True)
class RealTripletConfig(StoredTripletConfig):
    """Options of `generate_real_triplets`. Real pairs come from 2-RF++ (arXiv:2405.20320) and later work.

    Example:
        ```python
        config = RealTripletConfig(num_triplets=8, num_inference_steps=0)  # new noise, for distribution matching
        real_triplets = generate_real_triplets(teacher, "pictures", "real-triplets", config)
        ```
    """

    least_steps = 0

    num_triplets: int = option(
        MISSING, "Triplets to make, of images in random order; they repeat when there are fewer."
    )
    num_inference_steps: int = option(
        25,
        "Steps of Heun's method, two evaluations each: as much work as that many steps with guidance. At 0 the noise "
        "is new and independent of the image, which is all that the discriminator of dmd needs.",
    )
    guidance_scale: float = option(
        1.0,
        "Classifier-free guidance of the backward flow; above 1 the noise is no longer white. For a network that "
        "takes guidance as an input, such as FLUX.1-dev's, that of the generated triplets.",
    )
    inversion_time: float = option(
        0.9,
        "Flow time in (0, 1] at which the backward flow begins, with the image and as much new noise as the flow has "
        "there. At 1 it begins with the image alone, as in the papers; the resulting noise may then be refused.",
    )
    batch_size: int = option(16, "Images at once; it changes the triplets by rounding errors at most.")
    storage_dtype: Literal["float16", "bfloat16", "float32"] = option(
        "float16", "Number format of stored noise and data; the data is rounded to it before it is inverted."
    )
    seed: int = option(0, "The order of the images follows from the seed, the new noise of shard k from (seed, k).")
    split: str = option("train", "Split of the images, where the data has several.")
    size: int | None = option(None, "Side of the square images in pixels; none is the teacher's own.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.inversion_time <= 1:
            raise ValueError(f"inversion_time must be in (0, 1], got {self.inversion_time}.")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1 pixel or none, got {self.size}.")
