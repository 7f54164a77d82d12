"""Training a LoRA: the adapter alone learns and is kept, and diffusers loads what comes out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.models.stacked_unet import StackedUNet
from rectified_diffusers.pipelines.stable_diffusion import RectifiedFlowPipeline
from rectified_diffusers.training.config import DistillConfig
from rectified_diffusers.training.distill import DistillTrainer
from rectified_diffusers.training.lora import WEIGHTS
from tests.marks import slow_but
from tests.tiny import make_tiny_pipeline, sample
from tests.training.checkpoints import newest_checkpoint
from tests.training.helpers import SHORT, TRAINERS, digests, make_trainer

LORA: dict[str, Any] = {"lora_rank": 2, "lora_alpha": 1.0, "warmup_steps": 0}


@pytest.mark.parametrize("method", slow_but(["reflow", "dmd"], TRAINERS))
def test_a_step_changes_the_adapter_alone(method: str, dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer(method, dataset, output_dir, **LORA)
    before = {name: weight.detach().clone() for name, weight in trainer.student.network.named_parameters()}
    for step in (1, 2):  # the first matrices only learn once the second ones are not zero any more
        trainer.train_step(step)
    changed = {
        name for name, weight in trainer.student.network.named_parameters() if not torch.equal(weight, before[name])
    }
    assert changed == {name for name in before if ".lora_" in name}
    assert len(changed) == len(trainer.student.parameters) == len(trainer.student.ema.shadow_params) == 64


def test_before_the_first_step_the_model_answers_as_it_did(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("reflow", dataset, output_dir, **LORA)
    batch, t = dataset.rows(range(2)), torch.tensor([0.0, 0.5])
    plain = make_trainer("reflow", dataset, output_dir)
    found, expected = (one.predict_velocity(batch.noise, t, batch.prompts) for one in (trainer, plain))
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module", params=["unet", "stacked"])
def finished(request: Any, dataset: TripletDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """A run of 4 steps: its pipeline as it was, its folder, and the network that it gave."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = make_tiny_pipeline()
    if request.param == "stacked":
        pipeline.register_modules(unet=StackedUNet.from_unet(pipeline.unet))
    config = DistillConfig(output_dir=folder, **{**SHORT, **LORA, "max_steps": 4, "learning_rate": 3e-2})
    return pipeline, folder, DistillTrainer(pipeline, dataset, config).train()


def test_a_checkpoint_holds_the_adapter_alone(finished: tuple[Any, Path, Any]) -> None:
    checkpoint = newest_checkpoint(finished[1] / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.tensors.keys() == {"unet.safetensors", "ema.safetensors", "optimizer.safetensors"}
    for tensors in checkpoint.tensors.values():
        assert tensors
        assert all(".lora_" in name for name in tensors)


def test_the_result_is_a_lora_and_a_whole_pipeline(finished: tuple[Any, Path, Any]) -> None:
    """The LoRA on the model it began with draws what the finished pipeline draws, in which it is fused."""
    pipeline, folder, network = finished
    untrained = sample(pipeline, num_inference_steps=1, guidance_scale=1.0)
    whole = RectifiedFlowPipeline.from_pretrained(folder)
    assert whole.unet.state_dict().keys() == network.state_dict().keys() == pipeline.unet.state_dict().keys()
    drawn = sample(whole, num_inference_steps=1, guidance_scale=1.0)
    assert (drawn - untrained).abs().max() > 1e-2
    pipeline.load_lora_weights(folder, weight_name=WEIGHTS)  # diffusers 0.36 does not look for it offline
    try:
        found = sample(pipeline, num_inference_steps=1, guidance_scale=1.0)
    finally:
        pipeline.unload_lora_weights()
    torch.testing.assert_close(found, drawn, atol=1e-5, rtol=1e-4)


def test_the_file_is_in_diffusers_format(dataset: TripletDataset, output_dir: Path) -> None:
    make_trainer("reflow", dataset, output_dir, max_steps=1, **LORA).train()
    with safe_open(output_dir / "pytorch_lora_weights.safetensors", "pt") as file:
        names = set(file.keys())
        assert '"unet.lora_alpha": 1.0' in file.metadata()["lora_adapter_metadata"]
    assert all(name.startswith("unet.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    stock: Any = make_tiny_pipeline("diffusion")
    assert type(stock) is StableDiffusionPipeline
    stock.load_lora_weights(output_dir, weight_name=WEIGHTS)
    assert stock.get_list_adapters() == {"unet": ["default_0"]}
    assert isinstance(DiffusionPipeline.from_pretrained(output_dir).unet, UNet2DConditionModel)


def test_a_run_in_two_parts_equals_one(dataset: TripletDataset, tmp_path: Path) -> None:
    options = {**LORA, "keep_checkpoints": 1}
    make_trainer("reflow", dataset, tmp_path / "whole", max_steps=4, **options).train()
    make_trainer("reflow", dataset, tmp_path / "parts", max_steps=2, **options).train()
    torch.rand(3)  # the adapter's random beginning is the seed's
    make_trainer("reflow", dataset, tmp_path / "parts", max_steps=4, **options).train()
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")


def test_gradient_checkpointing_reaches_the_adapter(dataset: TripletDataset, tmp_path: Path) -> None:
    plain, recomputed = (
        make_trainer("reflow", dataset, tmp_path, gradient_checkpointing=on, **LORA).train_step(1)
        for on in (False, True)
    )
    assert recomputed == pytest.approx(plain)
    assert recomputed[1] > 0


def test_other_layers_may_be_chosen(dataset: TripletDataset, output_dir: Path) -> None:
    trainer = make_trainer("reflow", dataset, output_dir, lora_target_modules=("conv1", "attn2.to_k"), **LORA)
    layers = {name.split(".lora_")[0] for name in trainer.student.names}
    assert layers
    assert all(layer.endswith((".conv1", ".attn2.to_k")) for layer in layers)


def test_a_layer_that_is_not_there_is_named(dataset: TripletDataset, output_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"UNet2DConditionModel has no layer 'query' to put a LoRA on.*to_q"):
        make_trainer("reflow", dataset, output_dir, lora_target_modules=("to_k", "query"), **LORA)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_alpha is set to 4\.0 but lora_rank is not"):
        DistillConfig(output_dir=Path("run"), lora_alpha=4.0)
    with pytest.raises(ValueError, match="lora_target_modules is empty"):
        DistillConfig(output_dir=Path("run"), lora_rank=4, lora_target_modules=())
    with pytest.raises(ValueError, match="lora_rank must be at least 1, got 0"):
        DistillConfig(output_dir=Path("run"), lora_rank=0)
