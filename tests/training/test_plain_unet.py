"""A plain U-Net in the place of a velocity U-Net: the same answer at the noise end, by channels that lead x past."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from rectified_diffusers.export.stock import export_diffusers
from rectified_diffusers.models.plain_unet import plain_unet
from rectified_diffusers.models.velocity_unet import DiffusionVelocityUNet
from rectified_diffusers.training.config import DistillConfig
from rectified_diffusers.training.distill import DistillTrainer
from tests.tiny import make_diffusion_scheduler, make_tiny_pipeline, make_unet
from tests.training.helpers import SHORT, digests, make_dataset

WIDE: dict[str, Any] = {"block_out_channels": (48, 64)}
WITH_ATTENTION: dict[str, Any] = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}


def make_velocity(prediction_type: str = "v_prediction", **changes: Any) -> DiffusionVelocityUNet:
    scheduler = make_diffusion_scheduler(prediction_type=prediction_type)
    return DiffusionVelocityUNet.from_unet(make_unet(**{**WIDE, **changes}), scheduler)


@torch.no_grad()
def empty_groups(unet: Any, count: int) -> None:
    """Let the first groups of the last norm say nothing, so that taking them costs nothing."""
    size = unet.conv_norm_out.num_channels // unet.conv_norm_out.num_groups
    unet.conv_out.weight[:, : count * size] = 0
    for attention in getattr(unet.up_blocks[-1], "attentions", [])[-1:]:
        attention.proj_in.weight[:, : count * size] = 0


def unit_noise(rows: int = 3) -> Tensor:
    """Sample noise whose root mean square is 1 in every channel, as it is on the mean."""
    noise = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return noise / noise.square().mean((2, 3), keepdim=True).sqrt()


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize(
    ("groups", "changes"),
    [
        (1, {}),  # twelve channels in a group: room for all pairs
        (2, {"norm_num_groups": 8}),  # three pairs in a group, one in the next
        (4, {"norm_num_groups": 16}),  # groups of three: a pair, and a channel that is left empty
        (1, {**WITH_ATTENTION, "flip_sin_to_cos": False, "freq_shift": 1}),
        (1, {**WITH_ATTENTION, "use_linear_projection": True, "resnet_out_scale_factor": 2.0}),
    ],
)
def test_its_velocity_at_the_noise_end_is_the_same(prediction_type: str, groups: int, changes: dict[str, Any]) -> None:
    model = make_velocity(prediction_type, **changes)
    empty_groups(model, groups)
    plain, x, told = plain_unet(model), unit_noise(), torch.randn(3, 5, 16)
    assert type(plain) is UNet2DConditionModel
    assert not plain.training
    with torch.no_grad():
        expected = model(x, 1000.0, told).sample
        torch.testing.assert_close(plain(x, 1000.0, told).sample, expected, rtol=1e-4, atol=2e-4)


def test_noise_is_divided_by_its_own_size() -> None:
    """The one error that is left where nothing is given up: b * (x / rms - x)."""
    model = make_velocity(norm_num_groups=4)
    empty_groups(model, 1)
    x, told = unit_noise(), torch.randn(3, 5, 16)
    with torch.no_grad():
        factor = -model(x, 1000.0, told).sample.sub(plain_unet(model)(1.1 * x, 1000.0, told).sample)
        straight = model(1.1 * x, 1000.0, told).sample.sub(model(x, 1000.0, told).sample)
    of_x = (factor - straight).flatten() @ x.flatten() / x.square().sum()
    assert 0.08 < of_x < 0.1  # 0.1 * 0.93, which Stable Diffusion's schedule has for b


def test_the_groups_that_matter_least_are_taken() -> None:
    model: Any = make_velocity(norm_num_groups=8)
    with torch.no_grad():
        model.conv_norm_out.weight[12:24] = 1e-3  # of the third and fourth group
    plain: Any = plain_unet(model)
    changed = (plain.conv_norm_out.weight != model.conv_norm_out.weight).nonzero().flatten()
    assert changed.tolist() == list(range(12, 24))
    used = plain.conv_out.weight.flatten(2).count_nonzero(dim=2).sum(0)[12:24]
    assert used.tolist() == [1] * 8 + [0] * 4  # x and -x of four latents


def test_it_shares_no_weight() -> None:
    model = make_velocity()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plain = plain_unet(model)
    for parameter in plain.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert "diffusion_schedule" not in plain.config


def test_what_cannot_be_made_plain_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got UNet2DConditionModel\. A UNet2DConditionModel is plain already"):
        plain_unet(make_unet())  # pyright: ignore[reportArgumentType]
    for changes, message in (
        ({"prediction_type": "epsilon"}, "predicts epsilon cannot be made plain"),
        ({"block_out_channels": (32, 32)}, "36 independent channels of conv_in, got 32"),
        ({"act_fn": "gelu"}, "got Conv2d, GroupNorm and GELU"),
        ({"block_out_channels": (48, 48), "norm_num_groups": 48}, "got 48 channels in 48 groups"),
        ({"block_out_channels": (48, 48), "norm_num_groups": 1}, "got 48 channels in 1 groups"),
    ):
        with pytest.raises(ValueError, match=message):
            plain_unet(make_velocity(**changes))


def test_a_distillation_ends_in_a_model_that_stock_diffusers_knows(tmp_path: Path) -> None:
    teacher, dataset = make_tiny_pipeline("v_prediction"), make_dataset(tmp_path / "triplets")
    teacher.unet = make_unet(**WIDE)
    for folder, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        options = {**SHORT, "max_steps": steps, "initialisation": "snr_matching", "plain_unet": True}
        DistillTrainer(teacher, dataset, DistillConfig(output_dir=tmp_path / folder, **options)).train()
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert type(pipeline.unet) is UNet2DConditionModel
    export_diffusers(pipeline, tmp_path / "stock")
    with pytest.raises(TypeError, match="is plain already"):
        DistillTrainer(pipeline, dataset, DistillConfig(output_dir=tmp_path / "again", **SHORT, plain_unet=True))


def test_a_lora_of_it_would_fit_no_model() -> None:
    with pytest.raises(ValueError, match="plain_unet changes the weights under the LoRA of lora_rank=4"):
        DistillConfig(output_dir=Path("run"), plain_unet=True, lora_rank=4)
