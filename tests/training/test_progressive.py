"""Progressive distillation: what a student learns of its teacher, and how the rounds follow each other."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.flow.ode import euler
from rectified_diffusers.training.config import ProgressiveConfig
from rectified_diffusers.training.progressive import ProgressiveTrainer
from tests.marks import slow_but
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import digests, make_trainer


def make_progressive(dataset: TripletDataset, output_dir: Path, **options: Any) -> ProgressiveTrainer:
    trainer = make_trainer("progressive", dataset, output_dir, **options)
    assert isinstance(trainer, ProgressiveTrainer)
    return trainer


def ends_of(trainer: ProgressiveTrainer, network: Any, noise: Tensor, prompts: list[str], steps: int) -> Tensor:
    """Return the end point of the noise after `steps` Euler steps with a network."""
    with torch.no_grad():
        return euler(lambda x, t: trainer.predict_velocity(x, t, prompts, network), noise, steps)


def test_steps_are_halved_round_by_round(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_progressive(dataset, output_dir, batch_size=256)
    assert trainer.config.max_steps == 6
    assert [trainer.steps_of(step) for step in range(1, 7)] == [4, 4, 2, 2, 1, 1]
    for step, times in ((1, [0.0, 0.25, 0.5, 0.75]), (3, [0.0, 0.5]), (5, [0.0])):
        assert sorted(set(trainer.sample_inputs(step)[1].tolist())) == times


def test_the_target_is_where_two_steps_of_the_teacher_lead(dataset: TripletDataset, output_dir: Path) -> None:
    """The student that predicts the target does N steps to the place of its teacher's 2 N."""
    trainer = make_progressive(dataset, output_dir, teacher_steps=2, steps_per_round=1)
    batch = dataset.rows(range(4))
    target = trainer.teacher_velocity(batch.noise, torch.zeros(4), batch.prompts)
    torch.testing.assert_close(batch.noise + target, ends_of(trainer, trainer.teacher, batch.noise, batch.prompts, 2))
    trainer = make_progressive(dataset, output_dir, teacher_steps=8)
    x_t, t = batch.data, torch.full((4,), 0.5)
    target = trainer.teacher_velocity(x_t, t, batch.prompts)
    middle = x_t + trainer.predict_velocity(x_t, t, batch.prompts, trainer.teacher) / 8
    end = middle + trainer.predict_velocity(middle, t + 1 / 8, batch.prompts, trainer.teacher) / 8
    torch.testing.assert_close(x_t + target / 4, end.detach())


def test_the_first_teacher_is_guided(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_progressive(dataset, output_dir, teacher_guidance_scale=3.0)
    batch, t = dataset.rows(range(4)), torch.zeros(4)
    text, null = (
        trainer.predict_velocity(batch.noise, t, prompts, trainer.teacher) for prompts in (batch.prompts, [""] * 4)
    )
    found = trainer.predict_teacher(batch.noise, t, batch.prompts)
    torch.testing.assert_close(found, (null + 3 * (text - null)).detach())
    trainer.step = 3  # of the second round, whose teacher has learnt it
    torch.testing.assert_close(trainer.predict_teacher(batch.noise, t, batch.prompts), text.detach())


def test_a_round_begins_with_the_average_of_the_last(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_progressive(dataset, output_dir)
    first = {name: weight.clone() for name, weight in trainer.teacher.named_parameters()}
    for step in (1, 2):
        trainer.train_step(step)
    assert all(torch.equal(weight, first[name]) for name, weight in trainer.teacher.named_parameters())
    average = {name: weight.clone() for name, weight in trainer.tensors()["ema.safetensors"].items()}
    trainer.step = 3
    trainer.begin_round()
    for network in (trainer.teacher, trainer.student.network):
        assert all(torch.equal(weight, average[name]) for name, weight in network.named_parameters())
    assert not trainer.student.optimizer.optimizer.state
    assert trainer.student.ema.optimization_step == 0
    assert not any(torch.equal(weight, first[name]) for name, weight in trainer.teacher.named_parameters())


def test_the_learning_rate_begins_anew_with_each_round(dataset: TripletDataset, output_dir: Path) -> None:
    options: dict[str, Any] = {"steps_per_round": 4, "warmup_steps": 0, "learning_rate": 4e-3}
    trainer = make_progressive(dataset, output_dir, lr_schedule="linear", **options)
    rates = [trainer.learning_rate(step) for step in range(1, 9)]
    assert rates == pytest.approx([3e-3, 2e-3, 1e-3, 0] * 2)


def test_noise_is_new_at_every_step_or_that_of_the_triplets(dataset: TripletDataset, output_dir: Path) -> None:
    rows, kept = torch.tensor([2, 0]), torch.zeros(2).bool()
    stored = dataset.rows([2, 0])
    trainer = make_progressive(dataset, output_dir)
    drawn = trainer.read(rows, kept)
    assert torch.equal(drawn.data, stored.data)
    assert not torch.equal(drawn.noise, stored.noise)
    assert torch.equal(trainer.read(rows[:1], kept[:1]).noise, drawn.noise[:1])  # whatever else is in a micro-batch
    trainer.step = 2
    assert not torch.equal(trainer.read(rows, kept).noise, drawn.noise)
    coupled = make_progressive(dataset, output_dir, pairs="coupled").read(rows, kept)
    assert torch.equal(coupled.noise, stored.noise)


@pytest.mark.slow
def test_a_student_of_one_step_ends_near_its_teacher_of_four(dataset: TripletDataset, output_dir: Path) -> None:
    options: dict[str, Any] = {"teacher_steps": 4, "steps_per_round": 60, "prompt_dropout": 0.0, "ema_decay": 0.8}
    trainer = make_progressive(
        dataset, output_dir, pairs="coupled", learning_rate=1e-2, warmup_steps=0, save_every_steps=1000, **options
    )
    batch = dataset.rows(range(4))
    with torch.no_grad():  # a random U-Net hardly moves anything, and along straight lines
        for network in (trainer.student.network, trainer.teacher):
            network.conv_out.weight.mul_(30)
        trainer.student.start_average()
    expected = ends_of(trainer, trainer.teacher, batch.noise, batch.prompts, 4)
    before = ends_of(trainer, trainer.teacher, batch.noise, batch.prompts, 1)
    student = trainer.train()
    after = ends_of(trainer, student, batch.noise, batch.prompts, 1)
    error, untrained = ((ends - expected).square().mean().sqrt().item() for ends in (after, before))
    assert untrained > 0.3
    assert error < untrained / 2


@pytest.fixture(scope="module")
def whole(dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed; only its last checkpoint is left."""
    folder = tmp_path_factory.mktemp("whole")
    make_progressive(dataset, folder, keep_checkpoints=1).train()
    return folder


class Stop(BaseException):
    """Stands for anything that ends a process between two steps."""


def train_until(steps: int, trainer: ProgressiveTrainer) -> None:
    train_step = trainer.train_step

    def stop(step: int) -> Any:
        if step > steps:
            raise Stop
        return train_step(step)

    trainer.train_step = stop
    with pytest.raises(Stop):
        trainer.train()


@pytest.mark.parametrize("steps", slow_but([3], [2, 3]))
def test_a_run_in_two_parts_equals_one(steps: int, whole: Path, dataset: TripletDataset, output_dir: Path) -> None:
    """Stopped after a round, and within the second one, whose teacher comes out of the checkpoint."""
    options = {"save_every_steps": 1, "keep_checkpoints": 1}
    train_until(steps, make_progressive(dataset, output_dir, **options))
    assert (output_dir / "checkpoints" / f"step-{steps:08d}" / "teacher.safetensors").exists() == (steps == 3)
    make_progressive(dataset, output_dir, **options).train()
    assert digests(output_dir) == digests(whole)


ROUNDS = {"teacher_steps": 4, "steps_per_round": 3, "save_every_steps": 2}


@pytest.fixture(
    scope="module", params=[{}, pytest.param({"lora_rank": 2}, marks=pytest.mark.slow)], ids=["full", "lora"]
)
def two_rounds(
    request: pytest.FixtureRequest, dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path, Path]:
    """Return options, the folder of a whole run with its last checkpoint alone, and that of a stopped one."""
    whole, stopped, options = (*map(tmp_path_factory.mktemp, ("whole", "stopped")), {**ROUNDS, **request.param})
    make_progressive(dataset, whole, keep_checkpoints=1, **options).train()
    train_until(4, make_progressive(dataset, stopped, keep_checkpoints=2, **options))
    return options, whole, stopped


@pytest.mark.parametrize("harm", ["flipped", "foreign"])
@pytest.mark.parametrize("file", slow_but(["teacher"], ["ema", "optimizer", "teacher", "unet"]))
def test_a_damaged_checkpoint_leaves_nothing_of_its_teacher(
    file: str, harm: str, two_rounds: tuple[dict[str, Any], Path, Path], dataset: TripletDataset, tmp_path: Path
) -> None:
    """The checkpoint before it is within the first round, whose teacher is in no checkpoint."""
    options, whole, stopped = two_rounds
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "step-00000004"
    harmed = newest / f"{file}.safetensors"
    assert (newest / "teacher.safetensors").exists()
    if harm == "flipped":
        harmed.write_bytes(harmed.read_bytes()[:-1] + b"?")
    else:
        harmed.write_bytes((newest / f"{'unet' if file == 'teacher' else 'teacher'}.safetensors").read_bytes())
    make_progressive(dataset, tmp_path, keep_checkpoints=1, **options).train()
    assert digests(tmp_path) == digests(whole)


def test_a_run_may_go_on_to_fewer_steps(whole: Path, dataset: TripletDataset, output_dir: Path) -> None:
    make_progressive(dataset, output_dir, student_steps=2, keep_checkpoints=1).train()
    make_progressive(dataset, output_dir, keep_checkpoints=1).train()
    assert digests(output_dir) == digests(whole)


def test_a_teacher_has_to_predict_a_velocity(dataset: TripletDataset, output_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"needs a pipeline that predicts a velocity, got Stable"):
        ProgressiveTrainer(make_tiny_pipeline("diffusion"), dataset, ProgressiveConfig(output_dir=output_dir))


@pytest.mark.parametrize(("teacher_steps", "student_steps"), [(6, 1), (4, 4), (2, 4), (12, 5)])
def test_steps_have_to_be_halved_to_each_other(teacher_steps: int, student_steps: int) -> None:
    with pytest.raises(ValueError, match=r"teacher_steps must be student_steps times 2, 4, 8"):
        ProgressiveConfig(output_dir=Path("run"), teacher_steps=teacher_steps, student_steps=student_steps)
    assert ProgressiveConfig(output_dir=Path("run"), teacher_steps=12, student_steps=3).rounds == 2
