"""DMD2's discriminator: what it says, whose gradients it gives, and how a run with it is cut and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from rectified_diffusers import cli
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.training.config import DistributionMatchingConfig
from rectified_diffusers.training.dmd import Discriminator, DistributionMatchingTrainer, MatchingBatch
from tests.tiny import make_tiny_pipeline
from tests.training.checkpoints import newest_checkpoint
from tests.training.helpers import SHORT, digests, make_matching_teacher, make_trainer, write_dataset


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> TripletDataset:
    """Data that nothing here draws: one level everywhere, far from 0."""
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return write_dataset(tmp_path_factory.mktemp("real"), noise, torch.full_like(noise, 2.0), ["a cat", "the sky"] * 3)


def make_matching(dataset: TripletDataset, output_dir: Path, **options: Any) -> DistributionMatchingTrainer:
    trainer = make_trainer("dmd", dataset, output_dir, **{"warmup_steps": 0, "weight_decay": 0.0, **options})
    assert isinstance(trainer, DistributionMatchingTrainer)
    return trainer


def logits_of(trainer: DistributionMatchingTrainer, data: Tensor, prompts: list[str]) -> Tensor:
    """What the discriminator says of data in the middle of its way from one noise."""
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(7))
    t = torch.full((len(data),), 0.7)
    x_t, _ = trainer.interpolation.interpolate(noise, data, t)
    with torch.no_grad():
        trainer.predict(trainer.teacher_denoiser, trainer.fake_score.network, x_t, t, trainer.prompt_encoder(prompts))
    assert trainer.discriminator is not None
    return trainer.discriminator.logits


@pytest.mark.parametrize("size", [8, 16])
def test_it_answers_whenever_the_unet_does(size: int) -> None:
    unet, twin = (make_tiny_pipeline("flow").unet for _ in range(2))
    before = torch.random.get_rng_state()
    discriminator, other = Discriminator(unet, seed=3), Discriminator(twin, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    sample, told = torch.randn(3, 4, size, size), torch.randn(3, 5, unet.config.cross_attention_dim)
    logits = []
    for network, head in ((unet, discriminator), (twin, other)):
        network(sample, torch.tensor([900.0, 500.0, 10.0]), told)
        logits.append(head.logits)
    assert logits[0].shape == (3,)
    assert torch.equal(*logits)
    names = {name.removeprefix("discriminator.") for name, _ in unet.named_parameters() if "discriminator" in name}
    assert names == {name for name, _ in discriminator.named_parameters()}


def test_it_needs_the_middle_of_a_unet() -> None:
    with pytest.raises(ValueError, match=r"middle block of a U-Net, which FluxTransformer2DModel does not have"):
        Discriminator(make_tiny_pipeline("flux").transformer, seed=0)


def test_the_fake_velocity_learns_its_loss_too(
    dataset: TripletDataset, real: TripletDataset, output_dir: Path
) -> None:
    trainer = make_matching(dataset, output_dir, real_data=real, discriminator_weight=0.3)
    assert trainer.discriminator is not None
    drawn = trainer.sample_inputs(1)
    plain = make_matching(dataset, output_dir / "plain")
    assert all(torch.equal(a, b) for a, b in zip(plain.sample_inputs(1), drawn, strict=False))
    losses = trainer.fake_losses(*drawn)
    made, of_real = trainer.discriminator.logits.detach().chunk(2)
    expected = plain.fake_losses(*drawn[:4]) + 0.3 * (softplus(made) + softplus(-of_real))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    _, t, _, _, rows, noise = drawn
    batch = real.rows(rows.tolist())
    x_t, _ = trainer.interpolation.interpolate(noise, batch.data, t)
    trainer.predict(
        trainer.teacher_denoiser, trainer.fake_score.network, x_t, t, trainer.prompt_encoder(batch.prompts)
    )
    torch.testing.assert_close(trainer.discriminator.logits, of_real, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_student_has_the_gradient_of_its_data_alone(
    checkpointing: bool, dataset: TripletDataset, real: TripletDataset, output_dir: Path
) -> None:
    options: dict[str, Any] = {"adversarial_weight": 0.7, "gradient_checkpointing": checkpointing}
    trainer = make_matching(dataset, output_dir, real_data=real, **options)
    assert trainer.discriminator is not None
    triplets, t = dataset.rows(range(4)), torch.tensor([0.1, 0.4, 0.6, 0.9])
    new_noise = torch.randn(triplets.noise.shape, generator=torch.Generator().manual_seed(3))
    batch = MatchingBatch(triplets.prompts, triplets.noise, triplets.data, new_noise=new_noise)
    told = trainer.prompt_encoder(batch.prompts)
    data = batch.data.clone().requires_grad_()
    losses = trainer.adversarial_loss(data, new_noise, t, told)
    (slope,) = torch.autograd.grad(losses.sum(), data)
    assert all(weight.grad is None for weight in trainer.fake_score.network.parameters())

    x_t, _ = trainer.interpolation.interpolate(new_noise, data, t)
    trainer.predict(trainer.teacher_denoiser, trainer.fake_score.network, x_t, t, told)
    expected = softplus(-trainer.discriminator.logits)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), data)[0])

    whole = trainer.compute_loss(batch, t)
    plain = make_matching(dataset, output_dir / "plain").compute_loss(batch, t)
    made = (batch.noise + trainer.student_displacement(batch.noise, 0, told)).detach()
    of_discriminator = trainer.adversarial_loss(made, new_noise, t, told)
    torch.testing.assert_close(whole, plain + 0.7 * of_discriminator, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_tells_real_data_and_the_student_follows(
    dataset: TripletDataset, real: TripletDataset, output_dir: Path
) -> None:
    """Of what the student draws the mean moves to the level of the real data, which its teacher does not know."""
    options: dict[str, Any] = {"fake_updates": 2, "first_fake_updates": 30, "learning_rate": 2e-3, "batch_size": 8}
    options |= {"discriminator_weight": 1.0, "adversarial_weight": 3.0, "max_steps": 40}
    trainer = make_matching(dataset, output_dir, real_data=real, **options)
    batch = dataset.rows(range(4))

    @torch.no_grad()
    def drawn() -> Tensor:
        return batch.noise + trainer.student_displacement(batch.noise, 0, trainer.prompt_encoder(batch.prompts))

    before = drawn()
    trainer.train_step(1)
    real_data = real.rows(range(4)).data
    assert logits_of(trainer, real_data, batch.prompts).min() > logits_of(trainer, before, batch.prompts).max() + 1
    for step in range(2, 41):
        trainer.train_step(step)
    assert drawn().mean() > before.mean() + 0.3


@pytest.mark.slow
def test_a_run_in_two_parts_or_micro_batches_equals_one(
    dataset: TripletDataset, real: TripletDataset, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_steps": 4, "keep_checkpoints": 1, "mixed_precision": "bf16", "real_data": real}
    make_matching(dataset, tmp_path / "whole", **options).train()
    for max_steps in (2, 4):
        make_matching(dataset, tmp_path / "parts", **{**options, "max_steps": max_steps}).train()
        torch.rand(3)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    checkpoint = newest_checkpoint(tmp_path / "whole" / "checkpoints")
    assert checkpoint is not None
    assert "discriminator.layers.0.weight" in checkpoint.tensors["fake.safetensors"]
    written = sum(tensor.nbytes for tensors in checkpoint.tensors.values() for tensor in tensors.values())
    trainer = make_matching(dataset, tmp_path / "again", **options)
    assert trainer.checkpoint_bytes == pytest.approx(written, rel=0.01)

    figures = []
    for size in (None, 3):
        cut = make_matching(dataset, tmp_path / str(size), real_data=real, batch_size=8, micro_batch_size=size)
        figures.append(torch.tensor([cut.train_step(step) for step in (1, 2)]))
    torch.testing.assert_close(figures[1], figures[0], rtol=1e-3, atol=1e-6)


def test_a_lora_of_the_fake_velocity_has_a_whole_discriminator(
    dataset: TripletDataset, real: TripletDataset, output_dir: Path
) -> None:
    make_matching(dataset, output_dir, real_data=real, lora_rank=2, max_steps=1).train()
    checkpoint = newest_checkpoint(output_dir / "checkpoints")
    assert checkpoint is not None
    names = set(checkpoint.tensors["fake.safetensors"])
    assert {name for name in names if ".lora_" not in name} == {
        f"discriminator.layers.{layer}.{part}" for layer in (0, 1, 5) for part in ("weight", "bias")
    }
    assert not any("discriminator" in name for name in checkpoint.tensors["unet.safetensors"])


def test_other_real_data_is_another_run(dataset: TripletDataset, real: TripletDataset, output_dir: Path) -> None:
    make_matching(dataset, output_dir, real_data=real, max_steps=1).train()
    for other in (None, dataset):
        with pytest.raises(ValueError, match=r"holds a run with real_rows=6"):
            make_matching(dataset, output_dir, real_data=other, max_steps=2).train()


def test_the_card_says_whether_there_was_a_discriminator(
    dataset: TripletDataset, real: TripletDataset, tmp_path: Path
) -> None:
    for data, words in ((real, "With a discriminator on real images"), (None, "Without a discriminator")):
        make_matching(dataset, tmp_path / words, real_data=data, max_steps=1).train()
        assert words in (tmp_path / words / "README.md").read_text(encoding="utf-8")


def test_what_does_not_fit_is_refused(
    dataset: TripletDataset, real: TripletDataset, output_dir: Path, tmp_path: Path
) -> None:
    config = DistributionMatchingConfig(output_dir=output_dir, **{**SHORT, "mixed_precision": "fp16"})
    with pytest.raises(ValueError, match=r"too small for float16, got mixed_precision='fp16'"):
        DistributionMatchingTrainer(make_tiny_pipeline(), dataset, config, make_matching_teacher(), real)
    small = write_dataset(tmp_path / "small", torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), ["a", "b"])
    with pytest.raises(ValueError, match=r"takes 4 channels, the triplets have 3"):
        make_matching(dataset, output_dir, real_data=small)
    large = write_dataset(tmp_path / "large", torch.randn(2, 4, 8, 16), torch.randn(2, 4, 8, 16), ["a", "b"])
    with pytest.raises(ValueError, match=r"must have the size of the triplets' images, got latents \(4, 8, 16\) and"):
        make_matching(dataset, output_dir, real_data=large)


@pytest.mark.slow
def test_the_command_line_is_the_python_api(
    dataset: TripletDataset, real: TripletDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_pipeline().save_pretrained(tmp_path / "model")
    make_matching_teacher().save_pretrained(tmp_path / "teacher")
    options = {**SHORT, "max_steps": 2, "fake_updates": 2, "output_dir": tmp_path / "cli"}
    options |= {"model": tmp_path / "model", "teacher": tmp_path / "teacher", "triplets": dataset.folder}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["dmd", *words, "--real-triplets", str(real.folder)]) == 0
    make_trainer("dmd", dataset, tmp_path / "api", real_data=real, max_steps=2).train()
    assert digests(tmp_path / "cli")["training.json"] == digests(tmp_path / "api")["training.json"]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert digests(tmp_path / "cli")[weights] == digests(tmp_path / "api")[weights]
    capsys.readouterr()
    assert cli.main(["dmd", *words, "--real-triplets", str(tmp_path / "nowhere")]) != 0
    assert "make it with rectified-diffusers real-triplets" in capsys.readouterr().err
