"""Every family is a teacher and a student: triplets, reflow, a LoRA in one step, and the stock pipeline loads both."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.generate import generate_triplets
from rectified_diffusers.data.manifest import Manifest
from rectified_diffusers.flow.ode import euler
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.conditioning import PromptConditioning, equal
from rectified_diffusers.training.config import DistillConfig, ProgressiveConfig, ReflowConfig
from rectified_diffusers.training.distill import DistillTrainer
from rectified_diffusers.training.lora import WEIGHTS, Adapter, fuse_lora, has_loader
from rectified_diffusers.training.progressive import ProgressiveTrainer
from rectified_diffusers.training.prompts import PromptEncoder
from rectified_diffusers.training.reflow import ReflowTrainer
from rectified_diffusers.training.student import require_steps
from tests.marks import slow_but
from tests.models_any.families import build
from tests.models_any.made_up import NoisyScheduler, make_made_up_pipeline
from tests.models_any.variants import TwoAtLeast

pytestmark = pytest.mark.usefixtures("plain_charts")
PROMPTS = ["a red apple", "two dogs at night"]
LAST = {
    "sd3": "proj_out",
    "flux": "proj_out",
    "aura_flow": "proj_out",
    "chroma": "proj_out",
    "sana": "proj_out",
    "lumina2": "norm_out.linear_2",
    "z_image": "all_final_layer.2-1.linear",
    "flux2_klein": "proj_out",
    "ovis_image": "proj_out",
    "cogview4": "proj_out",
    "ltx_video": "proj_out",
    "wan": "proj_out",
}
FAST = ("z_image", "wan")
RUN: dict[str, Any] = {"batch_size": 2, "warmup_steps": 0, "mixed_precision": "no", "save_every_steps": 100}


def make_triplets(pipeline: Any, folder: Path, options: Any, **settings: Any) -> TripletDataset:
    config = TripletConfig(
        **{
            "num_triplets": 4,
            "num_inference_steps": 3,
            "batch_size": 2,
            "storage_dtype": "float32",
            "call_options": json.dumps(options),
            **settings,
        }
    )
    pipeline.set_progress_bar_config(disable=True)
    return generate_triplets(pipeline, PROMPTS, folder, config, progress=False)


def make_image(pipeline: Any, arguments: dict[str, Any]) -> np.ndarray:
    """Return an image, or the frames of a video, in levels of 255."""
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(**{**arguments, "output_type": "np"}, generator=torch.Generator().manual_seed(3))[0]
    return 255 * np.asarray(made, dtype=np.float32)


def require_validation(path: Path, frames: int) -> None:
    """Check a row for one step and one for 25, and the GIF of a video: its middle frame is the image."""
    with Image.open(path.with_suffix(".png")) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    height = len(pixels) // 2
    assert np.abs(pixels[:height] - pixels[height:]).max() > 0
    assert path.with_suffix(".gif").exists() == (frames > 1)
    if frames > 1:
        with Image.open(path.with_suffix(".gif")) as video:
            assert getattr(video, "n_frames", 1) == frames
            video.seek(frames // 2)
            middle = np.asarray(video.convert("RGB"), dtype=np.float32)
        assert np.abs(middle - pixels).mean() < 8  # 256 colors


@pytest.mark.parametrize("name", slow_but(FAST, LAST))
def test_a_few_step_lora_of_any_family(name: str, tmp_path: Path) -> None:
    pipeline, options = build(name)
    dataset = make_triplets(pipeline, tmp_path / "triplets", options)
    assert dataset.manifest.settings["format"] == 2
    validation = {"validate_every_steps": 2, "validation_prompts": ("a cat",)}
    reflow = ReflowConfig(output_dir=tmp_path / "reflow", max_steps=2, prompt_dropout=0.5, **RUN, **validation)
    ReflowTrainer(pipeline, dataset, reflow).train()
    require_validation(tmp_path / "reflow" / "validation" / "step-00000002", options.get("num_frames", 1))
    type(pipeline).from_pretrained(tmp_path / "reflow")

    lora = {
        "lora_rank": 4,
        "lora_target_modules": (LAST[name],),
        "learning_rate": 5.0 if name == "wan" else 0.3,
        "ema_decay": 0.0,
    }
    trainer = DistillTrainer(
        pipeline, dataset, DistillConfig(output_dir=tmp_path / "lora", max_steps=4, **RUN, **lora)
    )
    arguments = trainer.denoiser.call_arguments(PROMPTS[0], 1)
    base = make_image(pipeline, arguments)
    network = trainer.train()
    expected = make_image(trainer.make_pipeline(network), arguments)
    assert np.abs(expected - base).mean() >= 5
    whole = make_image(type(pipeline).from_pretrained(tmp_path / "lora"), arguments)
    assert np.abs(whole - expected).max() <= 2

    component = trainer.denoiser.component
    if has_loader(type(pipeline), component):
        pipeline.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    else:
        getattr(pipeline, component).load_lora_adapter(tmp_path / "lora", prefix=component, weight_name=WEIGHTS)
    assert np.abs(make_image(pipeline, arguments) - expected).max() <= 2


def test_one_step_of_a_student_is_noise_plus_velocity(tmp_path: Path) -> None:
    """What training fits is what the stock pipeline of the finished folder computes."""
    pipeline, options = build("z_image")
    dataset = make_triplets(pipeline, tmp_path / "triplets", options, num_inference_steps=1, guidance_scale=0.0)
    triplets = dataset.rows(range(4))
    trainer = DistillTrainer(pipeline, dataset, DistillConfig(output_dir=tmp_path / "run", max_steps=1, **RUN))
    with torch.no_grad():
        velocity = trainer.predict_velocity(triplets.noise, torch.zeros(4), triplets.prompts)
    torch.testing.assert_close(triplets.noise + velocity, triplets.data, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", slow_but(["sd3", "lumina2"], ["sd3", "z_image", "lumina2"]))
def test_triplets_are_those_of_the_stock_call(name: str, tmp_path: Path) -> None:
    """With its own guidance, also where two passes do not repeat it."""
    pipeline, options = build(name)
    dataset = make_triplets(pipeline, tmp_path / "triplets", options, batch_size=1)
    triplets = dataset.rows([1])
    arguments = {**options, "num_inference_steps": 3, "latents": triplets.noise, "output_type": "latent"}
    torch.testing.assert_close(pipeline(PROMPTS[1], **arguments)[0], triplets.data, rtol=0, atol=1e-6)
    default = PipelineDenoiser(pipeline, options=options).call.default("guidance_scale")
    assert dataset.manifest.guidance_scale == default


def test_a_pipeline_that_no_one_has_seen_is_trained(tmp_path: Path) -> None:
    pipeline = make_made_up_pipeline()
    dataset = make_triplets(pipeline, tmp_path / "triplets", {})
    config = ReflowConfig(output_dir=tmp_path / "run", max_steps=2, **RUN)
    trainer = ReflowTrainer(pipeline, dataset, config)
    before = [weight.detach().clone() for weight in trainer.student.parameters]
    trainer.run_steps(0)
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.student.parameters, strict=True))


def test_a_network_without_lora_of_diffusers_gets_one_of_peft(tmp_path: Path) -> None:
    """Such as those of PRX and Lumina; the result equals the network with the LoRA fused into it."""
    pipeline = make_made_up_pipeline()
    dataset = make_triplets(pipeline, tmp_path / "triplets", {})
    lora: dict[str, Any] = {"lora_rank": 2, "lora_target_modules": ("leave",), "learning_rate": 0.3, "ema_decay": 0.0}
    config = DistillConfig(output_dir=tmp_path / "lora", max_steps=2, **RUN, **lora)
    trainer = DistillTrainer(pipeline, dataset, config)
    trainer.run_steps(0)
    network = trainer.averaged()
    Adapter.of(network, "predictor").save(type(pipeline), tmp_path)
    network = fuse_lora(network)
    assert network.state_dict().keys() == pipeline.predictor.state_dict().keys()
    loaded = PeftModel.from_pretrained(copy.deepcopy(pipeline.predictor), tmp_path)
    inputs = list(dataset.rows([0]).noise), torch.tensor([0.3]), pipeline.encode_prompt(["a cat"])
    with torch.no_grad():
        found, fused, base = loaded(*inputs)[0], network(*inputs)[0], pipeline.predictor(*inputs)[0]
    torch.testing.assert_close(found, fused)
    assert (found - base).norm() > 0.1 * base.norm()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("scaled", "times a factor of the step"), ("prompt", "does not depend on the prompt"), ("nan", "not finite")],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(fault: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"MadeUpPipeline cannot be .*{reason}"):
        make_triplets(make_made_up_pipeline(fault), tmp_path / "triplets", {})
    assert not (tmp_path / "triplets").exists()


def test_a_solver_that_adds_noise_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pipeline = make_made_up_pipeline()
    pipeline.scheduler = NoisyScheduler()
    with pytest.raises(TypeError, match="NoisyScheduler adds noise"):
        make_triplets(pipeline, tmp_path / "triplets", {})
    assert not (tmp_path / "triplets").exists()


def test_a_diffusion_transformer_is_a_teacher_and_no_student(tmp_path: Path) -> None:
    pipeline, options = build("pixart_sigma")
    dataset = make_triplets(pipeline, tmp_path / "triplets", options)
    assert dataset.manifest.settings["solver"] == "DPMSolverMultistepScheduler"
    with pytest.raises(TypeError, match="PixArtSigmaPipeline cannot be trained: it is a diffusion model"):
        ReflowTrainer(pipeline, dataset, ReflowConfig(output_dir=tmp_path / "run", max_steps=1, **RUN))


def test_triplets_of_another_layout_are_refused(tmp_path: Path) -> None:
    """Such as those of Flux by earlier releases, (4, 8, 8), which are tokens now."""
    pipeline, options = build("flux")
    dataset = make_triplets(pipeline, tmp_path / "triplets", options)
    older = {**dataset.manifest.settings, "format": 1, "latent_shape": [4, 8, 8]}
    dataset.manifest = Manifest.of({key: value for key, value in older.items() if key != "call_options"})
    with pytest.raises(ValueError, match=r"\(16, 16\), those of the triplets \(4, 8, 8\) \(format 1\)"):
        ReflowTrainer(pipeline, dataset, ReflowConfig(output_dir=tmp_path / "run", max_steps=1, **RUN))


RAGGED = ("z_image", "cogview4")  # their conditioning is as long as the prompt


@pytest.mark.parametrize("name", slow_but(["sd3"], [name for name in LAST if name not in RAGGED]))
def test_stored_conditioning_equals_that_of_the_text_encoders(name: str, tmp_path: Path) -> None:
    pipeline, options = build(name)
    dataset = make_triplets(pipeline, tmp_path / "triplets", options, store_text_embeddings=True)
    denoiser = PipelineDenoiser(pipeline, dataset.manifest.guidance_scale, options)
    encoder = PromptEncoder(denoiser, torch.device("cpu"))
    encoder.remember(dataset)
    encoder.use_stored(dataset.rows([1, 0]))
    found: Any = encoder(PROMPTS)
    assert isinstance(found, PromptConditioning)
    expected: Any = denoiser.encode(PROMPTS, "cpu")
    assert all(equal(one, two) for one, two in zip(found.trees, expected.trees, strict=True))


@pytest.mark.parametrize("name", slow_but(["z_image"], RAGGED))
def test_conditioning_of_varying_length_is_not_stored(name: str, tmp_path: Path) -> None:
    pipeline, options = build(name)
    with pytest.raises(ValueError, match=r"another shape for each prompt.*leave out store_text_embeddings"):
        make_triplets(pipeline, tmp_path / "triplets", options, store_text_embeddings=True)
    assert not (tmp_path / "triplets").exists()


def test_a_dropped_prompt_is_the_pipelines_own_unconditional(tmp_path: Path) -> None:
    pipeline, options = build("sdxl_euler")
    found: Any = PipelineDenoiser(pipeline, options=options).encode(["", "a cat"], "cpu")
    pooled = [tree["added_cond_kwargs"]["text_embeds"] for tree in found.trees]
    assert not bool(pooled[0].any())
    assert bool(pooled[1].any())


def test_guidance_that_two_passes_do_not_repeat_is_refused(tmp_path: Path) -> None:
    pipeline, options = build("lumina2")
    dataset = make_triplets(pipeline, tmp_path / "triplets", options)
    run = {name: value for name, value in RUN.items() if name != "max_steps"}
    config = ProgressiveConfig(output_dir=tmp_path / "run", teacher_guidance_scale=3.0, **run)
    with pytest.raises(TypeError, match="Lumina2Pipeline guides in a way that two passes cannot repeat"):
        ProgressiveTrainer(pipeline, dataset, config)


def test_lpips_has_a_gradient_through_the_pipelines_own_decoding() -> None:
    pipeline, options = build("flux2_klein")
    denoiser = PipelineDenoiser(pipeline, options=options)
    latents = 0.1 * torch.randn(2, *denoiser.latent_shape)
    pixels = denoiser.decode_pixels(latents.requires_grad_())
    assert pixels.shape == (2, 3, 16, 16)
    (gradient,) = torch.autograd.grad(pixels.sum(), latents)
    assert bool(gradient.any())


def test_a_folder_is_held_to_its_call_options(tmp_path: Path) -> None:
    pipeline, options = build("sana")
    make_triplets(pipeline, tmp_path / "triplets", options)
    with pytest.raises(ValueError, match=r"expected call_options = '.*', got '.*max_sequence_length.*'"):
        make_triplets(pipeline, tmp_path / "triplets", {**options, "max_sequence_length": 200})
    with pytest.raises(ValueError, match="StableDiffusionPipeline takes no call_options"):
        make_triplets(build("sd")[0], tmp_path / "other", {"height": 32})
    with pytest.raises(ValueError, match="call_options must be a JSON object of arguments by name"):
        TripletConfig(num_triplets=1, call_options="[1]")


def test_steps_that_the_stock_pipeline_cannot_take_are_refused() -> None:
    """As one step of Mochi, whose schedule divides by zero."""
    denoiser = PipelineDenoiser(TwoAtLeast.make())
    require_steps(denoiser, 2)
    with pytest.raises(TypeError, match=r"cannot generate in 1 steps: .*ZeroDivisionError.*another student_steps"):
        require_steps(denoiser, 1)


@pytest.mark.parametrize("name", slow_but(["sd3"], ["sd3", "z_image", "flux2_klein"]))
def test_two_steps_of_a_student_are_those_of_its_training(name: str, tmp_path: Path) -> None:
    """The stock pipeline of the finished folder makes Euler steps at t = 0 and t = 1/2, whatever its own grid was."""
    pipeline, options = build(name)
    dataset = make_triplets(pipeline, tmp_path / "triplets", options)
    config = DistillConfig(output_dir=tmp_path / "run", max_steps=1, student_steps=2, **RUN)
    trainer = DistillTrainer(pipeline, dataset, config)
    network, noise = trainer.train(), dataset.rows([0]).noise
    denoiser, told = trainer.denoiser, trainer.denoiser.encode(PROMPTS[:1], "cpu")
    with torch.no_grad():
        expected = euler(lambda x, t: denoiser.velocity(network, x, t, told), noise, 2)
    student = PipelineDenoiser(type(pipeline).from_pretrained(tmp_path / "run"), options=options)
    found = student.call.run(
        PROMPTS[:1], 2, student.guidance_arguments, noise=(noise, student.calibration.noise_place)
    )
    torch.testing.assert_close(found.steps[-1].result, expected, rtol=1e-4, atol=1e-4)
