"""The single switches against what they replace."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D

from rectified_diffusers.pipelines.scheduler import RectifiedFlowEulerScheduler
from rectified_diffusers.speed.attention import attention, blockwise_attention
from rectified_diffusers.speed.compilation import Compiled, compiled
from rectified_diffusers.speed.patching import can_keep_memory, kept_memory, to_images
from rectified_diffusers.speed.precision import converted, fast_dtype
from rectified_diffusers.speed.projections import fused_projections
from rectified_diffusers.speed.upsampling import folded_upsampling, folded_weight
from tests.tiny import make_image_encoder, make_ip_adapter_weights, make_tiny_pipeline, make_unet, sample

SHAPES = [(1, 2, 5, 5, 4), (2, 3, 700, 77, 8), (3, 3, 3, 3, 3), (1, 1, 1100, 1100, 16), (2, 2, 1100, 1100, 10)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_attention(shape, scale):
    """In float64: the blocks and the loop over heads are the same function. The last two shapes are blocks."""
    batch, heads, queries, keys, width = shape
    q, k, v = (
        torch.randn(batch, tokens, heads, width, dtype=torch.float64).transpose(1, 2)
        for tokens in (queries, keys, keys)
    )
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
    torch.testing.assert_close(attention(q, k, v, scale), expected)
    torch.testing.assert_close(attention(q, k, v, 1e3), F.scaled_dot_product_attention(q, k, v, scale=1e3))
    wider = torch.cat([v, v[..., :3]], -1)  # values may be wider than keys
    torch.testing.assert_close(attention(q, k, wider, scale), torch.cat([expected, expected[..., :3]], -1))


@pytest.mark.parametrize("size", [0.01, 1.0, 3.5, 12.0, 1e4])
@pytest.mark.parametrize(("width", "shift"), [(16, 0.0), (40, 0.0), (40, 1.0), (40, -1.0)])
def test_attention_in_bfloat16_of_any_size(size, width, shift):
    """Also if all scores of a row are large, or small."""
    q, k, v = (torch.randn(1, 2, 600, width).bfloat16() for _ in range(3))
    q, k = q.abs() * size if shift else q * size, (shift * size + k).bfloat16()
    scores = (q * width**-0.5) @ k.mT
    expected = scores.double().softmax(-1) @ v.double()
    largest = float(scores.abs().max())
    rounding = largest if largest < 100 else 0.0  # larger scores are computed as here, equally rounded
    error = (attention(q, k, v).double() - expected).pow(2).mean().sqrt()
    assert error < 2**-8 * (1 + rounding) * expected.pow(2).mean().sqrt()


def test_attention_passes_on_what_is_no_number():
    q, k, v = (torch.randn(1, 2, 1000, 40).bfloat16() for _ in range(3))
    for broken in (float("nan"), float("inf")):
        q[0, 1, 3, 5] = broken
        rows = attention(q, k, v).isfinite().all(-1)
        assert not rows[0, 1, 3]
        assert rows.sum() == rows.numel() - 1


def test_blockwise_attention_answers_in_bfloat16_alone(monkeypatch):
    calls = []
    stock = attention
    monkeypatch.setattr(
        "rectified_diffusers.speed.attention.attention", lambda *a, **k: calls.append(1) or stock(*a, **k)
    )
    unet = make_unet()
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 16)
    with blockwise_attention(unet), torch.no_grad():
        unet(x, 500, text)
        assert not calls
        unet.bfloat16()(x.bfloat16(), 500, text.bfloat16())
        asked = len(calls)
        assert asked == 8
        unet(x.bfloat16(), 500, text.bfloat16(), encoder_attention_mask=torch.ones(1, 7))
        assert len(calls) == asked + 4  # the other four have a mask
        with pytest.raises(RuntimeError):
            unet(x.bfloat16(), 500, torch.randn(1, 7, 5).bfloat16())
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_folded_weight_enlarges_and_convolves(dtype):
    weight, bias = torch.randn(5, 3, 3, 3, dtype=dtype), torch.randn(5, dtype=dtype)
    x = torch.randn(2, 3, 3, 4, dtype=dtype)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    found = F.conv_transpose2d(x, folded_weight(weight), bias, stride=2, padding=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_folding_follows_the_weights_and_leaves_the_rest_alone():
    layer: Any = Upsample2D(3, use_conv=True)
    x = torch.randn(1, 3, 4, 5)
    stock = layer(x)
    with folded_upsampling(layer) as forget:
        assert not torch.equal(layer(x), stock)  # another order of adding up
        torch.testing.assert_close(layer(x), stock, atol=1e-5, rtol=1e-5)
        with torch.enable_grad():
            assert torch.equal(layer(x), stock)
        assert layer(x, output_size=(7, 9)).shape == (1, 3, 7, 9)
        layer.conv.weight.mul_(2)
        torch.testing.assert_close(
            layer(x) - layer.conv.bias[:, None, None], 2 * (stock - layer.conv.bias[:, None, None])
        )
        layer.conv.weight.data.mul_(0.5)  # unseen
        forget()
        torch.testing.assert_close(layer(x), stock, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer(x), stock)


def test_pictures_have_the_bytes_of_diffusers():
    pipeline: Any = make_tiny_pipeline()
    images = torch.linspace(-1.2, 1.2, 3 * 64 * 64).reshape(1, 3, 64, 64).repeat(2, 1, 1, 1)
    for ours, theirs in zip(to_images(images), pipeline.image_processor.postprocess(images), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_converted_follows_the_model_and_keeps_what_is_to_be_kept():
    unet = make_unet()
    unet._keep_in_fp32_modules = ["conv_in"]
    before = {name: value.data_ptr() for name, value in unet.named_parameters()}
    with converted(unet, torch.bfloat16, channels_last=True):
        assert unet.conv_in.weight.dtype == torch.float32
        assert unet.conv_out.weight.dtype == torch.bfloat16
        assert unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert {name: value.data_ptr() for name, value in unet.named_parameters()} == before


@pytest.mark.parametrize(("device", "expected"), [("cuda", torch.float16), ("mps", torch.float16)])
def test_the_dtype_of_a_device(device, expected):
    assert fast_dtype(torch.device(device)) == expected
    assert fast_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert fast_dtype(torch.device("meta")) == torch.float32


def test_projections_are_not_fused_over_an_ip_adapter():
    pipeline: Any = make_tiny_pipeline()
    pipeline.image_encoder = make_image_encoder()
    pipeline.load_ip_adapter(
        make_ip_adapter_weights(pipeline.unet), subfolder=None, weight_name=None, image_encoder_folder=None
    )
    with (
        pytest.raises(ValueError, match=r"fuse_qkv needs layers with AttnProcessor2_0, got .*IPAdapter"),
        fused_projections(pipeline.unet),
    ):
        pass


@pytest.mark.skipif(not can_keep_memory(), reason="a setting of glibc")
def test_kept_memory_changes_no_number():
    numbers = torch.randn(2**22, generator=torch.manual_seed(0))
    with kept_memory():
        assert torch.equal(torch.randn(2**22, generator=torch.manual_seed(0)), numbers)


# ---------------------------------------------------------------------------------------------- compilation


class Backend:
    """Counts what is compiled, and runs it as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_sizes_that_change_are_compiled_for_once(fresh_compiler):
    unet, backend = make_unet(), Backend()
    run = Compiled(unet.forward, backend=backend, fullgraph=True)
    t = torch.tensor(500.0)
    counts = []
    with torch.no_grad():
        for batch, height, width in [(2, 8, 8), (2, 8, 8), (2, 16, 8), (2, 12, 16), (3, 16, 24), (2, 8, 8)]:
            x, text = torch.randn(batch, 4, height, width), torch.randn(batch, 7, 16)
            found = run(x, t, text, return_dict=False)[0]
            torch.testing.assert_close(found, unet(x, t, text).sample, atol=1e-5, rtol=1e-5)
            counts.append(backend.count)
    assert counts == [1, 1, 2, 2, 2, 2]


@torch.no_grad()
def test_a_folded_layer_is_compiled_in_one_piece_and_follows_its_weights(fresh_compiler, monkeypatch):
    layer: Any = Upsample2D(3, use_conv=True)
    x, bias = torch.randn(1, 3, 4, 5), layer.conv.bias[:, None, None]
    stock, backend = layer(x), Backend()
    with folded_upsampling(layer):
        monkeypatch.setattr(layer, "forward", torch.compile(layer.forward, backend=backend, fullgraph=True))
        torch.testing.assert_close(layer(x), stock, atol=1e-5, rtol=1e-5)
        layer.conv.weight.mul_(2)
        torch.testing.assert_close(layer(x) - bias, 2 * (stock - bias), atol=1e-5, rtol=1e-5)
    assert backend.count == 1


@pytest.mark.slow
def test_a_compiled_pipeline_draws_the_same(fresh_compiler):
    pipeline: Any = make_tiny_pipeline()
    expected = sample(pipeline, output_type="pt")
    backend = Backend()
    with compiled(pipeline, backend=backend):
        torch.testing.assert_close(sample(pipeline, output_type="pt"), expected, atol=1e-5, rtol=1e-5)
        assert backend.count >= 3
    assert torch.equal(sample(pipeline, output_type="pt"), expected)


# ---------------------------------------------------------------------------------------------- no waiting


def test_the_loop_reads_no_number_of_the_device():
    """Tensors on `meta` have no numbers to read: what would wait for a GPU fails here."""
    scheduler = RectifiedFlowEulerScheduler()
    for steps, first in itertools.product((1, 3), (0, 1)):
        scheduler.set_timesteps(steps, device="meta")
        sample = torch.empty(1, 4, 8, 8, device="meta")
        for t in scheduler.timesteps[first:]:
            sample = scheduler.step(torch.empty_like(sample), t, sample).prev_sample
        assert scheduler.step_index in (steps, None)


def test_a_timestep_of_the_grid_is_found_by_its_place_and_by_its_value():
    scheduler = RectifiedFlowEulerScheduler()
    scheduler.set_timesteps(4)
    for i, t in enumerate(scheduler.timesteps):
        assert scheduler.index_for_timestep(t) == i
        assert scheduler.index_for_timestep(t.clone()) == i
        assert scheduler.index_for_timestep(float(t)) == i
    assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps[2:]] == [2, 3]
