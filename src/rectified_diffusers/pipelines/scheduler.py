"""Scheduler for rectified flow: with it, a pipeline of diffusers samples a rectified flow."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, TypeVar, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

VelocityDirection = Literal["data", "noise"]
Time = TypeVar("Time", float, Tensor)

# Values that the checkpoint of a velocity model may have: ours, the style guide's, and the one that makes diffusers'
# training scripts call the scheduler's `get_velocity`. All are stored as the first.
_PREDICTION_TYPES = ("flow_prediction", "velocity", "v_prediction")

# A key of the config, not an argument. With the underscore, diffusers' own schedulers load and keep it silently too.
_STUDENT_STEPS = "_student_steps"
# Likewise, in the config of a stock solver that `export_diffusers` wrote: the number of timesteps of our scheduler.
FLOW_TIMESTEPS = "_flow_timesteps"

# Keys of the config that `for_pipeline` copies from a stock flow scheduler; pipelines compute mu from _SIZES.
_GRID = ("sigma_min", "use_dynamic_shifting", "time_shift_type", "shift_terminal", "invert_sigmas")
_SIZES = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
_OTHERS = "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "stochastic_sampling"


def time_to_timestep(t: Time, num_train_timesteps: int = 1000) -> Time:
    """Convert flow time, 0 noise and 1 data, to the U-Net's timestep: `num_train_timesteps * (1 - t)`."""
    return num_train_timesteps * (1 - t)


def timestep_to_time(timestep: Time, num_train_timesteps: int = 1000) -> Time:
    """Convert a timestep in [0, num_train_timesteps] to flow time: `1 - timestep / num_train_timesteps`."""
    return 1 - timestep / num_train_timesteps


class RectifiedFlowEulerScheduler(SchedulerMixin, ConfigMixin):
    """Integrate dx/dt = v(x, t) from noise at t = 0 to data at t = 1 with Euler steps, on t_i = i / N by default.

    v minimizes Eq. (1) of arXiv:2209.03003. The U-Net receives `1000 * (1 - t)` as a float, 1000 at the noise end. The
    grid is kept in float64 on the CPU, and a step multiplies by a Python float, so nothing is upcast. In float32,
    float16 and bfloat16 alike, the result is that of the authors' loop, `dt = 1.0 / N; x = x + dt * v`.

    Args:
        num_train_timesteps: the timestep at t = 0.
        velocity_direction: what the model predicts: "data" for data - noise (InstaFlow), "noise" for noise - data
            (Stable Diffusion 3, Flux).
        shift: warp of the grid, sigma' = shift * sigma / (1 + (shift - 1) * sigma) with sigma = 1 - t; 1 is none.
        prediction_type: always stored as "flow_prediction", so that training scripts written for diffusion stop
            instead of training epsilon.

    Example:
        ```python
        scheduler = RectifiedFlowEulerScheduler()
        pipeline = StableDiffusionPipeline.from_pretrained("XCLiu/instaflow_0_9B_from_sd_1_5", scheduler=scheduler)
        image = pipeline("a red apple", num_inference_steps=1, guidance_scale=1.0).images[0]
        ```
    """

    _compatibles: list[str] = []  # noqa: RUF012 (the type is diffusers')
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        velocity_direction: VelocityDirection = "data",
        shift: float = 1.0,
        prediction_type: str = "flow_prediction",
    ) -> None:
        grid = _uniform_sigmas("num_train_timesteps", num_train_timesteps)
        if not isinstance(shift, Real):
            raise TypeError(f"shift must be a number, got {shift!r}. Pass a float, 1 for none.")
        if velocity_direction not in get_args(VelocityDirection):
            raise ValueError(
                "velocity_direction must be 'data' (the model predicts data - noise) or 'noise' (noise - data), got "
                f"{velocity_direction!r}."
            )
        if not 0 < shift < math.inf:
            raise ValueError(f"shift must be above 0 and finite (1 is no shift), got {shift}.")
        if prediction_type not in _PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type must be one of {', '.join(_PREDICTION_TYPES)}, got {prediction_type!r}. Use a "
                "diffusion scheduler for a model that predicts something else."
            )
        # Stored explicitly, not as a default: `DDIMScheduler.from_config(ours.config)` then refuses instead of
        # assuming epsilon.
        self.register_to_config(prediction_type="flow_prediction")
        if "_use_default_values" in self.config:
            defaults = [name for name in self.config["_use_default_values"] if name != "prediction_type"]
            self.register_to_config(_use_default_values=defaults)
        self.init_noise_sigma = 1.0
        self._set_grid(grid, device=None)
        # The grid above is for code that reads `timesteps` without sampling; sampling sets its own.
        self.num_inference_steps: int | None = None

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Keep only those entries of another scheduler's config that have the same meaning here.

        `from_config(pipeline.scheduler.config)` must not take over a diffusion scheduler's betas and prediction type.
        """
        if "velocity_direction" not in config_dict:
            # DPM-Solver++, UniPC and others become flow schedulers by a setting, which `export_diffusers` uses.
            of_a_flow = "shift" in config_dict or config_dict.get("use_flow_sigmas")
            if of_a_flow and "velocity_direction" not in kwargs:
                raise ValueError(
                    "The config of a flow scheduler must contain velocity_direction. Models for diffusers' flow "
                    f"schedulers need {cls.__name__}.from_config(config, velocity_direction='noise')."
                )
            own = {"num_train_timesteps": config_dict[FLOW_TIMESTEPS]} if FLOW_TIMESTEPS in config_dict else {}
            config_dict = {key: config_dict[key] for key in ("num_train_timesteps", "shift") if key in config_dict}
            config_dict |= own
        # Not arguments: the path of a reflow that is not straight, see `require_straight`, and keys of `for_pipeline`.
        recorded = {key: config_dict[key] for key in ("interpolation", *_GRID, *_SIZES) if key in config_dict}
        for name in ("sigma_min", "shift_terminal"):
            if not (isinstance(value := recorded.get(name) or 0, Real) and 0 <= float(value) < 1):
                raise ValueError(f"The scheduler's config must have a number in [0, 1) as {name}, got {value!r}.")
        config_dict = {key: value for key, value in config_dict.items() if key not in recorded}
        arguments, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        return arguments, unused, {**hidden, **recorded}

    @classmethod
    def for_pipeline(cls, pipeline: Any, uniform: bool = False) -> "RectifiedFlowEulerScheduler":
        """Return a scheduler that takes the place of the scheduler of a flow pipeline of diffusers.

        `pipeline.scheduler = RectifiedFlowEulerScheduler.for_pipeline(pipeline)` generates the images of
        FlowMatchEulerDiscreteScheduler, and makes Euler steps in place of a multistep solver with flow sigmas.

        Args:
            uniform: N equal steps without shift, as students are trained. Sigmas that the pipeline passes are kept.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler  # imports scipy

        stock: Any = getattr(pipeline, "scheduler", None)
        config = getattr(stock, "config", {})
        is_ours, is_euler = isinstance(stock, cls), isinstance(stock, FlowMatchEulerDiscreteScheduler)
        if not (is_ours or is_euler or config.get("use_flow_sigmas")):
            raise TypeError(f"Expected a pipeline with a flow scheduler of diffusers, got {type(stock).__name__}.")
        if is_ours and not uniform:
            return stock.from_config(config)
        others = [name for name in _OTHERS if config.get(name)]
        if others and not uniform:
            raise ValueError(f"{cls.__name__} has no {others[0]}. Pass uniform=True, or set it to False.")
        direction = config.get("velocity_direction") or ("data" if config.get("invert_sigmas") else "noise")
        shift = stock.shift if is_euler else config.get("shift", config.get("flow_shift", 1.0))
        ours: Any = cls.from_config(config, velocity_direction=direction, shift=1.0 if uniform else shift)
        kept = {key: config[key] for key in (*_GRID, *_SIZES, _STUDENT_STEPS) if key in config}
        kept = {"use_dynamic_shifting": False, **kept, "sigma_min": stock.sigma_min if is_euler else None}
        if uniform:
            kept |= {"use_dynamic_shifting": False, "shift_terminal": None, "sigma_min": None}
        ours.register_to_config(**kept)
        return ours

    @property
    def step_index(self) -> int | None:
        """Return the position on the grid of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Return the position on the grid of the first step, if a pipeline set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the position of the first step on the grid, so that it is not looked up from a timestep."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        start: float = 0.0,
    ) -> None:
        """Set the grid of the next run: N equal steps from `start` to 1, or a grid from the caller.

        Args:
            device: of `timesteps`; the grid itself, `sigmas`, stays on the CPU.
            timesteps: the grid as timesteps, descending, without the final 0; after `for_pipeline`, or of `sigmas`.
            sigmas: the grid as 1 - t, descending, without the final 0; warped by `shift` or `mu` like our own.
            mu: logarithm of a shift for this run, instead of the config's.
            start: flow time at which the run starts, in [0, 1).
        """
        end = self.config.get("sigma_min")
        if timesteps is not None and sigmas is not None and end is None:
            raise ValueError("Pass timesteps or sigmas, not both: they are the same grid in two units.")
        given = timesteps if sigmas is None else sigmas
        if given is None:
            if num_inference_steps is None:
                raise ValueError("Pass num_inference_steps, timesteps or sigmas: the length of the grid is unknown.")
            if not isinstance(start, Real):
                raise TypeError(f"start must be a number in [0, 1), got {start!r}. Pass a float.")
            if not 0 <= start < 1:
                raise ValueError(f"start, the flow time of the first step, must be in [0, 1), got {start}.")
            grid = _uniform_sigmas("num_inference_steps", num_inference_steps)
            if end is not None:  # some pipelines set the attribute
                grid = torch.linspace(1, vars(self).get("sigma_min", end), len(grid), dtype=torch.float64)
        else:
            if start != 0:
                raise ValueError("Pass start or a grid, not both: the grid defines its own start.")
            try:
                grid = torch.as_tensor(given, dtype=torch.float64, device="cpu")
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"A grid must be a list of numbers or a tensor, got {given!r}: {error}.") from error
            if sigmas is None:
                grid = 1 - timestep_to_time(grid, self.config["num_train_timesteps"])
            self._check_grid(grid, num_inference_steps)
        if mu is not None and not math.isfinite(mu):
            raise ValueError(f"mu, the logarithm of a shift, must be finite, got {mu}. Omit it for the config's.")
        # Timesteps are used unchanged: they are the times at which the model is evaluated.
        shifted = self._shifted(grid, mu) if timesteps is None or sigmas is not None else grid
        self._set_grid((1 - start) * shifted, device)
        if given is None and shifted is grid and end is None:
            # Exactly 1 / N, as in the authors' loop, not a difference of two rounded numbers.
            self._step_sizes = [(1 - start) / len(grid)] * len(grid)
        if sigmas is not None and timesteps is not None:
            self.timesteps = torch.as_tensor(timesteps, dtype=torch.float32).to(device)

    def _shifted(self, sigmas: Tensor, mu: float | None) -> Tensor:
        """Return sigmas warped by the shift of the config or of `mu`, and the same tensor if there is none."""
        config, shift = self.config, self.config["shift"]
        if config.get("use_dynamic_shifting", mu is not None):
            if mu is None:
                raise ValueError("The shift of this pipeline depends on the image size. Pass mu, its logarithm.")
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        if shift != 1:
            sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        end = config.get("shift_terminal")
        if end and sigmas[-1] < 1:
            sigmas = 1 - (1 - sigmas) * (1 - end) / (1 - sigmas[-1])
        return sigmas

    def _check_grid(self, sigmas: Tensor, num_inference_steps: int | None) -> None:
        """Check a caller's grid: one-dimensional, sigmas in (0, 1], strictly descending."""
        if num_inference_steps is not None and num_inference_steps != len(sigmas):
            raise ValueError(f"num_inference_steps is {num_inference_steps}, the grid has {len(sigmas)} steps.")
        in_range = sigmas.ndim == 1 and len(sigmas) > 0 and bool(((sigmas > 0) & (sigmas <= 1)).all())
        if not in_range or not bool((sigmas.diff() < 0).all()):
            raise ValueError(
                f"A grid must descend strictly within (0, {self.config['num_train_timesteps']}] as timesteps, (0, 1] "
                f"as sigmas, got sigmas {sigmas.tolist()}. Omit the final 0, which is added."
            )

    def _set_grid(self, sigmas: Tensor, device: str | torch.device | None) -> None:
        """Store the grid `sigmas`, `(N,)` float64 on the CPU, and the values derived from it; reset to its start."""
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        self.sigmas = 1 - sigmas if self.config.get("invert_sigmas") else sigmas  # those of Mochi ascend
        timesteps = time_to_timestep(1 - self.sigmas[:-1], self.config["num_train_timesteps"])
        # No wait on CUDA: the copy from the CPU's memory is staged before the call returns.
        on_cuda = device is not None and torch.device(device).type == "cuda"
        self.timesteps = timesteps.to(torch.float32).to(device, non_blocking=on_cuda)
        self._step_sizes: list[float] = self.sigmas.diff().abs().tolist()
        self.num_inference_steps = len(timesteps)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the sample unchanged: a flow model takes x_t itself. Pipelines call this before each forward pass."""
        return sample

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Return the position of a timestep on the grid.

        For an element of `timesteps`, which a pipeline's loop passes, the position follows from its memory address.
        Only other tensors are compared by value, which requires waiting for the device.
        """
        if isinstance(timestep, Tensor) and timestep.ndim == 0 and _share_memory(timestep, self.timesteps):
            return int(timestep.storage_offset() - self.timesteps.storage_offset())
        distance = (self.timesteps - timestep).abs()
        index = int(distance.argmin())
        if not distance[index] <= 1e-6 * self.config["num_train_timesteps"]:
            raise ValueError(
                f"timestep {float(timestep)} is not on the grid of {len(self.timesteps)} steps; pass one of "
                "scheduler.timesteps (floats, not their indices)."
            )
        return index

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take one Euler step towards the data: x_{t+dt} = x_t + dt * v(x_t, t), dt = 1 / N by default.

        Steps follow the grid of `set_timesteps`; the last one ends exactly at t = 1.

        Args:
            model_output: the prediction at x_t, `(B, C, H, W)`, after guidance; its sign is `velocity_direction`.
            timestep: locates the first step on the grid, unless `set_begin_index` set it. Later steps use the position
                on the grid.
            sample: x_t, `(B, C, H, W)`; its dtype is kept.
        """
        if self.num_inference_steps is None:
            raise ValueError("There is no grid yet: call set_timesteps(num_inference_steps) before step.")
        _check_tensors(model_output=model_output, sample=sample)
        index = self._step_index
        if index is None:
            index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if index >= self.num_inference_steps:
            raise ValueError(f"All {len(self.timesteps)} steps are taken: call set_timesteps before another run.")
        self._step_index = index + 1
        displacement = self._step_sizes[index] * model_output
        towards_data = self.config["velocity_direction"] == "data"
        moved = (sample + displacement if towards_data else sample - displacement).to(sample.dtype)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the point of the straight path at any real timestep: x_t = t * data + (1 - t) * noise.

        Args:
            original_samples: data, `(B, C, H, W)`; its dtype is kept, the path is computed in float32 or wider.
            noise: `(B, C, H, W)`.
            timesteps: `(B,)`, or one for all, in [0, num_train_timesteps]; not rounded and not restricted to the grid.
        """
        require_straight(self, "Adding noise to an image")
        _check_tensors(original_samples=original_samples, noise=noise)
        if not isinstance(timesteps, Tensor):
            raise TypeError(f"timesteps must be a tensor, got {timesteps!r}. Make one: torch.tensor([500.0]).")
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        timesteps = timesteps.to(original_samples.device, dtype)
        if timesteps.ndim > 1 or timesteps.numel() not in (1, len(original_samples)):
            shapes = f"({len(original_samples)},), or one for all; got shape {tuple(timesteps.shape)}"
            raise ValueError(f"timesteps must hold one value per sample, shape {shapes}.")
        t = timestep_to_time(timesteps, self.config["num_train_timesteps"])
        t = 1 - t if self.config.get("invert_sigmas") else t
        t = t.reshape(-1, *[1] * (original_samples.ndim - 1))
        return (t * original_samples + (1 - t) * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Return the training target at every t: data - noise, or its negative depending on `velocity_direction`.

        Args:
            sample: data, `(B, C, H, W)`, under the name that diffusers' training scripts use.
            noise: `(B, C, H, W)`.
            timesteps: accepted for those scripts; a straight path has a single velocity.
        """
        require_straight(self, "The target data - noise")
        _check_tensors(sample=sample, noise=noise)
        return sample - noise if self.config["velocity_direction"] == "data" else noise - sample

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]


def student_steps(scheduler: Any) -> int:
    """Return the number of steps that a model was distilled to, as `record_student_steps` wrote it; 1 by default."""
    return scheduler.config.get(_STUDENT_STEPS, 1)


def record_student_steps(scheduler: Any, steps: int) -> None:
    """Record in the scheduler's config that its model was distilled to more than one step."""
    if steps > 1:
        scheduler.register_to_config(**{_STUDENT_STEPS: steps})


def require_straight(scheduler: Any, what: str) -> None:
    """Raise if a flow was trained along another path, as `reflow --interpolation` records in the scheduler's config.

    Sampling, inversion and straightness integrate the velocity, whatever its path. Everything else assumes that x_t is
    t * data + (1 - t) * noise, and that data is x_t + (1 - t) * velocity.
    """
    interpolation = scheduler.config.get("interpolation", "straight")
    if interpolation != "straight":
        raise ValueError(
            f"{what} needs a flow with the straight path, got interpolation={interpolation!r}. Use its text-to-image "
            "pipeline, or reflow with interpolation='straight'."
        )


def _uniform_sigmas(name: str, count: int) -> Tensor:
    """Return sigma_i = 1 - i / N for i = 0 ... N - 1, `(N,)`, float64, where the argument `name` is N."""
    if isinstance(count, bool) or not hasattr(count, "__index__"):
        raise TypeError(f"{name} must be an integer, got {count!r}.")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}.")
    return 1 - torch.arange(count, dtype=torch.float64) / count


def _check_tensors(**tensors: Tensor) -> None:
    """Raise unless all are tensors of the same shape: torch would silently broadcast and sample something else."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"{name} must be a tensor (B, C, H, W), got {kind}; of a model, its .sample.")
    if len({value.shape for value in tensors.values()}) > 1:
        shapes = " and ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
        raise ValueError(f"Expected tensors of one shape (B, C, H, W), got {shapes}. Nothing is broadcast here.")


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.untyped_storage()._cdata == other.untyped_storage()._cdata
