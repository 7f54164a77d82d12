"""Distribution matching: where its gradient points, what its two networks learn, and how it is cut and resumed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.data.manifest import Manifest
from rectified_diffusers.models.latents import pack
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.training.config import DistributionMatchingConfig
from rectified_diffusers.training.dmd import DistributionMatchingTrainer, MatchingBatch, matching_gradient
from tests.tiny import make_tiny_pipeline
from tests.training.checkpoints import newest_checkpoint
from tests.training.helpers import (
    PROMPTS,
    SHORT,
    digests,
    make_ends,
    make_matching,
    make_matching_teacher,
    write_dataset,
)


def expected_data(x_t: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """E[data | x_t] for data from N(mean, 1): mean + t (x_t - t mean) / (t^2 + (1 - t)^2)."""
    return mean + t * (x_t - t * mean) / (t**2 + (1 - t) ** 2)


class Gaussian(nn.Module):
    """The velocity of the flow from noise to N(mean, 1), a mean for each channel, as a U-Net is called."""

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean.reshape(-1, 1, 1))

    def forward(self, sample: Tensor, timestep: Tensor, **others: Any) -> tuple[Tensor]:
        t = 1 - timestep.reshape(-1, 1, 1, 1) / 1000
        return ((expected_data(sample, t, self.mean) - sample) / (1 - t),)


MEANS = torch.tensor([1.5, -1.0, 0.5, 0.0])


class Shift(nn.Module):
    """A student whose data is the noise and what it has learnt to add to each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, sample: Tensor, timestep: Tensor, **others: Any) -> tuple[Tensor]:
        return (self.mean.expand_as(sample),)


class GaussianTrainer(DistributionMatchingTrainer):
    """Student, teacher and fake velocity that a mean is all there is of."""

    def make_network(self) -> Any:
        return Shift()

    def make_teacher(self) -> Any:
        return Gaussian(MEANS.clone())


def make_gaussian(dataset: TripletDataset, output_dir: Path, **options: Any) -> GaussianTrainer:
    config = DistributionMatchingConfig(output_dir=output_dir, **{**SHORT, "teacher_guidance_scale": 1.0, **options})
    return GaussianTrainer(make_tiny_pipeline("flow"), dataset, config, make_matching_teacher())


# ------------------------------------------------------------------------------------------------ the gradient


def test_the_gradient_of_two_gaussians_points_to_the_teachers() -> None:
    """For N(m, 1) and N(0, 1): fake - real = -m (1 - t)^2 / (t^2 + (1 - t)^2), whatever the data and the noise."""
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 4, 4, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    mean = torch.tensor(0.8, dtype=torch.float64)
    column = t[:, None, None, None]
    x_t = column * data + (1 - column) * noise
    real, fake = (expected_data(x_t, column, where) for where in (mean, torch.zeros_like(mean)))
    gradient = matching_gradient(data, real, fake)
    ahead = -mean * (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
    distance = (data - real).abs().mean((1, 2, 3))
    torch.testing.assert_close(gradient, (ahead / distance)[:, None, None, None].expand_as(data))
    assert (gradient < 0).all()


def test_each_example_has_its_own_scale() -> None:
    data, real, fake = torch.randn(3, 5, 4, 2, 2, generator=torch.manual_seed(1))
    together = matching_gradient(data, real, fake)
    for i in range(5):
        alone = matching_gradient(data[i : i + 1], real[i : i + 1], fake[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)
    torch.testing.assert_close(matching_gradient(10 * data, 10 * real, 10 * fake), together)


def test_a_perfect_student_is_left_alone() -> None:
    data = torch.randn(2, 4, 2, 2)
    assert torch.equal(matching_gradient(data, data, data), torch.zeros_like(data))


def test_the_students_gradient_is_that_of_its_data(dataset: TripletDataset, output_dir: Path) -> None:
    """The loss says nothing of how the two velocities would change with the data."""
    trainer = make_gaussian(dataset, output_dir)
    with torch.no_grad():
        trainer.fake_score.network.mean.zero_()
    triplets, t = dataset.rows(range(4)), torch.full((4,), 0.5)
    new_noise = torch.randn(triplets.noise.shape)
    batch = MatchingBatch(triplets.prompts, triplets.noise, triplets.data, new_noise=new_noise)
    made: list[Tensor] = []
    displacement_of = trainer.student_displacement

    def kept(*args: Any) -> Tensor:
        made.append(displacement_of(*args))
        made[0].retain_grad()
        return made[0]

    trainer.student_displacement = kept
    losses = trainer.compute_loss(batch, t)
    losses.sum().backward()
    data = (batch.noise + made[0]).detach()
    x_t = (data + new_noise) / 2
    half = torch.tensor(0.5)
    means = (MEANS[:, None, None], torch.zeros(4, 1, 1))
    expected = matching_gradient(data, *(expected_data(x_t, half, mean) for mean in means))
    assert made[0].grad is not None
    torch.testing.assert_close(made[0].grad, expected / data[0].numel())
    torch.testing.assert_close(losses.detach(), expected.square().mean((1, 2, 3)) / 2)
    assert trainer.fake_score.network.mean.grad is None
    assert trainer.teacher.mean.grad is None


def test_the_guided_teacher_is_asked_once(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_matching(dataset, output_dir, teacher_guidance_scale=3.0)
    batch, t = dataset.rows(range(4)), torch.tensor([0.1, 0.4, 0.6, 0.9])
    text, null = (trainer.predict_teacher(batch.noise, t, prompts) for prompts in (batch.prompts, [""] * 4))
    sizes: list[int] = []
    trainer.teacher.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    found = trainer.teacher_velocity(batch.noise, t, trainer.prompt_encoder(batch.prompts))
    torch.testing.assert_close(found, null + 3 * (text - null), rtol=1e-4, atol=1e-5)
    assert sizes == [8]
    plain = make_matching(dataset, output_dir, teacher_guidance_scale=1.0)
    found = plain.teacher_velocity(batch.noise, t, plain.prompt_encoder(batch.prompts))
    torch.testing.assert_close(found, text)


# ------------------------------------------------------------------------------------------------ what is learnt


@pytest.mark.slow
def test_the_student_moves_to_the_teachers_distribution(dataset: TripletDataset, output_dir: Path) -> None:
    options: dict[str, Any] = {"max_steps": 100, "learning_rate": 5e-2, "fake_learning_rate": 1e-1, "fake_updates": 2}
    options |= {"warmup_steps": 0, "lr_schedule": "cosine", "weight_decay": 0.0, "batch_size": 8}
    trainer = make_gaussian(dataset, output_dir, **options)
    losses = [trainer.train_step(step)[0] for step in range(1, 101)]
    for network in (trainer.student.network, trainer.fake_score.network):
        torch.testing.assert_close(network.mean.detach().flatten(), MEANS, rtol=0, atol=0.1)
    assert torch.equal(trainer.teacher.mean.flatten(), MEANS)
    assert sum(losses[-10:]) < sum(losses[5:15]) / 10


def test_the_fake_velocity_follows_the_student(dataset: TripletDataset, output_dir: Path) -> None:
    """Its loss is least at the mean of the student's data, wherever the teacher's is."""
    options: dict[str, Any] = {"learning_rate": 1e-12, "fake_learning_rate": 5e-2, "weight_decay": 0.0}
    trainer = make_gaussian(dataset, output_dir, first_fake_updates=80, warmup_steps=0, batch_size=8, **options)
    with torch.no_grad():
        trainer.student.network.mean.fill_(-0.5)
    trainer.train_step(1)
    torch.testing.assert_close(
        trainer.fake_score.network.mean.detach(), torch.full((4, 1, 1), -0.5), rtol=0, atol=0.15
    )


def test_a_step_is_some_updates_of_the_fake_and_one_of_the_student(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_matching(dataset, output_dir, fake_updates=3, first_fake_updates=2)
    teacher, fake, student = (
        [weight.detach().clone() for weight in network.parameters()]
        for network in (trainer.teacher, trainer.fake_score.network, trainer.student.network)
    )
    assert all(torch.equal(a, b) for a, b in zip(teacher, fake, strict=True))
    calls: list[str] = []
    for name, update in (("fake", trainer.fake_score.optimizer), ("student", trainer.student.optimizer)):
        update.optimizer.register_step_post_hook(lambda *_, name=name: calls.append(name))
    figures = trainer.train_step(1)
    assert len(figures) == len(trainer.metrics)
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    trainer.train_step(2)
    assert calls == ["fake"] * 5 + ["student"] + ["fake"] * 3 + ["student"]
    assert all(torch.equal(a, b) for a, b in zip(teacher, trainer.teacher.parameters(), strict=True))
    for before, network in ((fake, trainer.fake_score.network), (student, trainer.student.network)):
        assert not any(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_the_fake_velocity_has_its_own_learning_rate(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_matching(dataset, output_dir, warmup_steps=4, learning_rate=1e-3, fake_learning_rate=2e-3)
    trainer.train_step(2)
    rates = [
        optimizer.param_groups[0]["lr"] for optimizer in (trainer.student.optimizer, trainer.fake_score.optimizer)
    ]
    assert rates == pytest.approx([5e-4, 1e-3])


def test_noise_is_new_or_that_of_the_triplets(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_matching(dataset, output_dir)
    drawn = trainer.sample_inputs(1)
    rows, t, noise, new_noise = drawn
    assert torch.equal(trainer.load_inputs(*drawn)[0].noise, noise)
    assert not torch.equal(noise, new_noise)
    assert not torch.equal(trainer.sample_inputs(1, "/fake-0")[2], noise)
    assert all(torch.equal(a, b) for a, b in zip(trainer.sample_inputs(1), drawn, strict=True))
    assert 0.02 <= t.min() <= t.max() <= 0.98
    coupled = make_matching(dataset, output_dir, regression_weight=0.5)
    batch = coupled.load_inputs(*drawn)[0]
    assert torch.equal(batch.noise, dataset.rows(rows).noise)
    whole = coupled.compute_loss(batch, t)
    matching = trainer.compute_loss(batch, t)
    velocity = trainer.predict_velocity(batch.noise, torch.zeros(len(t)), batch.prompts)
    distance = (batch.noise + velocity - batch.data).square().mean((1, 2, 3))
    torch.testing.assert_close(whole, matching + 0.5 * distance)


@pytest.mark.parametrize(
    "kind", ["diffusion", "v_prediction", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd3", "flux"))]
)
def test_other_teachers(kind: Any, dataset: TripletDataset, output_dir: Path, tmp_path: Path) -> None:
    """A diffusion model is asked as the flow that it stands for: its estimate of the data is DDIM's."""
    student = kind if kind in ("sd3", "flux") else "flow"
    if student != "flow":
        noise, data = make_ends()
        dataset = write_dataset(
            tmp_path / "triplets", *((pack(noise), pack(data)) if kind == "flux" else (noise, data)), PROMPTS
        )
        scaling = {"vae_scaling_factor": make_tiny_pipeline(kind).vae.config.scaling_factor}
        dataset.manifest = Manifest.of({**dataset.manifest.settings, **scaling})
    config = DistributionMatchingConfig(
        output_dir=output_dir, **{**SHORT, "max_steps": 1, "teacher_guidance_scale": 1.0 if kind == "flux" else 2.0}
    )
    teacher = make_matching_teacher(kind)
    trainer = DistributionMatchingTrainer(make_tiny_pipeline(student), dataset, config, teacher)
    if student == "flow":
        scheduler = teacher.scheduler
        scheduler.set_timesteps(2)
        data, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.manual_seed(2))
        timestep = torch.tensor([500])
        alpha, sigma = (value**0.5 for value in (scheduler.alphas_cumprod[500], 1 - scheduler.alphas_cumprod[500]))
        told = trainer.prompt_encoder.encode(["a cat"])
        with torch.no_grad():
            answer = teacher.unet(alpha * data + sigma * noise, timestep, **told).sample
            expected = scheduler.step(answer, 500, alpha * data + sigma * noise)
            t = alpha / (alpha + sigma)
            x_t = t * data + (1 - t) * noise
            found = x_t + (1 - t) * trainer.predict(trainer.teacher_denoiser, trainer.teacher, x_t, t[None], told)
        scheduler_expected = expected.pred_original_sample
        torch.testing.assert_close(found, scheduler_expected, rtol=1e-3, atol=1e-3)
    trainer.train()
    assert (output_dir / "model_index.json").exists()


# ------------------------------------------------------------------------------------------------ the loop


def test_a_batch_may_be_cut_into_micro_batches(dataset: TripletDataset, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 8, "warmup_steps": 0, "regression_weight": 0.25, "fake_updates": 1}
    results = []
    for size in (None, 3):
        trainer = make_matching(dataset, tmp_path / str(size), micro_batch_size=size, **options)
        figures = torch.tensor([trainer.train_step(step) for step in (1, 2)])
        weights = [
            torch.cat([w.detach().flatten() for w in net.parameters()])
            for net in (trainer.student.network, trainer.fake_score.network)
        ]
        results.append((figures, *weights))
    whole, cut = results
    torch.testing.assert_close(cut[0], whole[0], rtol=1e-3, atol=1e-6)
    for a, b in zip(cut[1:], whole[1:], strict=True):
        assert (a - b).abs().mean() < 1e-5


@pytest.fixture(scope="module")
def whole(dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed; only its last checkpoint is left."""
    folder = tmp_path_factory.mktemp("whole")
    make_matching(dataset, folder, max_steps=3, keep_checkpoints=1, mixed_precision="bf16").train()
    return folder


def test_a_run_in_two_parts_equals_one(whole: Path, dataset: TripletDataset, output_dir: Path) -> None:
    for max_steps in (1, 3):
        make_matching(dataset, output_dir, max_steps=max_steps, keep_checkpoints=1, mixed_precision="bf16").train()
        torch.rand(3)
    assert digests(output_dir) == digests(whole)


def test_the_fake_velocity_is_in_the_checkpoint_and_not_in_the_pipeline(whole: Path, dataset: TripletDataset) -> None:
    checkpoint = newest_checkpoint(whole / "checkpoints")
    assert checkpoint is not None
    own = {"unet.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert checkpoint.tensors.keys() == own | {"fake.safetensors", "fake_optimizer.safetensors"}
    fake, ema = (checkpoint.tensors[f"{name}.safetensors"] for name in ("fake", "ema"))
    assert fake.keys() == ema.keys()
    found: Any = DiffusionPipeline.from_pretrained(whole)
    assert isinstance(found, RectifiedFlowPipeline)
    assert found.components.keys() == make_tiny_pipeline("flow").components.keys()
    assert all(torch.equal(weight, ema[name]) for name, weight in found.unet.named_parameters())
    assert not any("fake" in path.name for path in whole.rglob("*") if "checkpoints" not in path.parts)


def test_record_card_log_and_report_say_how_it_was_trained(whole: Path) -> None:
    record = json.loads((whole / "training.json").read_text())
    assert record["trainer"] == "DistributionMatchingTrainer"
    assert (record["fake_updates"], record["teacher_guidance_scale"]) == (2, 1.75)
    assert len(record["teacher_sha256"]) == 64
    card = (whole / "README.md").read_text()
    assert "arXiv:2405.14867" in card
    assert "distribution-matching-distillation" in card
    assert "Training loss (distribution matching)" in card
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["step", "loss", "grad_norm", "fake_loss", "learning_rate"]]
    assert "Loss of the fake velocity" in (whole / "report.html").read_text()


def test_another_teacher_is_another_run(whole: Path, dataset: TripletDataset) -> None:
    before = digests(whole)
    config = DistributionMatchingConfig(
        output_dir=whole, **{**SHORT, "max_steps": 3, "fake_updates": 2, "mixed_precision": "bf16"}
    )
    other = DistributionMatchingTrainer(make_tiny_pipeline(), dataset, config, make_tiny_pipeline())
    with pytest.raises(ValueError, match=r"holds a run with teacher_sha256=.* Give the same value"):
        other.train()
    assert digests(whole) == before


@pytest.mark.slow
def test_a_lora_is_trained_of_both_networks(dataset: TripletDataset, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora_rank": 2, "max_steps": 2, "keep_checkpoints": 1, "fake_updates": 1}
    make_matching(dataset, tmp_path / "whole", **options).train()
    for steps in (1, 2):
        make_matching(dataset, tmp_path / "parts", **{**options, "max_steps": steps}).train()
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")
    checkpoint = newest_checkpoint(tmp_path / "whole" / "checkpoints")
    assert checkpoint is not None
    for tensors in checkpoint.tensors.values():
        assert tensors
        assert all(".lora_" in name for name in tensors)


def test_a_checkpoint_needs_room_for_the_fake_velocity(whole: Path, dataset: TripletDataset, output_dir: Path) -> None:
    checkpoint = newest_checkpoint(whole / "checkpoints")
    assert checkpoint is not None
    written = sum(tensor.nbytes for tensors in checkpoint.tensors.values() for tensor in tensors.values())
    trainer = make_matching(dataset, output_dir, mixed_precision="bf16")
    assert trainer.checkpoint_bytes == pytest.approx(written, rel=0.01)


# ------------------------------------------------------------------------------------------------ wrong calls


def test_a_student_has_to_predict_a_velocity(dataset: TripletDataset, output_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"needs a pipeline that predicts a velocity, got StableDiffusionPipeline"):
        make_matching(dataset, output_dir, kind="diffusion")
    make_matching(dataset, output_dir, kind="diffusion", initialisation="snr_matching")


def test_a_teacher_has_to_fit_the_student(dataset: TripletDataset, output_dir: Path) -> None:
    config = DistributionMatchingConfig(output_dir=output_dir, **SHORT)
    make = lambda teacher: DistributionMatchingTrainer(make_tiny_pipeline(), dataset, config, teacher)  # noqa: E731
    with pytest.raises(TypeError, match="Expected a text-to-image pipeline of diffusers, got NoneType"):
        make(None)
    with pytest.raises(
        ValueError, match="The teacher's text encoders are not the student's: of the same prompts, enc"
    ):
        make(make_tiny_pipeline("diffusion", seed=1))
    with pytest.raises(ValueError, match="The teacher's text encoders are not the student's"):
        make(make_tiny_pipeline("xl"))


def test_a_teacher_of_the_wrong_sign_is_found_at_the_start(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_matching(dataset, output_dir)
    trainer.teacher.register_forward_hook(lambda module, args, output: (output[0] + args[0],))
    with pytest.raises(ValueError, match=r"points away from the data"):
        trainer.train()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("fake_updates", 0, "at least 1"),
        ("first_fake_updates", -1, "at least 0"),
        ("fake_learning_rate", 0.0, "greater than 0"),
        ("min_t", 0.0, r"in \(0, 1\)"),
        ("max_t", 1.0, "between min_t=0.02 and 1"),
        ("max_t", 0.01, "between min_t=0.02 and 1"),
        ("teacher_guidance_scale", math.inf, "finite and not negative"),
        ("regression_weight", -1.0, "finite and not negative"),
        ("regression_loss", "l1", "one of"),
    ],
)
def test_bad_options_are_named(option: str, value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be {text}.*, got {value!r}"):
        DistributionMatchingConfig(output_dir=Path("run"), **{option: value})
