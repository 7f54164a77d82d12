"""Students of N steps: they are trained on the states that they meet when sampled, and are sampled in N steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from rectified_diffusers import cli
from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.generate import generate_triplets
from rectified_diffusers.editing.interpolation import interpolate
from rectified_diffusers.export.portable import save_portable
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler, student_steps
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowImg2ImgPipeline, RectifiedFlowPipeline
from rectified_diffusers.training import checkpoint_reading
from rectified_diffusers.training.config import DistillConfig, DistributionMatchingConfig
from rectified_diffusers.training.dmd import DistributionMatchingTrainer
from tests.tiny import make_tiny_pipeline
from tests.training.checkpoints import read_checkpoint
from tests.training.helpers import (
    PROMPTS,
    SHORT,
    digests,
    make_matching,
    make_matching_teacher,
    make_trainer,
    record_unet_calls,
)

pytestmark = pytest.mark.slow


def sampled_states(trainer: Any, prompts: list[str], noise: Tensor, steps: int) -> list[Tensor]:
    """Return the states of the finished pipeline's loop: the noise, and the state after each step."""
    pipeline, states = trainer.make_pipeline(trainer.student.network), [noise]
    pipeline.set_progress_bar_config(disable=True)

    def keep(pipeline: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(given["latents"])
        return given

    options: dict[str, Any] = {"guidance_scale": 1.0, "output_type": "latent", "callback_on_step_end": keep}
    pipeline(prompts, latents=noise, num_inference_steps=steps, **options)
    return states


# ------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_matching_trains_on_the_states_of_the_sampler(steps: int, dataset: TripletDataset, output_dir: Path) -> None:
    """Bit for bit where 1/N is exact in float32; otherwise the times, and so the states, differ by rounding."""
    trainer = make_matching(dataset, output_dir, student_steps=steps)
    exact = {"rtol": 0, "atol": 0} if steps in (2, 4) else {"rtol": 1e-4, "atol": 1e-5}
    calls, seen = record_unet_calls(trainer), set()
    for step in range(1, 12):
        inputs = trainer.sample_inputs(step)
        batch, _ = trainer.load_inputs(*inputs)
        if batch.position in seen:
            continue
        calls.clear()
        losses = trainer.losses(*inputs)
        assert len(calls) == batch.position + 1
        x_t, timestep, _ = calls[-1]
        assert losses.requires_grad
        with torch.no_grad():
            states = sampled_states(trainer, batch.prompts, batch.noise, steps)
        torch.testing.assert_close(x_t, states[batch.position], **exact)
        torch.testing.assert_close(timestep, torch.full((4,), 1000 * (1 - batch.position / steps)))
        calls.clear()
        trainer.fake_losses(*inputs)
        torch.testing.assert_close(calls[-1][0], states[batch.position], **exact)
        seen.add(batch.position)
    assert seen == set(range(steps))


def test_the_last_step_ends_at_the_data_that_is_matched(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_matching(dataset, output_dir, student_steps=4)
    step = next(step for step in range(1, 99) if trainer.sample_inputs(step)[-1][0] == 3)
    batch, _ = trainer.load_inputs(*trainer.sample_inputs(step))
    told = trainer.prompt_encoder(batch.prompts)
    with torch.no_grad():
        state = trainer.student_state(batch, told)
        data = state + trainer.student_displacement(state, batch.position, told)
        torch.testing.assert_close(data, sampled_states(trainer, batch.prompts, batch.noise, 4)[-1], rtol=0, atol=0)


def test_the_position_is_one_for_a_batch_and_follows_from_seed_and_step(
    dataset: TripletDataset, output_dir: Path
) -> None:
    trainer, one_step = (make_matching(dataset, output_dir, student_steps=steps) for steps in (4, 1))
    for use in ("", "/fake-0"):
        *others, positions = trainer.sample_inputs(3, use)
        assert positions.tolist() == [positions[0].item()] * 4
        assert torch.equal(trainer.sample_inputs(3, use)[-1], positions)
        assert all(torch.equal(a, b) for a, b in zip(others, one_step.sample_inputs(3, use), strict=True))


def test_the_distance_to_the_triplets_is_that_of_the_data(dataset: TripletDataset, output_dir: Path) -> None:
    trainer, plain = (
        make_matching(dataset, output_dir, student_steps=4, regression_weight=weight) for weight in (0.5, 0.0)
    )
    step = next(step for step in range(1, 99) if trainer.sample_inputs(step)[-1][0] == 2)
    batch, t = trainer.load_inputs(*trainer.sample_inputs(step))
    assert torch.equal(batch.noise, dataset.rows(trainer.sample_inputs(step)[0].tolist()).noise)
    told = trainer.prompt_encoder(batch.prompts)
    with torch.no_grad():
        state = trainer.student_state(batch, told)
        data = state + 0.5 * trainer.predict_velocity(state, torch.full((4,), 0.5), batch.prompts)
        expected = plain.compute_loss(batch, t) + 0.5 * (data - batch.data).square().mean((1, 2, 3))
        torch.testing.assert_close(trainer.compute_loss(batch, t), expected)


def test_distillation_trains_on_the_grid_of_the_straight_path(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("distill", dataset, output_dir, student_steps=4)
    calls, seen = record_unet_calls(trainer), set()
    for step in range(1, 9):
        rows, t, dropped = trainer.sample_inputs(step)
        batch = dataset.rows(rows.tolist())
        losses = trainer.losses(rows, t, dropped)
        x_t, timestep, _ = calls[-1]
        column = t[:, None, None, None]
        assert torch.equal(timestep, 1000 * (1 - t))
        torch.testing.assert_close(x_t, column * batch.data + (1 - column) * batch.noise)
        velocity = trainer.predict_velocity(x_t, t, batch.prompts)
        torch.testing.assert_close(losses, (velocity - (batch.data - batch.noise)).square().mean((1, 2, 3)))
        seen.update(t.tolist())
    assert seen == {0.0, 0.25, 0.5, 0.75}


# ------------------------------------------------------------------------------------------ the finished pipeline

STUDENT: dict[str, Any] = {"max_steps": 1, "student_steps": 4, "validate_every_steps": 1}


@pytest.fixture(scope="module", params=["distill", "dmd"])
def student(request: Any, dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_trainer(request.param, dataset, folder, **STUDENT, validation_prompts=("a cat",)).train()
    return folder


def calls_of(pipeline: Any, *args: Any, **options: Any) -> int:
    """Return how often a call of the pipeline evaluates its U-Net."""
    calls: list[None] = []
    handle = pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(None))
    pipeline.set_progress_bar_config(disable=True)
    pipeline(*args, **options)
    handle.remove()
    return len(calls)


def test_the_saved_pipeline_takes_its_steps_by_default(student: Path, tmp_path: Path) -> None:
    pipeline = RectifiedFlowPipeline.from_pretrained(student)
    assert calls_of(pipeline, "a cat") == 4
    assert calls_of(pipeline, "a cat", num_inference_steps=1) == 1
    assert calls_of(pipeline, "a cat", num_inference_steps=3) == 3
    assert calls_of(RectifiedFlowPipeline.from_pipe(pipeline), "a cat") == 4
    image = Image.new("RGB", (32, 32))
    assert calls_of(RectifiedFlowImg2ImgPipeline.from_pipe(pipeline), "a cat", image=image, strength=0.5) == 4
    save_portable(pipeline, tmp_path / "portable")
    assert calls_of(RectifiedFlowPipeline.from_pretrained(tmp_path / "portable"), "a cat") == 4
    pipeline.scheduler = RectifiedFlowEulerScheduler()
    assert calls_of(pipeline, "a cat") == 1
    assert len(interpolate(pipeline, ["a cat", "a dog"], frames=1, progress=False)) == 2


def test_an_animation_has_the_images_of_the_pipeline(student: Path) -> None:
    pipeline = RectifiedFlowPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    frames = interpolate(pipeline, ["a cat", "a dog"], 3, frames=1, progress=False)
    alone: Any = pipeline("a cat", generator=torch.Generator().manual_seed(3))
    assert frames[0].tobytes() == alone.images[0].tobytes()


def test_card_record_and_validation_have_its_steps(student: Path) -> None:
    card = (student / "README.md").read_text(encoding="utf-8")
    assert "istillation into 4 steps" in card
    assert 'pipeline("a red apple", num_inference_steps=4, guidance_scale=1.0)' in card
    assert json.loads((student / "training.json").read_text())["student_steps"] == 4
    pipeline = RectifiedFlowPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    expected: Any = pipeline("a cat", height=32, width=32, generator=torch.Generator().manual_seed(0))
    with Image.open(student / "validation" / "step-00000001.png") as grid:
        assert grid.tobytes() == expected.images[0].tobytes()


def test_generate_takes_its_steps_unless_given_others(student: Path, tmp_path: Path) -> None:
    images = []
    for name, words in {"default": [], "four": ["--steps", "4"], "one": ["--steps", "1"]}.items():
        output = str(tmp_path / f"{name}.png")
        assert cli.main(["generate", "a cat", "--model", str(student), "-o", output, "--device", "cpu", *words]) == 0
        images.append(Path(output).read_bytes())
    assert images[0] == images[1] != images[2]


def test_one_step_is_not_recorded(dataset: TripletDataset, output_dir: Path) -> None:
    make_trainer("distill", dataset, output_dir, max_steps=1).train()
    assert "student_steps" not in (output_dir / "scheduler" / "scheduler_config.json").read_text()
    assert "Distillation into one step" in (output_dir / "README.md").read_text(encoding="utf-8")


def test_a_progressive_student_takes_its_steps_too(dataset: TripletDataset, output_dir: Path) -> None:
    make_trainer("progressive", dataset, output_dir, student_steps=2, steps_per_round=1).train()
    assert calls_of(RectifiedFlowPipeline.from_pretrained(output_dir), "a cat") == 2
    assert "num_inference_steps=2" in (output_dir / "README.md").read_text(encoding="utf-8")
    assert "student_steps" not in json.loads((output_dir / "training.json").read_text())


# ------------------------------------------------------------------------------------------ flow transformers


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("sd3", "distill"),
        ("sd3", "dmd"),
        *(pytest.param("flux", c, marks=pytest.mark.slow) for c in ("distill", "dmd")),
    ],
)
def test_the_command_of_a_flow_transformer(
    kind: Any, command: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The finished pipeline is diffusers' own, and its N steps are the times and states of the training."""
    teacher = make_tiny_pipeline(kind)
    teacher.save_pretrained(tmp_path / "model")
    config = TripletConfig(num_triplets=4, num_inference_steps=2, guidance_scale=1.0, height=32, width=32)
    generate_triplets(teacher, PROMPTS, tmp_path / "triplets", config, progress=False)
    options = {"max-steps": 2, "batch-size": 2, "mixed-precision": "no", "student-steps": 2}
    options |= {"model": tmp_path / "model", "triplets": tmp_path / "triplets", "output-dir": tmp_path / "run"}
    if command == "dmd":
        make_matching_teacher(kind).save_pretrained(tmp_path / "teacher")
        options |= {"teacher": tmp_path / "teacher", "fake-updates": 1, "regression-weight": 0.5}
        # Flux takes guidance as an input: the matching needs that of the triplets.
        options |= {"teacher-guidance-scale": 1.0} if kind == "flux" else {}
    assert cli.main([command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]) == 0
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert "are not expected and will be ignored" not in caplog.text
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    assert student_steps(pipeline.scheduler) == 2
    assert "num_inference_steps=2" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    timesteps: list[Tensor] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: timesteps.append(kwargs["timestep"]), with_kwargs=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a cat", height=32, width=32, num_inference_steps=2, guidance_scale=1.0)
    scale = 1 if kind == "flux" else 1000
    torch.testing.assert_close(torch.cat(timesteps), torch.tensor([1.0, 0.5]) * scale)
    image = tmp_path / "a.png"
    size = ["--height", "32", "--width", "32"]
    assert cli.main(["generate", "a cat", "--model", str(tmp_path / "run"), "-o", str(image), *size]) == 0
    assert len(timesteps) == 2  # of this pipeline; the command has its own
    assert image.exists()


def test_the_states_of_a_flow_transformer_are_those_of_its_pipeline(tmp_path: Path) -> None:
    teacher = make_tiny_pipeline("sd3")
    config = TripletConfig(num_triplets=4, num_inference_steps=2, guidance_scale=1.0, height=32, width=32)
    dataset = generate_triplets(teacher, PROMPTS, tmp_path / "triplets", config, progress=False)
    config = DistributionMatchingConfig(output_dir=tmp_path / "run", **{**SHORT, "student_steps": 4})
    trainer = DistributionMatchingTrainer(make_tiny_pipeline("sd3"), dataset, config, make_matching_teacher("sd3"))
    step = next(step for step in range(1, 99) if trainer.sample_inputs(step)[-1][0] == 3)
    batch, _ = trainer.load_inputs(*trainer.sample_inputs(step))
    with torch.no_grad():
        state = trainer.student_state(batch, trainer.prompt_encoder(batch.prompts))
        expected = sampled_states(trainer, batch.prompts, batch.noise, 4)[3]
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize("method", ["distill", "dmd"])
def test_a_run_in_two_parts_equals_one(method: str, dataset: TripletDataset, tmp_path: Path) -> None:
    options: dict[str, Any] = {"student_steps": 2, "keep_checkpoints": 1}
    make_trainer(method, dataset, tmp_path / "whole", max_steps=3, **options).train()
    for max_steps in (1, 3):
        make_trainer(method, dataset, tmp_path / "parts", max_steps=max_steps, **options).train()
        torch.rand(3)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


@pytest.mark.parametrize("method", ["distill", "dmd"])
def test_an_old_checkpoint_is_one_of_one_step(
    method: str, dataset: TripletDataset, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer(method, dataset, output_dir, max_steps=1).train()
    written = checkpoint_reading.sealed
    path = output_dir / "checkpoints" / "step-00000001"
    state = checkpoint_reading.unsealed((path / checkpoint_reading.STATE).read_text())
    del state["run"]["student_steps"]
    (path / checkpoint_reading.STATE).write_text(written(state))
    with pytest.raises(ValueError, match=r"holds a run with student_steps=1, got student_steps=2"):
        make_trainer(method, dataset, output_dir, max_steps=2, student_steps=2).train()
    make_trainer(method, dataset, output_dir, max_steps=2).train()
    assert read_checkpoint(output_dir / "checkpoints" / "step-00000002").state["run"]["student_steps"] == 1


def test_a_batch_may_be_cut_into_micro_batches(dataset: TripletDataset, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 8, "warmup_steps": 0, "student_steps": 4, "fake_updates": 1}
    whole, cut = (make_matching(dataset, tmp_path / str(size), micro_batch_size=size, **options) for size in (None, 3))
    for step in (1, 2, 3):
        assert cut.train_step(step) == pytest.approx(whole.train_step(step), rel=1e-3)


@pytest.mark.parametrize("config_class", [DistillConfig, DistributionMatchingConfig])
def test_there_is_at_least_one_step(config_class: Any) -> None:
    with pytest.raises(ValueError, match=r"^student_steps must be at least 1, got 0"):
        config_class(output_dir=Path("run"), student_steps=0)


def test_a_plain_unet_is_for_one_step() -> None:
    with pytest.raises(ValueError, match=r"^plain_unet keeps .* and student_steps=2 need those of later times too"):
        DistillConfig(output_dir=Path("run"), student_steps=2, plain_unet=True)
