"""Copies, pickles, adapters and quantized weights of an optimized pipeline: each is right, or refused in one line."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig
from torch import nn

from rectified_diffusers import (
    apply_weight_delta,
    export_diffusers,
    export_onnx,
    export_unet,
    optimize,
    save_portable,
)
from tests.marks import slow_but
from tests.tiny import make_tiny_pipeline

SWITCHES = [
    {"lossless": True},
    {"dtype": None},
    {"dtype": torch.bfloat16, "blockwise_attention": True},
    {"dtype": torch.bfloat16, "pack_weights": True},
    {"dtype": None, "fuse_qkv": True},
    {"dtype": None, "cache_prompts": True, "cache_times": True},
]


def sample(pipeline, **kwargs):
    return pipeline(
        "a", generator=torch.manual_seed(0), output_type="pt", height=32, width=32, **kwargs
    ).images.float()


def pickled(pipeline):
    return pickle.loads(pickle.dumps(pipeline))  # noqa: S301


@pytest.mark.parametrize("switches", slow_but([SWITCHES[0], SWITCHES[3]], SWITCHES), ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_computes_with_its_own_weights(switches, copied):
    pipeline = make_tiny_pipeline("flow")
    plain = sample(make_tiny_pipeline("flow"))
    with optimize(pipeline, **switches):
        twin = copied(pipeline)
        torch.testing.assert_close(sample(twin), plain, atol=0.05, rtol=0)
        for parameter in twin.unet.parameters():
            parameter.data.mul_(1.5)
        other = sample(twin)
        assert (other - plain).abs().max() > 0.05
        torch.testing.assert_close(sample(pipeline), plain, atol=0.05, rtol=0)
        optimize(twin, lossless=True).restore()
    assert torch.equal(sample(pipeline), plain)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_a_copied_network_trains_all_its_weights(switches):
    pipeline = make_tiny_pipeline("flow")
    with optimize(pipeline, **switches):
        unet = copy.deepcopy(pipeline.unet).float().train()
    original = [parameter.clone() for parameter in pipeline.unet.parameters()]
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 3, unet.config.cross_attention_dim)
    unet(*inputs)  # the first call removes fused projections
    optimizer = torch.optim.SGD(unet.parameters(), lr=1.0)
    unet(*inputs).sample.square().sum().backward()
    assert [name for name, parameter in unet.named_parameters() if parameter.grad is None] == []
    optimizer.step()
    assert all(map(torch.equal, pipeline.unet.parameters(), original))


def test_an_adapter_switched_on_the_encoder_itself_counts():
    pipeline = make_tiny_pipeline("flow")
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    states = [
        lambda encoder: None,
        lambda encoder: encoder.disable_adapters(),
        lambda encoder: encoder.enable_adapters(),
        lambda encoder: [
            layer.set_scale("default", 3.0) for layer in encoder.modules() if hasattr(layer, "set_scale")
        ],
    ]
    expected = []
    for state in states:
        state(pipeline.text_encoder)
        expected.append(sample(pipeline))
    fresh = make_tiny_pipeline("flow")
    fresh.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    fresh.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
    with optimize(fresh, lossless=True):
        for state, image in zip(states, expected, strict=True):
            state(fresh.text_encoder)
            assert torch.equal(sample(fresh), image)
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(expected[2], expected[3])


class Quantized(nn.Parameter):
    """What bitsandbytes and GGUF make of a weight: a subclass of Parameter."""


class QuantizedTensor(torch.Tensor):
    """What torchao and quanto make of a weight: a subclass of Tensor."""


def quantize(unet, kind):
    layer = unet.conv_out
    if kind == "layerwise casting":
        unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=())
    elif kind == "a parameter":
        layer.weight = Quantized(layer.weight.data)
    elif kind == "a tensor":
        layer.weight = nn.Parameter(layer.weight.data.as_subclass(QuantizedTensor))
    else:
        layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)


CALLS = {
    "optimize": lambda pipeline, folder: optimize(pipeline),
    "a weight delta": lambda pipeline, folder: apply_weight_delta(pipeline.unet, {"conv_out.bias": torch.zeros(4)}),
    "export_diffusers": lambda pipeline, folder: export_diffusers(pipeline, folder),
    "export_onnx": lambda pipeline, folder: export_onnx(pipeline, folder),
    "export_unet": lambda pipeline, folder: export_unet(pipeline, folder / "unet.safetensors"),
    "save_portable": lambda pipeline, folder: save_portable(pipeline, folder),
}


@pytest.mark.parametrize("kind", ["layerwise casting", "a parameter", "a tensor", "an integer"])
@pytest.mark.parametrize("name", CALLS)
def test_weights_that_are_not_plain_are_refused_in_one_line(tmp_path, name, kind):
    pipeline = make_tiny_pipeline("flow")
    quantize(pipeline.unet, kind)
    with pytest.raises(ValueError, match=f"{name} needs plain weights of 16 bits or more") as caught:
        CALLS[name](pipeline, tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CALLS)
def test_what_quanto_makes_of_a_layer_is_refused_before_its_weights_are_quantized(tmp_path, name):
    pipeline = make_tiny_pipeline("flow")
    pipeline.unet.conv_out.weight_qtype = "qint8"
    with pytest.raises(ValueError, match=f"{name} needs plain weights"):
        CALLS[name](pipeline, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_network_with_group_offloading_is_exported_as_without(tmp_path):
    for folder in ("plain", "offloaded"):
        pipeline = make_tiny_pipeline("flow")
        if folder == "offloaded":
            pipeline.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        export_diffusers(pipeline, tmp_path / folder)
        export_unet(pipeline, tmp_path / f"{folder}.safetensors")
    for name in ("{}/unet/diffusion_pytorch_model.safetensors", "{}.safetensors"):
        plain, offloaded = ((tmp_path / name.format(folder)).read_bytes() for folder in ("plain", "offloaded"))
        assert plain == offloaded


@pytest.mark.parametrize("library", ["torchao", "optimum.quanto"])
def test_the_weights_of_these_libraries_are_refused(tmp_path, library):
    quantizer = pytest.importorskip(library)
    pipeline = make_tiny_pipeline("flow")
    if library == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(pipeline.unet, quantization.Int8WeightOnlyConfig())
    else:
        quantizer.quantize(pipeline.unet, weights=quantizer.qint8)
        quantizer.freeze(pipeline.unet)
    for name, call in CALLS.items():
        with pytest.raises(ValueError, match=f"{name} needs plain weights"):
            call(pipeline, tmp_path)


def test_a_saved_copy_is_the_plain_pipeline(tmp_path):
    pipeline = make_tiny_pipeline("flow")
    with optimize(pipeline, dtype=None):
        buffer = io.BytesIO()
        torch.save(pipeline.unet, buffer)
    buffer.seek(0)
    unet = torch.load(buffer, weights_only=False)
    assert all(map(torch.equal, unet.parameters(), pipeline.unet.parameters()))
