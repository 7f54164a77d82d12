"""Options of triplet generation. Imports no torch, so that `--help` answers at once."""

import math
from dataclasses import MISSING, dataclass
from typing import Literal

from rectified_diffusers.options import check_options, option

_AT_LEAST_ONE = ("num_triplets", "num_inference_steps", "batch_size", "triplets_per_shard")


# After the words, the schedulers of diffusers that solve the ODE of a noise schedule or of a flow.
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
class TripletConfig:
    """Options of `generate_triplets`; steps, solver and guidance follow InstaFlow on SD 1.5 (arXiv:2309.06380)."""

    num_triplets: int = option(MISSING, "Triplets to make; prompts repeat in order when there are fewer.")
    num_inference_steps: int = option(25, "Solver steps of the teacher.")
    guidance_scale: float = option(
        5.0,
        "Classifier-free guidance of the teacher: 5 for Stable Diffusion, 1.5 for its 2-Rectified Flow; 1 is none.",
    )
    solver: Solver = option(
        "auto",
        "ODE solver: auto is dpm_solver++ for diffusion teachers and the teacher's own scheduler for flows; "
        "a class of diffusers is made from the teacher's schedule. Samplers that add noise are not among them.",
    )
    batch_size: int = option(16, "Triplets asked of the teacher at once; the noise does not depend on it.")
    triplets_per_shard: int = option(256, "Triplets in a file, and what a killed process loses at most.")
    seed: int = option(0, "The noise of shard k is drawn from (seed, k).")
    storage_dtype: Literal["float16", "bfloat16", "float32"] = option(
        "float16", "Number format of stored noise and data; the noise is rounded to it before the teacher sees it."
    )
    store_text_embeddings: bool = option(
        False, "Store the prompts' embeddings, too: training runs no text encoder, shards are larger."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "Precision of the teacher's forward passes; its latents keep the number format it was loaded in."
    )
    height: int | None = option(None, "Picture height in pixels; none is the teacher's own.")
    width: int | None = option(None, "Picture width in pixels; none is the teacher's own.")

    def __post_init__(self) -> None:
        check_options(self)
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("height", "width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 pixel or none, got {getattr(self, name)}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}.")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale must be a finite number of at least 0, got {self.guidance_scale}.")
