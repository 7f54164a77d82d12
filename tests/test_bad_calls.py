"""Bad calls of every public function and class: an error of ours that says what was expected, what came, what to do.

Wrong types, shapes, ranges and dtypes, NaN, empty batches, no steps, negative strengths, odd sizes. An error counts if
it is raised by a `raise` statement, of this package or of diffusers' own checks of arguments: not if it is what torch
or Python say deep inside.
"""

import linecache
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import rectified_diffusers as rd
from tests.tiny import make_components, make_diffusion_scheduler, make_tiny_pipeline
from tests.training.helpers import make_dataset

NAN, INF = float("nan"), float("inf")
PICTURE = Image.new("RGB", (32, 32))
LATENTS = torch.zeros(1, 4, 4, 4)
CONFIG = rd.TripletConfig(num_triplets=1)
RUN = {"output_dir": Path("run")}

# Names that take nothing that could be wrong, or that other calls make.
NO_ARGUMENTS = {"ModelMixin", "SchedulerMixin", "__version__", "bundled_checkpoint", "register"}
RESULTS = {"AppliedDelta", "Evaluation", "FlowBatch", "Optimized", "SwappedComponents", "WeightDelta"}

Call = Callable[[Any], object]
Case = tuple[str, Call, str]  # public name, call with what `world` has, part of the message


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """What calls need that are right but for one argument."""
    folder = tmp_path_factory.mktemp("world")
    pipeline = make_tiny_pipeline("flow")
    pipeline.set_progress_bar_config(disable=True)
    return SimpleNamespace(
        folder=folder,
        pipe=pipeline,
        diffusion=make_tiny_pipeline("diffusion"),
        dataset=make_dataset(folder / "triplets"),
        scheduler=rd.RectifiedFlowEulerScheduler(),
        weights={"a": torch.zeros(2)},
    )


def laid(steps: int = 2) -> rd.RectifiedFlowEulerScheduler:
    scheduler = rd.RectifiedFlowEulerScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


def options(name: str, *cases: tuple[str, Any, str]) -> list[Case]:
    """Cases of a config: one option with one wrong value each."""
    made = {"num_triplets": 1}
    required = {"TripletConfig": made, "RealTripletConfig": made, "EvaluationConfig": {}}.get(name, RUN)
    make = lambda key, value: lambda w: getattr(rd, name)(**{**required, key: value})  # noqa: E731
    return [(name, make(key, value), f"{key} must be {text}") for key, value, text in cases]


CONFIGS: list[Case] = [
    *options(
        "TripletConfig",
        ("num_triplets", "3", "a whole number, got '3'"),
        ("num_triplets", 0, "at least 1, got 0"),
        ("guidance_scale", "5", "a number"),
        ("guidance_scale", NAN, "a finite number"),
        ("height", 8.0, "a whole number or None"),
        ("solver", "rk4", "one of"),
        ("storage_dtype", torch.float16, "one of"),
        ("store_text_embeddings", "yes", "True or False"),
    ),
    *options(
        "EvaluationConfig",
        ("steps", 1, "a tuple, each item a whole number"),
        ("steps", (0,), "one or more different numbers of at least 1"),
        ("seeds", ("a",), "a tuple, each item a whole number"),
        ("num_pictures", 1.5, "a whole number"),
        ("guidance_scale", -1.0, "a finite number of at least 0"),
    ),
    *options(
        "TrainerConfig",
        ("max_steps", 0, "at least 1"),
        ("max_steps", True, "a whole number"),
        ("learning_rate", NAN, "greater than 0"),
        ("learning_rate", "1e-4", "a number"),
        ("ema_decay", 1.0, "in"),
        ("validation_prompts", "a cat", "a tuple, each item a text, got 'a cat'"),
        ("validation_guidance_scale", NAN, "finite"),
        ("output_dir", None, "a path"),
        ("mixed_precision", "fp8", "one of"),
    ),
    *options("RealTripletConfig", ("inversion_time", 0.0, "in")),
    *options("ReflowConfig", ("prompt_dropout", NAN, "in"), ("time_density", None, "one of")),
    *options("DistillConfig", ("loss", 1, "one of"), ("batch_size", "8", "a whole number")),
    *options("ProgressiveConfig", ("teacher_steps", "8", "a whole number"), ("student_steps", 0, "at least 1")),
    *options(
        "DistributionMatchingConfig",
        ("fake_updates", "5", "a whole number"),
        ("fake_learning_rate", NAN, "greater than 0"),
        ("teacher_guidance_scale", NAN, "finite"),
        ("min_t", 1.0, "in"),
    ),
    ("ReflowConfig", lambda w: rd.ReflowConfig(learning_rat=1.0, **RUN), "learning_rat"),
    ("ProgressiveConfig", lambda w: rd.ProgressiveConfig(teacher_steps=6, **RUN), "student_steps times 2, 4, 8"),
]

SCHEDULER = "RectifiedFlowEulerScheduler"
SCHEDULERS: list[Case] = [
    (SCHEDULER, lambda w: rd.RectifiedFlowEulerScheduler("1000"), "num_train_timesteps must be an integer"),
    (SCHEDULER, lambda w: rd.RectifiedFlowEulerScheduler(0), "num_train_timesteps must be at least 1, got 0"),
    (SCHEDULER, lambda w: rd.RectifiedFlowEulerScheduler(shift="3"), "shift must be a number, got '3'"),
    (SCHEDULER, lambda w: rd.RectifiedFlowEulerScheduler(shift=NAN), "shift must be above 0"),
    (SCHEDULER, lambda w: rd.RectifiedFlowEulerScheduler(shift=INF), "shift must be above 0 and finite"),
    (SCHEDULER, lambda w: rd.RectifiedFlowEulerScheduler(velocity_direction="up"), "velocity_direction must be"),
    (SCHEDULER, lambda w: rd.RectifiedFlowEulerScheduler(prediction_type="epsilon"), "prediction_type must be one of"),
    (SCHEDULER, lambda w: w.scheduler.set_timesteps(0), "at least 1, got 0"),
    (SCHEDULER, lambda w: w.scheduler.set_timesteps(-1), "at least 1, got -1"),
    (SCHEDULER, lambda w: w.scheduler.set_timesteps(1.5), "an integer, got 1.5"),
    (SCHEDULER, lambda w: w.scheduler.set_timesteps("4"), "an integer, got '4'"),
    (SCHEDULER, lambda w: w.scheduler.set_timesteps(), "Pass num_inference_steps, timesteps or sigmas"),
    (
        SCHEDULER,
        lambda w: w.scheduler.set_timesteps(2, start=NAN),
        "flow time of the first step, must be in",
    ),
    (SCHEDULER, lambda w: w.scheduler.set_timesteps(2, start=-0.5), "in [0, 1), got -0.5"),
    (SCHEDULER, lambda w: w.scheduler.set_timesteps(2, start="0"), "start must be a number"),
    (SCHEDULER, lambda w: w.scheduler.set_timesteps(2, mu=NAN), "mu, the logarithm of a shift, must be finite"),
    (SCHEDULER, lambda w: w.scheduler.set_timesteps(timesteps=["a"]), "A grid must be a list of numbers"),
    (SCHEDULER, lambda w: w.scheduler.set_timesteps(timesteps=[NAN]), "A grid must descend strictly"),
    (SCHEDULER, lambda w: w.scheduler.set_timesteps(timesteps=[]), "A grid must descend strictly"),
    (SCHEDULER, lambda w: w.scheduler.set_timesteps(sigmas=[[1.0]]), "A grid must descend strictly"),
    (SCHEDULER, lambda w: rd.RectifiedFlowEulerScheduler().step(LATENTS, 1000, LATENTS), "call set_timesteps"),
    (SCHEDULER, lambda w: laid().step(LATENTS, 3, LATENTS), "is not on the grid"),
    (SCHEDULER, lambda w: laid().step(LATENTS, NAN, LATENTS), "is not on the grid"),
    (SCHEDULER, lambda w: laid().step(LATENTS[:, :3], 1000, LATENTS), "Expected tensors of one shape"),
    (SCHEDULER, lambda w: laid().step(None, 1000, LATENTS), "model_output must be a tensor"),
    (SCHEDULER, lambda w: w.scheduler.add_noise(LATENTS, LATENTS[0], torch.ones(1)), "Expected tensors of one shape"),
    (SCHEDULER, lambda w: w.scheduler.add_noise(LATENTS, LATENTS, 500), "timesteps must be a tensor"),
    (SCHEDULER, lambda w: w.scheduler.add_noise(LATENTS, LATENTS, torch.ones(2)), "one value per sample"),
    (SCHEDULER, lambda w: w.scheduler.get_velocity(LATENTS, 0), "noise must be a tensor"),
]

MODELS: list[Case] = [
    ("StackedUNet", lambda w: rd.StackedUNet.from_unet(None), "Expected UNet2DConditionModels"),
    ("StackedUNet", lambda w: rd.StackedUNet.from_unet(w.pipe.unet, w.pipe.vae), "got AutoencoderKL"),
    ("DiffusionVelocityUNet", lambda w: rd.DiffusionVelocityUNet(), "diffusion_schedule must contain"),
    ("DiffusionVelocityUNet", lambda w: rd.DiffusionVelocityUNet.from_unet(None, None), "Expected a plain UNet2D"),
    ("DiffusionVelocityUNet", lambda w: rd.DiffusionVelocityUNet.from_unet(w.pipe.unet, None), "got NoneType"),
    ("DiffusionVelocityUNet", lambda w: rd.DiffusionVelocityUNet.from_unet(w.pipe.unet, w.scheduler), "A flow needs"),
    ("FlowObjective", lambda w: rd.FlowObjective(at_noise="x"), "at_noise must be of type Real"),
    ("FlowObjective", lambda w: rd.FlowObjective(at_noise=NAN), "in [0, 1], got nan"),
    ("FlowObjective", lambda w: rd.FlowObjective(time_density="uniform"), "time_density must be of type"),
    ("FlowObjective", lambda w: rd.FlowObjective(loss_kind="l3"), "loss_kind must be one of"),
    ("FlowObjective", lambda w: rd.FlowObjective().prepare(noise=LATENTS, data=LATENTS[:, :2]), "of one shape"),
    ("FlowObjective", lambda w: rd.FlowObjective().prepare(noise=LATENTS[:0], data=LATENTS[:0]), "(0, 4, 4, 4)"),
    ("FlowObjective", lambda w: rd.FlowObjective().prepare(noise=None, data=LATENTS), "noise must be of type Tensor"),
    ("FlowObjective", lambda w: rd.FlowObjective().prepare(noise=LATENTS.int(), data=LATENTS), "got torch.int32"),
]

STEPS = {"num_inference_steps": 1}


def draws(*cases: tuple[dict[str, Any], str]) -> list[Case]:
    make = lambda changes: lambda w: w.pipe(**{"prompt": "a cat", **changes})  # noqa: E731
    return [("RectifiedFlowPipeline", make(changes), text) for changes, text in cases]


PIPELINES: list[Case] = [
    *draws(
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        ({"num_inference_steps": 2.5}, "an integer, got 2.5"),
        ({"guidance_scale": NAN}, "guidance_scale must be a finite number"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "1"}, "guidance_scale must be a number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1"),
        ({"prompt": []}, "prompt must hold at least one text"),
        ({"prompt": ["a", 1]}, "prompt must be a text or a list of texts"),
        ({"prompt": 1}, "prompt"),
        ({"height": 33, "width": 32}, "divisible by 8"),
        ({"latents": LATENTS * NAN}, "latents must be finite"),
        ({"latents": LATENTS[:, :3]}, "latents must be (B, 4, H, W)"),
        ({"latents": LATENTS[:0]}, "with B at least 1"),
        ({"latents": LATENTS[0]}, "latents must be (B, 4, H, W)"),
        ({"latents": LATENTS.int()}, "latents must be in floating point"),
        ({"latents": [0.0]}, "latents must be a tensor"),
        ({"latents": LATENTS.expand(2, -1, -1, -1)}, "one noise for each of 1 images, got 2"),
        ({"prompt": None, "prompt_embeds": torch.full((1, 77, 16), NAN)}, "prompt_embeds must be finite"),
        ({"clip_skip": 99}, "clip_skip must be in"),
        ({"num_inference_step": 1}, "There is no argument 'num_inference_step'"),
    ),
    ("RectifiedFlowPipeline", lambda w: setattr(w.pipe, "scheduler", make_diffusion_scheduler()), "needs a Rectified"),
]

TRAINING: list[Case] = [
    ("Triplets", lambda w: rd.Triplets(["a"], LATENTS, [0.0]), "data must be of type Tensor"),
    ("Triplets", lambda w: rd.Triplets([], LATENTS, LATENTS), "a prompt for each"),
    ("Triplets", lambda w: rd.Triplets(["a"], LATENTS, LATENTS[:, :3]), "of one shape"),
    ("TripletDataset", lambda w: rd.TripletDataset(3), "PathLike"),
    ("TripletDataset", lambda w: w.dataset.rows([-1]), "Indices must be in"),
    ("TripletDataset", lambda w: w.dataset.rows([10**9]), "Indices must be in"),
    ("verify_triplets", lambda w: rd.verify_triplets(None), "PathLike"),
    (
        "generate_triplets",
        lambda w: rd.generate_triplets(None, ["a"], w.folder / "t", CONFIG),
        "of diffusers, got None",
    ),
    ("generate_triplets", lambda w: rd.generate_triplets(w.pipe, [], w.folder / "t", CONFIG), "at least one prompt"),
    ("generate_triplets", lambda w: rd.generate_triplets(w.pipe, "a", w.folder / "t", CONFIG), "a list of texts"),
    (
        "generate_triplets",
        lambda w: rd.generate_triplets(w.pipe, [1], w.folder / "t", CONFIG),
        "prompts must be",
    ),
    ("generate_triplets", lambda w: rd.generate_triplets(w.pipe, None, w.folder / "t", CONFIG), "a list of texts"),
    ("generate_triplets", lambda w: rd.generate_triplets(w.pipe, ["a"], w.folder / "t", {}), "config must be of type"),
    ("generate_triplets", lambda w: rd.generate_triplets(w.pipe, ["a"], None, CONFIG), "PathLike"),
    ("open_prompts", lambda w: rd.open_prompts(None), "PathLike"),
    ("open_prompts", lambda w: rd.open_prompts("prompts.xlsx"), "Prompts are read from"),
    ("read_prompts", lambda w: rd.read_prompts(3), "PathLike"),
    ("Trainer", lambda w: rd.Trainer(w.pipe, w.dataset, None), "abstract"),  # pyright: ignore[reportAbstractUsage]
    ("ReflowTrainer", lambda w: rd.ReflowTrainer(w.pipe, w.dataset, {}), "config must be of type ReflowConfig"),
    ("ReflowTrainer", lambda w: rd.ReflowTrainer(w.pipe, "t", rd.ReflowConfig(**RUN)), "dataset must be of type Trip"),
    (
        "ReflowTrainer",
        lambda w: rd.ReflowTrainer(None, w.dataset, rd.ReflowConfig(**RUN)),
        "of diffusers, got None",
    ),
    (
        "DistillTrainer",
        lambda w: rd.DistillTrainer(w.pipe, w.dataset, rd.ReflowConfig(**RUN)),
        "DistillConfig",
    ),
    ("JoinedTriplets", lambda w: rd.JoinedTriplets(3), "folders must be of type"),  # pyright: ignore[reportArgumentType]
    (
        "generate_real_triplets",
        lambda w: rd.generate_real_triplets(None, w.folder, w.folder / "r", rd.RealTripletConfig(num_triplets=1)),
        "of diffusers, got None",
    ),
    ("ProgressiveTrainer", lambda w: rd.ProgressiveTrainer(w.pipe, w.dataset, CONFIG), "of type ProgressiveConfig"),
    (
        "DistributionMatchingTrainer",
        lambda w: rd.DistributionMatchingTrainer(w.pipe, w.dataset, rd.DistributionMatchingConfig(**RUN), "teacher"),
        "of diffusers, got str",
    ),
]

WEIGHTS: list[Case] = [
    ("compute_weight_delta", lambda w: rd.compute_weight_delta(3, 4, "d.safetensors"), "a source of weights must be"),
    ("compute_weight_delta", lambda w: rd.compute_weight_delta({}, {}, "d.bin"), "saved as *.safetensors"),
    ("compute_weight_delta", lambda w: rd.compute_weight_delta({}, {}, "d.safetensors", dtype="int8"), "one of"),
    ("compute_weight_delta", lambda w: rd.compute_weight_delta({}, w.weights, "d.safetensors"), "holds no tensors"),
    ("load_weight_delta", lambda w: rd.load_weight_delta(None), "a source of weights must be"),
    ("load_weight_delta", lambda w: rd.load_weight_delta({"a": [1.0]}), "the weight 'a' must be of type Tensor"),
    ("load_weight_delta", lambda w: rd.load_weight_delta({"a": torch.zeros(1).int()}), "16 to 64 bits floating point"),
    ("apply_weight_delta", lambda w: rd.apply_weight_delta(None, w.weights), "unet must be of type Module"),
    ("apply_weight_delta", lambda w: rd.apply_weight_delta(w.pipe.unet, 3), "delta must be of type"),
    ("apply_weight_delta", lambda w: rd.apply_weight_delta(w.pipe.unet, []), "at least one delta"),
    ("apply_weight_delta", lambda w: rd.apply_weight_delta(w.pipe.unet, w.weights, "x"), "scale must be of type Real"),
    ("apply_weight_delta", lambda w: rd.apply_weight_delta(w.pipe.unet, w.weights, NAN), "must be finite, got nan"),
    ("apply_weight_delta", lambda w: rd.apply_weight_delta(w.pipe.unet, w.weights, [1, 2]), "one for each"),
    ("apply_weight_delta", lambda w: rd.apply_weight_delta(w.pipe.unet, w.weights), "of the weights of"),
    ("swap_components", lambda w: rd.swap_components(None, "folder"), "swap_components needs a diffusers pipeline"),
    ("swap_components", lambda w: rd.swap_components(w.pipe, "folder", ["vea"]), "has no model 'vea'"),
    ("save_portable", lambda w: rd.save_portable(None, w.folder / "p"), "save_portable needs a diffusers pipeline"),
    ("save_portable", lambda w: rd.save_portable(w.diffusion, w.folder / "p"), "needs a RectifiedFlowEulerScheduler"),
    ("export_diffusers", lambda w: rd.export_diffusers(None, w.folder / "e"), "export_diffusers needs"),
    ("export_diffusers", lambda w: rd.export_diffusers(w.pipe, w.folder / "e", "euler"), "scheduler must be one of"),
    (
        "export_diffusers",
        lambda w: rd.export_diffusers(w.pipe, w.folder / "e", solver_order=0),
        "solver_order must be",
    ),
    ("export_onnx", lambda w: rd.export_onnx(None, w.folder / "e"), "export_onnx needs a diffusers pipeline"),
    ("export_unet", lambda w: rd.export_unet(None, "u.safetensors"), "export_unet needs"),
    ("export_unet", lambda w: rd.export_unet(w.pipe, "u.safetensors", "onnx"), "unet_format must be one of"),
    ("export_unet", lambda w: rd.export_unet(w.pipe, "u.bin"), "ends in .safetensors"),
    ("tune", lambda w: rd.tune(None), "tune needs a diffusers pipeline"),
    ("tune", lambda w: rd.tune(w.pipe, height="64"), "height must be a whole number"),
    ("tune", lambda w: rd.tune(w.pipe, width=0), "width must be"),
    ("tune", lambda w: rd.tune(w.pipe, width=31), "width must be a multiple of"),
    ("optimize", lambda w: rd.optimize(None), "optimize needs a diffusers pipeline"),
    ("optimize", lambda w: rd.optimize(w.pipe, dtype="float16"), "dtype must be a torch.dtype"),
    ("optimize", lambda w: rd.optimize(w.pipe, compile="yes"), "compile must be True, False or 'auto'"),
    ("optimize", lambda w: rd.optimize(w.pipe, pack_weights=1.5), "pack_weights must be True, False or 'auto'"),
    ("optimize", lambda w: rd.optimize(w.pipe, decoder=3), "decoder must be an AutoencoderTiny"),
]

PICTURES: list[Case] = [
    ("slerp", lambda w: rd.slerp(1.0, LATENTS, 0.5), "start must be a tensor"),
    ("slerp", lambda w: rd.slerp(LATENTS, LATENTS[0], 0.5), "of one shape"),
    ("slerp", lambda w: rd.slerp(LATENTS, LATENTS, NAN), "in [0, 1], got nan"),
    ("slerp", lambda w: rd.slerp(LATENTS, LATENTS, "0"), "weight must be a number"),
    ("slerp", lambda w: rd.slerp(LATENTS, LATENTS * NAN, 0.5), "end must be finite"),
    ("slerp", lambda w: rd.slerp(LATENTS.int(), LATENTS.int(), 0.5), "in floating point"),
    ("interpolate", lambda w: rd.interpolate(None, ["a", "b"]), "interpolate needs a diffusers pipeline"),
    ("interpolate", lambda w: rd.interpolate(w.pipe, []), "at least two prompts or two seeds"),
    ("interpolate", lambda w: rd.interpolate(w.pipe, [1, 2]), "prompts must be a text or a list of texts"),
    ("interpolate", lambda w: rd.interpolate(w.pipe, "a", [0, 1.5]), "a seed must be a whole number"),
    ("interpolate", lambda w: rd.interpolate(w.pipe, "a", [0, -1]), "a seed must be at least 0"),
    ("interpolate", lambda w: rd.interpolate(w.pipe, ["a", "b"], frames=0), "frames must be at least 1"),
    ("interpolate", lambda w: rd.interpolate(w.pipe, ["a", "b"], frames=1.5), "frames must be a whole number"),
    ("interpolate", lambda w: rd.interpolate(w.pipe, ["a", "b"], num_inference_steps=0), "at least 1, got 0"),
    ("interpolate", lambda w: rd.interpolate(w.pipe, ["a", "b"], guidance_scale=NAN), "guidance_scale must be"),
    ("interpolate", lambda w: rd.interpolate(w.pipe, ["a", "b"], height=33), "height must be a multiple of"),
    ("save_animation", lambda w: rd.save_animation([], w.folder / "a.gif"), "images of one size"),
    ("save_animation", lambda w: rd.save_animation([LATENTS], w.folder / "a.gif"), "each of images must be of type"),
    ("save_animation", lambda w: rd.save_animation([PICTURE], w.folder / "a.avi"), ".gif or an .mp4"),
    ("save_animation", lambda w: rd.save_animation([PICTURE], w.folder / "a.gif", NAN), "frames_per_second must be"),
    ("save_animation", lambda w: rd.save_animation([PICTURE], w.folder / "a.gif", "9"), "frames_per_second must be"),
    ("invert", lambda w: rd.invert(None, PICTURE, "a"), "inversion needs a diffusers pipeline"),
    ("invert", lambda w: rd.invert(w.diffusion, PICTURE, "a"), "inversion needs a RectifiedFlowPipeline"),
    ("invert", lambda w: rd.invert(w.pipe, 3, "a"), "pictures: expected an image, got int"),
    ("invert", lambda w: rd.invert(w.pipe, [], "a"), "pictures: expected an image, got an empty list"),
    ("invert", lambda w: rd.invert(w.pipe, ["cat.png"], "a"), "pictures: expected an image, got str"),
    ("invert", lambda w: rd.invert(w.pipe, LATENTS * NAN, "a"), "latents must be finite"),
    ("invert", lambda w: rd.invert(w.pipe, LATENTS[:0], "a"), "with B at least 1"),
    (
        "invert",
        lambda w: rd.invert(w.pipe, LATENTS[:, :0], "a"),
        "pictures: expected the shape of an image, got (1, 0, 4, 4)",
    ),
    ("invert", lambda w: rd.invert(w.pipe, LATENTS.int() - 1, "a"), "pictures: expected integer levels"),
    ("invert", lambda w: rd.invert(w.pipe, LATENTS, 3), "prompts must be a text"),
    ("invert", lambda w: rd.invert(w.pipe, LATENTS, ["a", "b"]), "one per image"),
    ("invert", lambda w: rd.invert(w.pipe, LATENTS, "a", 0), "Expected steps >= 1"),
    ("invert", lambda w: rd.invert(w.pipe, LATENTS, "a", 1.5), "Expected a whole number of steps"),
    ("invert", lambda w: rd.invert(w.pipe, LATENTS, "a", solver="rk4"), "solver must be one of"),
    ("invert", lambda w: rd.invert(w.pipe, LATENTS, "a", guidance_scale=NAN), "guidance_scale must be"),
    ("invert", lambda w: rd.invert(w.pipe, LATENTS, "a", strength=-0.5), "in (0, 1], got -0.5"),
    ("invert", lambda w: rd.invert(w.pipe, LATENTS, "a", strength="1"), "strength must be of type Real"),
    ("edit", lambda w: rd.edit(w.pipe, LATENTS, "a", "b", strength=NAN), "in (0, 1], got nan"),
    ("edit", lambda w: rd.edit(w.pipe, LATENTS, "a", 3, steps=1), "prompts must be a text"),
    (
        "round_trip_error",
        lambda w: rd.round_trip_error(w.pipe, None, "a"),
        "pictures: expected an image, got NoneType",
    ),
    ("read_pictures", lambda w: rd.read_pictures(w.folder, 0), "size must be at least 1"),
    ("read_pictures", lambda w: rd.read_pictures(w.folder, "32"), "size must be a whole number"),
    ("evaluate", lambda w: rd.evaluate(None, None, "e", None, "a"), "evaluate needs a diffusers pipeline"),
    ("evaluate", lambda w: rd.evaluate(w.pipe, [], "e", rd.EvaluationConfig(), "a"), "pictures must be of type"),
    ("write_plots", lambda w: rd.write_plots(None), "PathLike"),
]

CASES = [*CONFIGS, *SCHEDULERS, *MODELS, *PIPELINES, *TRAINING, *WEIGHTS, *PICTURES]


@pytest.mark.parametrize(("name", "call", "text"), [pytest.param(*case, id=f"{case[0]}: {case[2]}") for case in CASES])
def test_bad_calls_are_told(world, name, call, text):
    with pytest.raises((TypeError, ValueError, IndexError)) as caught:
        call(world)
    assert text in str(caught.value)
    place = caught.traceback[-1]
    if place.path == Path(__file__) or "os.PathLike" in str(caught.value):  # Python's own check of the arguments
        return
    line = linecache.getline(str(place.path), place.lineno + 1).strip()
    assert line.startswith("raise"), f"no error of ours: {place.path}:{place.lineno + 1}: {line}"
    assert "torch" not in place.path.parts, f"an error of torch: {place.path}"


def test_every_public_name_is_called_badly():
    called = {name for name, _, _ in CASES}
    pipelines = {name for name in rd.__all__ if name.endswith("Pipeline")}  # all have one check of their calls
    assert called - pipelines == set(rd.__all__) - pipelines - NO_ARGUMENTS - RESULTS


@pytest.mark.parametrize("name", sorted(name for name in rd.__all__ if name.endswith("Pipeline")))
def test_every_pipeline_checks_its_calls(name):
    """The check comes before all else, so that a pipeline without models shows it."""
    pipeline: Any = object.__new__(getattr(rd, name))
    with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
        type(pipeline).__call__(pipeline, guidance_scale=NAN)


def test_img2img_refuses_strengths_outside_the_flow():
    pipeline = rd.RectifiedFlowImg2ImgPipeline(**make_components(), scheduler=None)
    for strength in (0.0, -0.5, 1.5, NAN):
        with pytest.raises(ValueError, match="strength"):
            pipeline("a cat", image=PICTURE, strength=strength)
