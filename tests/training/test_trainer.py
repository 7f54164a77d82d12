"""The loop: what a step changes and sees, how a batch may be cut, and what stops it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from PIL import Image

from rectified_diffusers.data.dataset import TripletDataset, Triplets
from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.speed.optimize import optimize
from rectified_diffusers.training.config import ReflowConfig
from rectified_diffusers.training.reflow import ReflowTrainer
from rectified_diffusers.training.trainer import Trainer
from tests.tiny import make_tiny_pipeline
from tests.training import helpers
from tests.training.helpers import PROMPTS, TRAINERS, make_ends, make_trainer, write_dataset


@pytest.mark.parametrize(
    ("method", "kind"), [*((method, "flow") for method in TRAINERS), ("reflow", "diffusion"), ("distill", "diffusion")]
)
def test_a_step_changes_every_trainable_parameter_and_no_frozen_one(
    method: str, kind: str, dataset: TripletDataset, output_dir: Path
) -> None:
    trainer = make_trainer(method, dataset, output_dir, kind)
    pipeline = trainer.pipeline
    teacher = {
        name: part.state_dict() for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
    }
    frozen = {name: {key: value.clone() for key, value in part.items()} for name, part in teacher.items()}
    before = [weight.detach().clone() for weight in trainer.student.parameters]
    trainer.train_step(1)
    changed = [not torch.equal(a, b) for a, b in zip(before, trainer.student.parameters, strict=True)]
    assert all(changed)
    assert frozen.keys() == {"unet", "vae", "text_encoder"}
    for name, part in teacher.items():
        assert all(torch.equal(value, frozen[name][key]) for key, value in part.items()), name


def losses_and_weights(trainer: Trainer[Any], steps: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    losses = torch.tensor([trainer.train_step(step) for step in range(1, steps + 1)])
    return losses, torch.cat([weight.detach().flatten() for weight in trainer.student.parameters])


@pytest.mark.parametrize("micro_batch_size", [2, 3])
def test_a_batch_may_be_cut_into_micro_batches(micro_batch_size: int, dataset: TripletDataset, tmp_path: Path) -> None:
    options = {"batch_size": 8, "warmup_steps": 0}
    whole = losses_and_weights(make_trainer("reflow", dataset, tmp_path / "whole", **options))
    cut = losses_and_weights(
        make_trainer("reflow", dataset, tmp_path / "cut", micro_batch_size=micro_batch_size, **options)
    )
    # Sums of float32 in another order: 1e-6 in the loss. Adam divides a gradient by its own size, so that a weight
    # whose gradient is rounding alone may still move by the learning rate, 1e-3, either way; nearly none may.
    torch.testing.assert_close(cut[0], whole[0], rtol=1e-4, atol=1e-6)
    assert (cut[1] - whole[1]).abs().mean() < 1e-6


def test_gradient_checkpointing_changes_nothing(dataset: TripletDataset, tmp_path: Path) -> None:
    plain = losses_and_weights(make_trainer("reflow", dataset, tmp_path / "a"))
    recomputed = losses_and_weights(make_trainer("reflow", dataset, tmp_path / "b", gradient_checkpointing=True))
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@pytest.mark.very_slow
def test_a_compiled_network_changes_only_rounding(dataset: TripletDataset, tmp_path: Path) -> None:
    plain, compiled = (make_trainer("reflow", dataset, tmp_path, compile=on) for on in (False, True))
    expected, found = losses_and_weights(plain), losses_and_weights(compiled)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    assert (found[1] - expected[1]).abs().mean() < 1e-6
    assert compiled.student.network._compiled_call_impl is not None
    assert compiled.tensors().keys() == plain.tensors().keys()
    for file, named in plain.tensors().items():
        assert compiled.tensors()[file].keys() == named.keys()


def test_what_a_step_sees_is_a_function_of_seed_and_step(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("reflow", dataset, output_dir, batch_size=64)
    first = trainer.sample_inputs(1)
    torch.rand(3)  # the global state has no part in it
    assert all(torch.equal(a, b) for a, b in zip(first, trainer.sample_inputs(1), strict=True))
    others = [
        trainer.sample_inputs(2),
        make_trainer("reflow", dataset, output_dir, batch_size=64, seed=1).sample_inputs(1),
    ]
    assert all(not torch.equal(first[i], other[i]) for i in (0, 1) for other in others)
    assert set(first[0].tolist()) == set(range(len(dataset)))


def test_warmup_and_schedule(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("reflow", dataset, output_dir, warmup_steps=4, learning_rate=1e-3)
    assert [trainer.learning_rate(step) for step in (1, 2, 4, 100)] == [2.5e-4, 5e-4, 1e-3, 1e-3]
    trainer = make_trainer("reflow", dataset, output_dir, warmup_steps=0, max_steps=10, lr_schedule="linear")
    assert trainer.learning_rate(10) == 0
    trainer.train_step(5)
    assert trainer.student.optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)


def test_ema_starts_from_the_teacher_and_averages(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("reflow", dataset, output_dir, warmup_steps=0)
    for shadow, weight in zip(trainer.student.ema.shadow_params, trainer.pipeline.unet.parameters(), strict=True):
        assert torch.equal(shadow, weight)
    visited = [trainer.student.parameters[0].detach().clone()]
    for step in (1, 2, 3):
        trainer.train_step(step)
        visited.append(trainer.student.parameters[0].detach().clone())
    # The decay begins with 2/11, 3/12, ... and rises to ema_decay, so that the initial weights are soon forgotten.
    expected = visited[0]
    for decay, weight in zip((2 / 11, 3 / 12, 4 / 13), visited[1:], strict=True):
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(trainer.student.ema.shadow_params[0], expected)


def test_the_output_is_a_whole_pipeline_with_ema_weights(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("distill", dataset, output_dir, "diffusion", max_steps=2)
    unet = trainer.train()
    assert not unet.training
    assert unet is not trainer.student.network
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), trainer.student.ema.shadow_params, strict=True))
    for pipeline_class in (RectifiedFlowPipeline, DiffusionPipeline):
        pipeline = pipeline_class.from_pretrained(output_dir)
        assert isinstance(pipeline, RectifiedFlowPipeline)
        assert isinstance(pipeline.scheduler, RectifiedFlowEulerScheduler)
        for name, weight in pipeline.unet.named_parameters():
            assert torch.equal(weight, unet.get_parameter(name)), name


def test_log_has_the_means_since_the_previous_line(dataset: TripletDataset, tmp_path: Path) -> None:
    logs = {}
    for every in (1, 3):
        make_trainer("reflow", dataset, tmp_path / str(every), log_every_steps=every).train()
        logs[every] = [json.loads(line) for line in (tmp_path / str(every) / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in logs[3]] == [3, 6]
    for i, line in enumerate(logs[3]):
        fine = logs[1][3 * i : 3 * i + 3]
        assert line["learning_rate"] == fine[-1]["learning_rate"]
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(sum(one[name] for one in fine) / 3)


@pytest.mark.parametrize(("method", "rows"), [("reflow", 2), ("distill", 1)])
def test_validation_pictures(method: str, rows: int, dataset: TripletDataset, output_dir: Path) -> None:
    options = {"validate_every_steps": 2, "validation_prompts": ("a cat", "the sea", "")}
    trainer = make_trainer(method, dataset, output_dir, max_steps=3, **options)
    trainer.train()
    names = [path.name for path in (output_dir / "validation").iterdir()]
    assert names == ["step-00000002.png"]
    with Image.open(output_dir / "validation" / names[0]) as sheet:
        assert sheet.size == (3 * 32, rows * 32)
        sheet.load()
    assert trainer.student.network.training


def test_validation_leaves_the_training_alone(dataset: TripletDataset, tmp_path: Path) -> None:
    plain = make_trainer("reflow", dataset, tmp_path / "a", max_steps=3).train()
    watched = make_trainer(
        "reflow", dataset, tmp_path / "b", max_steps=3, validate_every_steps=1, validation_prompts=("a cat",)
    ).train()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_nan_loss_stops_before_it_is_written(
    dataset: TripletDataset, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer("reflow", dataset, output_dir)
    compute_loss = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda batch, t: compute_loss(batch, t) / (0 if poisoned else 1))
    poisoned = False
    trainer.train_step(1)
    trainer.save(1)
    weights = [weight.detach().clone() for weight in trainer.student.parameters]
    poisoned = True
    with pytest.raises(FloatingPointError, match=r"Step 2 has loss inf .*step-00000001.*Lower learning_rate"):
        trainer.train_step(2)
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.student.parameters, strict=True))


def test_nan_loss_before_the_first_checkpoint(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("distill", dataset, output_dir)
    with torch.no_grad():
        trainer.student.parameters[0].fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"Step 1 has loss nan .*checkpoint: none yet"):
        trainer.train()
    assert not (output_dir / "checkpoints").exists()


def test_other_pipelines_are_refused(dataset: TripletDataset, output_dir: Path) -> None:
    with pytest.raises(TypeError, match="Expected a text-to-image pipeline of diffusers, got object"):
        ReflowTrainer(object(), dataset, ReflowConfig(output_dir=output_dir))


@pytest.mark.parametrize("method", ["reflow", "distill"])
def test_an_optimized_pipeline_is_refused_until_it_is_restored(dataset, output_dir, method, monkeypatch) -> None:
    pipeline = make_tiny_pipeline("flow")
    optimized = optimize(pipeline, dtype=torch.bfloat16)
    monkeypatch.setattr(helpers, "make_tiny_pipeline", lambda kind: pipeline)
    with pytest.raises(ValueError, match=r"Call restore\(\)"):
        make_trainer(method, dataset, output_dir)
    optimized.restore()
    make_trainer(method, dataset, output_dir)


def test_triplets_of_another_vae_are_refused(output_dir: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "triplets", *make_ends(channels=3), PROMPTS)
    with pytest.raises(ValueError, match="The unet takes 4 channels, the triplets have 3"):
        make_trainer("reflow", other, output_dir)


def test_batch_must_divide_over_the_processes(
    dataset: TripletDataset, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 4"):
        make_trainer("reflow", dataset, output_dir)


def test_processes_share_the_batch(dataset: TripletDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, played one after the other without communication, see together what one process sees."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    read = Trainer.read

    def record(trainer: Trainer[Any], rows: torch.Tensor, dropped: torch.Tensor) -> Triplets:
        seen.append((rows, dropped))
        return read(trainer, rows, dropped)

    monkeypatch.setattr(Trainer, "read", record)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    trainer = make_trainer("reflow", dataset, tmp_path, batch_size=8, micro_batch_size=2)
    for index in (0, 1):
        monkeypatch.setattr(Accelerator, "process_index", index)
        trainer.train_step(1)
    rows, _, dropped = trainer.sample_inputs(1)
    assert torch.equal(torch.cat([part[0] for part in seen]), rows)
    assert torch.equal(torch.cat([part[1] for part in seen]), dropped)


def test_bf16_keeps_float32_weights(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("reflow", dataset, output_dir, mixed_precision="bf16")
    losses, weights = losses_and_weights(trainer, steps=1)
    exact, _ = losses_and_weights(make_trainer("reflow", dataset, output_dir), steps=1)
    assert weights.dtype == torch.float32
    assert not torch.equal(losses, exact)
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0)  # bf16 has 8 bits


def test_half_precision_pipeline_trains_in_float32(dataset: TripletDataset, output_dir: Path) -> None:
    pipeline = make_tiny_pipeline().to(torch.bfloat16)
    options = {"max_steps": 1, "validate_every_steps": 1, "validation_prompts": ("a cat",), "mixed_precision": "no"}
    unet = ReflowTrainer(pipeline, dataset, ReflowConfig(output_dir=output_dir, **options)).train()
    assert unet.dtype == torch.float32
    assert pipeline.unet.dtype == torch.bfloat16
    assert AcceleratorState().mixed_precision == "no"
