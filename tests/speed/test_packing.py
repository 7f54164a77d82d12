"""Weights in oneDNN's layout: the same numbers as without, also after the weights, the size or the adapters change."""

import copy
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from rectified_diffusers import optimize
from rectified_diffusers.speed import packing
from rectified_diffusers.speed.packing import Packing, packed_weights
from rectified_diffusers.speed.upsampling import folded_upsampling
from tests.tiny import make_tiny_pipeline, make_unet, sample

BF16 = {"dtype": torch.bfloat16, "keep_memory": False}
LAYERS = ["to_q", "to_v", "conv1", "proj_in", "time_emb_proj"]

needs_bfloat16 = pytest.mark.skipif(not packing._is_supported(), reason="oneDNN has no bfloat16 on this CPU")


@pytest.fixture
def packed(monkeypatch) -> list[torch.Size]:
    """The shapes of the weights that were reordered so far."""
    shapes: list[torch.Size] = []
    stock = Packing.__init__

    def recording(self: Packing, reorder: Any) -> None:
        stock(self, lambda weight, size: shapes.append(weight.shape) or reorder(weight, size))

    monkeypatch.setattr(Packing, "__init__", recording)
    return shapes


def make_lora(seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of the tiny U-Net for linear layers and convolutions, strong enough to see."""
    unet = make_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=LAYERS))
    weights = get_peft_model_state_dict(unet)
    generator = torch.manual_seed(seed)
    return {f"unet.{key}": torch.randn(value.shape, generator=generator) / 2 for key, value in weights.items()}


LAYER_KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 40), (2, 5, 24)),
    "linear without bias": (lambda: nn.Linear(24, 40, bias=False), (7, 24)),
    "3x3": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 6, 5)),
    "3x3 from 4 channels": (lambda: nn.Conv2d(4, 32, 3, padding=1), (1, 4, 8, 8)),
    "3x3 with stride": (lambda: nn.Conv2d(16, 16, 3, stride=2, padding=1), (1, 16, 9, 8)),
    "1x1": (lambda: nn.Conv2d(32, 16, 1), (1, 32, 8, 8)),
    "without bias": (lambda: nn.Conv2d(8, 8, 3, bias=False), (1, 8, 6, 6)),
    "groups": (lambda: nn.Conv2d(16, 32, 3, groups=4), (1, 16, 6, 6)),
    "dilation": (lambda: nn.Conv2d(8, 8, 3, dilation=2), (1, 8, 9, 9)),
}


@needs_bfloat16
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("make", "shape"), LAYER_KINDS.values(), ids=LAYER_KINDS)
@torch.no_grad()
def test_a_packed_layer_computes_the_same(packed, make, shape, channels_last):
    layer, features = make().bfloat16(), torch.randn(shape).bfloat16()
    if channels_last:
        layer.to(memory_format=torch.channels_last)
    expected = layer(features)
    with packed_weights(layer):
        for _ in range(2):
            found = layer(features)
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
            assert found.stride() == expected.stride() or not channels_last
    assert packed == [layer.weight.shape], "once"
    assert torch.equal(layer(features), expected)


@needs_bfloat16
@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_a_folded_layer_is_packed_too(packed, channels_last):
    layer: Any = Upsample2D(8, use_conv=True).bfloat16()
    if channels_last:
        layer.to(memory_format=torch.channels_last)
    features = torch.randn(1, 8, 5, 6).bfloat16()
    with folded_upsampling(layer):
        expected = layer(features)
    with folded_upsampling(layer, pack=True) as forget:
        torch.testing.assert_close(layer(features), expected, atol=0.02, rtol=0.02)
        layer.conv.weight.data.mul_(2)  # unseen
        forget()
        doubled = 2 * (expected - layer.conv.bias[:, None, None]) + layer.conv.bias[:, None, None]
        torch.testing.assert_close(layer(features), doubled, atol=0.05, rtol=0.05)
    assert packed == [(8, 8, 4, 4)] * 2


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: nn.Conv2d(6, 6, 1)])
def test_what_cannot_be_packed_runs_unchanged(packed, monkeypatch, make):
    layer = make()
    features = torch.randn(2, 6, 6, 6)
    with packed_weights(layer):
        assert torch.equal(layer(features), type(layer).forward(layer, features))
        layer.bfloat16()(features.bfloat16()).sum().backward()  # gradients
        assert layer.weight.grad is not None
        monkeypatch.setattr(packing, "_is_supported", lambda: False)
        with torch.no_grad():
            layer(features.bfloat16())
    assert packed == []
    others = nn.Sequential(nn.Conv2d(3, 3, 3, padding_mode="circular"), nn.Conv2d(3, 3, 3, padding="same"))
    with packed_weights(others):
        assert not any("forward" in vars(each) for each in others)


@needs_bfloat16
@torch.no_grad()
def test_a_changed_weight_is_packed_again():
    layer, features = nn.Linear(16, 16).bfloat16(), torch.randn(3, 16).bfloat16()
    changes: list[Any] = [
        lambda: layer.weight.mul_(2),
        lambda: setattr(layer.weight, "data", layer.weight.data * 2),
        lambda: layer.load_state_dict(nn.Linear(16, 16).bfloat16().state_dict()),
        lambda: layer.load_state_dict(nn.Linear(16, 16).bfloat16().state_dict(), assign=True),
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn(16, 16).bfloat16())),
        lambda: layer.float().bfloat16(),
        lambda: layer.bias.add_(1),
    ]
    with packed_weights(layer) as forget:
        layer(features)
        for change in changes:
            for _ in range(3):  # a new weight may get the address of an old one
                change()
                expected = nn.functional.linear(features, layer.weight, layer.bias)
                torch.testing.assert_close(layer(features), expected, atol=0.02, rtol=0.02)
        layer.weight.data.zero_()  # unseen
        forget()
        assert torch.equal(layer(features), layer.bias.expand(3, 16))


@pytest.mark.parametrize("lossless", [False, True])
def test_images_and_saved_weights_are_those_without(tmp_path, lossless):
    folders = {}
    images = {}
    for pack in (False, True):
        pipeline = make_tiny_pipeline()
        with optimize(pipeline, **BF16, lossless=lossless, pack_weights=pack):
            images[pack] = [
                sample(pipeline, height=height, width=width, output_type="pt", **options)
                for height, width in ((32, 32), (48, 32), (32, 32))
                for options in ({}, {"prompt": ["a fox", "an owl"]}, {"guidance_scale": 2.0})
            ]
            folders[pack] = tmp_path / str(pack)
            pipeline.unet.save_pretrained(folders[pack])
            state = pipeline.unet.state_dict()
        assert all(each.layout == torch.strided for each in state.values())
    for plain, fast in zip(images[False], images[True], strict=True):
        torch.testing.assert_close(fast, plain, atol=0.02, rtol=0)
    saved = [(folders[pack] / "diffusion_pytorch_model.safetensors").read_bytes() for pack in (False, True)]
    assert saved[0] == saved[1]


@pytest.mark.parametrize(
    "before",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["loaded after optimize", "loaded before optimize"],
)
def test_adapters_act_and_go_as_without(before):
    """Load, scale, fuse, unfuse, hotswap, disable, unload: after each, the image is that of unpacked weights."""
    loras = make_lora(1), make_lora(2)
    steps: list[Any] = [
        lambda pipe: pipe.load_lora_weights(dict(loras[0]), adapter_name="a"),
        lambda pipe: pipe.set_adapters("a", 0.5),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.load_lora_weights(dict(loras[1]), adapter_name="a", hotswap=True),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.load_lora_weights(dict(loras[0]), adapter_name="b"),
        lambda pipe: pipe.set_adapters(["a", "b"], [0.5, 0.3]),
        lambda pipe: pipe.delete_adapters("a"),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    seen: dict[bool, list[Any]] = {}
    for pack in (False, True):
        pipeline = make_tiny_pipeline()
        if before:
            steps[0](pipeline)
        with optimize(pipeline, **BF16, pack_weights=pack):
            seen[pack] = [sample(pipeline, output_type="pt")]
            for step in steps[before:]:
                step(pipeline)
                seen[pack].append(sample(pipeline, output_type="pt"))
    for plain, fast in zip(seen[False], seen[True], strict=True):
        torch.testing.assert_close(fast, plain, atol=0.02, rtol=0)
    first = 0 if before else 1
    for i, j in ((first, first + 1), (first + 3, first + 4), (first + 4, first + 5)):
        assert (seen[False][i] - seen[False][j]).abs().max() > 0.05, "the LoRA is too weak to tell"


def test_weights_that_change_in_a_packed_pipeline_act():
    pipeline, plain = make_tiny_pipeline(), make_tiny_pipeline()
    weights = {key: value * 1.2 for key, value in plain.unet.state_dict().items()}
    with optimize(pipeline, **BF16, pack_weights=True) as fast, optimize(plain, **BF16, pack_weights=False) as slow:
        unchanged = sample(pipeline, output_type="pt")
        for each in (pipeline, plain):
            each.unet.load_state_dict(weights)
        changed = sample(pipeline, output_type="pt")
        assert (changed - unchanged).abs().max() > 0.05
        torch.testing.assert_close(changed, sample(plain, output_type="pt"), atol=0.02, rtol=0)
        for each in (pipeline, plain):
            for parameter in each.unet.parameters():
                parameter.data.mul_(1 / 1.2)
        fast.forget()
        slow.forget()
        torch.testing.assert_close(
            sample(pipeline, output_type="pt"), sample(plain, output_type="pt"), atol=0.02, rtol=0
        )


@needs_bfloat16
def test_restore_and_copies_hold_no_packed_weight(packed):
    pipeline = make_tiny_pipeline()
    expected = sample(pipeline)
    fast = optimize(pipeline, **BF16, pack_weights=True)
    sample(pipeline)
    assert packed
    twin = copy.deepcopy(pipeline)
    fast.restore()
    packed.clear()
    assert torch.equal(sample(pipeline), expected)
    sample(twin)
    assert packed == []


@needs_bfloat16
@torch.no_grad()
def test_a_compiled_layer_is_left_to_the_compiler(packed):
    torch._dynamo.reset()
    layer, features = nn.Linear(8, 8).bfloat16(), torch.randn(2, 8).bfloat16()
    expected = layer(features)
    with packed_weights(layer):
        compiled = torch.compile(layer.forward, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(features), expected)
        assert packed == []
        torch.testing.assert_close(torch.jit.trace(layer, (features,))(features), expected)
    torch._dynamo.reset()
