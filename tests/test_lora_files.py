"""Every tensor of a LoRA file is attached, whatever its spelling, or the file is refused and nothing has changed."""

import copy
import functools
import json
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from rectified_diffusers import RectifiedFlowPipeline, RectifiedFlowXLPipeline, apply_weight_delta
from rectified_diffusers.loading import mixin
from rectified_diffusers.loading.lora_file import file_layers, is_lycoris
from tests.original_layout import original_layout
from tests.test_lora import CLOSE, LOCON, TEXT, UNET, Lora, by_hand, layer_of, sample
from tests.tiny import make_tiny_pipeline, make_tiny_xl_pipeline

pytestmark = pytest.mark.slow

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]
File = dict[str, Tensor]
Names = Callable[[str], tuple[str, str, str]]


@pytest.fixture
def pipeline() -> Any:
    return make_tiny_pipeline("flow")


@pytest.fixture(scope="module")
def lora() -> Lora:
    return Lora(21, [*UNET, *LOCON])


# ---------------------------------------------------------------------------------------------- spellings


def spelled(
    lora: Lora, unet: Callable[[str], tuple[str, str, str]], text: Callable[[str], tuple[str, str, str]]
) -> File:
    """Return a file in which functions name the layer, the down and the up factor; each layer has an alpha."""
    file: File = {}
    for name_of, factors in ((unet, lora.unet), (text, lora.text)):
        for name, (down, up, alpha) in factors.items():
            layer, first, second = name_of(name)
            file |= {f"{layer}{first}": down, f"{layer}{second}": up, f"{layer}.alpha": torch.tensor(alpha)}
    return file


KOHYA = (".lora_down.weight", ".lora_up.weight")
DIFFUSERS = (".lora.down.weight", ".lora.up.weight")
LINEAR = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


def kohya_text(name: str) -> tuple[str, str, str]:
    return "lora_te_text_model_" + name.replace(".", "_"), *KOHYA


@functools.cache
def original_keys() -> dict[str, str]:
    """Return the original name of each layer of the tiny U-Net, by the reading of whole checkpoints."""
    pipeline: Any = make_tiny_pipeline("flow")
    mapping = original_layout(pipeline)
    names: dict[str, str] = {}
    for name in [*UNET, *LOCON]:
        weight = pipeline.unet.get_submodule(name).weight
        (found,) = (
            key for key, value in mapping.items() if value.shape == weight.shape and torch.equal(value, weight)
        )
        names[name] = found.removeprefix("model.diffusion_model.").removesuffix(".weight")
    return names


def original(name: str) -> str:
    return original_keys()[name]


def as_processor(name: str) -> tuple[str, str, str]:
    """Return the names of diffusers before 0.22: attention layers belong to a processor."""
    block, _, projection = name.rpartition(".attn")
    if not block:
        return f"unet.{name}", *DIFFUSERS
    number, _, projection = projection.partition(".")
    projection = projection.removesuffix(".0")
    return f"unet.{block}.attn{number}.processor.{projection}", "_lora.down.weight", "_lora.up.weight"


SPELLINGS: dict[str, Callable[[Lora], File]] = {
    "kohya": lambda lora: spelled(lora, lambda name: ("lora_unet_" + name.replace(".", "_"), *KOHYA), kohya_text),
    "kohya, original names": lambda lora: spelled(
        lora, lambda name: ("lora_unet_" + original(name).replace(".", "_"), *KOHYA), kohya_text
    ),
    "original names": lambda lora: spelled(
        lora, lambda name: (f"diffusion_model.{original(name)}", *KOHYA), kohya_text
    ),
    "LyCORIS' own": lambda lora: spelled(lora, lambda name: ("lycoris_" + name.replace(".", "_"), *KOHYA), kohya_text),
    "diffusers": lambda lora: spelled(
        lora, lambda name: (f"unet.{name}", *DIFFUSERS), lambda name: (f"text_encoder.text_model.{name}", *LINEAR)
    ),
    "old diffusers": lambda lora: spelled(
        lora,
        as_processor,
        lambda name: (
            (f"text_encoder.text_model.{name}", *LINEAR)
            if "mlp" in name
            else (
                "text_encoder.text_model." + name.replace("_proj", "").replace("self_attn.", "self_attn.to_"),
                "_lora.down.weight",
                "_lora.up.weight",
            )
        ),
    ),
    "PEFT": lambda lora: spelled(
        lora, lambda name: (f"unet.{name}", *PEFT), lambda name: (f"text_encoder.{name}", *PEFT)
    ),
    "PEFT with an adapter's name": lambda lora: spelled(
        lora,
        lambda name: (f"unet.{name}", ".lora_A.default.weight", ".lora_B.default.weight"),
        lambda name: (f"text_encoder.text_model.{name}", ".lora_A.default.weight", ".lora_B.default.weight"),
    ),
    "without a prefix": lambda lora: spelled(lora, lambda name: (name, *PEFT), kohya_text),
    "two at once": lambda lora: spelled(
        lora,
        lambda name: (f"unet.{name}", *(DIFFUSERS if "attn" in name else PEFT)),
        lambda name: (f"text_encoder.{name}", *(PEFT if "mlp" in name else LINEAR)),
    ),
    "all at once": lambda lora: {
        name: tensor
        for i, layer in enumerate([*UNET, *LOCON])
        for name, tensor in spelled(
            one_layer(lora, layer),
            [
                lambda name: ("lora_unet_" + name.replace(".", "_"), *KOHYA),
                lambda name: (f"unet.{name}", *PEFT),
                lambda name: (f"unet.{name}", *DIFFUSERS),
                as_processor,
            ][i % 4],
            kohya_text,
        ).items()
    },
    "1x1 convolutions as matrices": lambda lora: {
        name: tensor.flatten(1) if tensor.shape[2:].numel() == 1 and tensor.ndim else tensor
        for name, tensor in SPELLINGS["kohya"](lora).items()
    },
}


def one_layer(lora: Lora, layer: str) -> Lora:
    part = copy.copy(lora)
    part.unet = {layer: lora.unet[layer]}
    return part


@pytest.mark.parametrize("write", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_equals_the_product_added_by_hand(pipeline, lora, write):
    pipeline.load_lora_weights({name: tensor.clone() for name, tensor in write(lora).items()}, adapter_name="a")
    attached = {name for name, _ in pipeline.unet.named_modules() if name.endswith(".lora_A")}
    assert attached == {f"{name}.lora_A" for name in [*UNET, *LOCON]}
    torch.testing.assert_close(sample(pipeline), sample(by_hand((lora, 1.0))), **CLOSE)


def trained_adapter(dora: bool, targets: list[str] = TARGETS, **options: Any) -> tuple[Any, Tensor]:
    """Return a U-Net with a random adapter of PEFT, and the latents that it gives."""
    trained: Any = make_tiny_pipeline("flow")
    settings = LoraConfig(r=3, lora_alpha=3, target_modules=targets, init_lora_weights=False, use_dora=dora, **options)
    torch.manual_seed(0)
    trained.unet.add_adapter(settings)
    with torch.no_grad():
        for name, parameter in trained.unet.named_parameters():
            if "lora_" in name:
                noise = torch.randn_like(parameter)
                parameter.copy_(parameter * (1 + 0.3 * noise) if "magnitude" in name else 0.1 * noise)
    return trained.unet, sample(trained)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("convert", [convert_state_dict_to_diffusers, dict], ids=["two spellings", "PEFT's"])
def test_what_the_fine_tuning_scripts_write(tmp_path, pipeline, dora, convert):
    """As diffusers' training scripts save, and so does examples/fine_tuning; 12 of 44 layers were attached."""
    unet, expected = trained_adapter(dora)
    before = sample(pipeline)
    layers = convert(get_peft_model_state_dict(unet))
    RectifiedFlowPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    attached = [name for name, _ in pipeline.unet.named_modules() if name.endswith(".lora_A")]
    assert len(attached) == len(get_peft_model_state_dict(unet)) // (3 if dora else 2) == 44
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(sample(pipeline), expected, **CLOSE)
    pipeline.unload_lora_weights()
    assert torch.equal(sample(pipeline), before)


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"to_q": 5, "conv1": 2}},
        {"rank_pattern": {"to_q": 5}, "alpha_pattern": {"to_q": 2, "proj_in": 7}},
        {"use_rslora": True},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_settings_of_peft(tmp_path, pipeline, options):
    unet, expected = trained_adapter(False, **options)
    settings = unet.peft_config["default"].to_dict()
    RectifiedFlowPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(unet), unet_lora_adapter_metadata=settings
    )
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(sample(pipeline), expected, **CLOSE)


def test_other_ranks_without_alphas_or_settings(pipeline):
    """diffusers before 0.42 gives the other ranks a scale of its own."""
    unet, expected = trained_adapter(
        False, rank_pattern={"to_q": 5, "conv1": 2}, alpha_pattern={"to_q": 5, "conv1": 2}
    )
    pipeline.load_lora_weights({f"unet.{name}": value for name, value in get_peft_model_state_dict(unet).items()})
    torch.testing.assert_close(sample(pipeline), expected, **CLOSE)


def test_tucker_is_attached(pipeline):
    """LoCon of LyCORIS with a core: the layers down, mid and up in series, here run as they are."""
    convolution = pipeline.unet.mid_block.resnets[0].conv1
    inputs, outputs = convolution.in_channels, convolution.out_channels
    down, mid, up = torch.randn(3, inputs, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(outputs, 3, 1, 1)
    key = "lora_unet_mid_block_resnets_0_conv1"
    file = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
    x = torch.randn(1, inputs, 6, 6)
    with torch.no_grad():
        hidden = nn.functional.conv2d(nn.functional.conv2d(x, down), mid, padding=1)
        expected = convolution(x) + 1.5 / 3 * nn.functional.conv2d(hidden, up)
        pipeline.load_lora_weights({**file, f"{key}.alpha": torch.tensor(1.5)})
        torch.testing.assert_close(pipeline.unet.mid_block.resnets[0].conv1(x), expected, rtol=1e-4, atol=1e-4)


DTYPES = [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_of_any_precision(pipeline, lora, dtype):
    file = {name: tensor.to(dtype) for name, tensor in lora.kohya().items()}
    pipeline.load_lora_weights(dict(file))
    expected: Any = make_tiny_pipeline("flow")
    expected.load_lora_weights({name: tensor.float() for name, tensor in file.items()})
    assert torch.equal(sample(pipeline), sample(expected))


ALPHAS: dict[str, Callable[[int], Tensor]] = {
    "zero": lambda i: torch.tensor(0.0),
    "zero except in two layers": lambda i: torch.tensor(float(4 * (i < 2))),
    "negative": lambda i: torch.tensor(-2.0),
    "integers": lambda i: torch.tensor(i + 1),
    "of one dimension": lambda i: torch.full((1,), 3.0),
    "another for each layer": lambda i: torch.tensor(i / 3),
}


@pytest.mark.parametrize("alpha_of", ALPHAS.values(), ids=ALPHAS)
def test_every_alpha_counts(pipeline, tmp_path, lora, alpha_of):
    file = lora.kohya()
    for i, name in enumerate(name for name in file if name.endswith(".alpha")):
        file[name] = alpha_of(i)
    pipeline.load_lora_weights({name: tensor.clone() for name, tensor in file.items()})
    merged: Any = make_tiny_pipeline("flow")
    save_file(file, tmp_path / "lora.safetensors")
    apply_weight_delta(merged, tmp_path / "lora.safetensors")
    torch.testing.assert_close(sample(pipeline), sample(merged), **CLOSE)
    again: Any = make_tiny_pipeline("flow")
    apply_weight_delta(again, file)
    assert torch.equal(sample(again), sample(merged))


# ---------------------------------------------------------------------------------------------- DoRA


def kohya_dora(lora: Lora) -> tuple[File, dict[str, Tensor]]:
    """Return LyCORIS' file of a DoRA, and the weights m (W + dW) / |W + dW| of its layers (arXiv:2402.09353)."""
    file, expected = lora.kohya(), {}
    plain: Any = make_tiny_pipeline("flow")
    added: Any = by_hand((lora, 1.0))
    models = [("lora_unet_", "unet", lora.unet), ("lora_te_text_model_", "text_encoder", lora.text)]
    for prefix, component, factors in models:
        for name in factors:
            weight = layer_of(getattr(added, component), name).weight.detach()
            magnitude = 1.3 * layer_of(getattr(plain, component), name).weight.detach().flatten(1).norm(dim=1)
            shape = (-1, *(1 for _ in weight.shape[1:]))
            file[prefix + name.replace(".", "_") + ".dora_scale"] = magnitude.view(shape)
            expected[f"{component}.{name}"] = weight * (magnitude / weight.flatten(1).norm(dim=1)).view(shape)
    return file, expected


@torch.no_grad()
def dora_by_hand(expected: dict[str, Tensor]) -> Any:
    pipeline: Any = make_tiny_pipeline("flow")
    for name, weight in expected.items():
        component, layer = name.split(".", 1)
        layer_of(getattr(pipeline, component), layer).weight.copy_(weight)
    return pipeline


def test_dora_of_kohya_equals_its_formula(pipeline, lora):
    file, expected = kohya_dora(lora)
    before = sample(pipeline)
    pipeline.load_lora_weights(file)
    wanted = sample(dora_by_hand(expected))
    torch.testing.assert_close(sample(pipeline), wanted, rtol=1e-4, atol=2e-5)
    assert (wanted - sample(by_hand((lora, 1.0)))).abs().max() > 1e-2  # without its magnitudes
    pipeline.unload_lora_weights()
    assert torch.equal(sample(pipeline), before)


def test_dora_stacks_like_any_adapter(pipeline, lora):
    file, _ = kohya_dora(lora)
    other = Lora(22, [name for name in UNET if name not in lora.unet] or LOCON, [])
    pipeline.load_lora_weights(file, adapter_name="dora")
    alone = sample(pipeline)
    pipeline.load_lora_weights(other.kohya(), adapter_name="lora")
    pipeline.set_adapters(["dora", "lora"], [1.0, 0.7])
    assert (sample(pipeline) - alone).abs().max() > 1e-3
    pipeline.set_adapters(["lora"], [0.7])
    torch.testing.assert_close(sample(pipeline), sample(by_hand((other, 0.7))), **CLOSE)
    pipeline.set_adapters(["dora"], [1.0])
    torch.testing.assert_close(sample(pipeline), alone, **CLOSE)
    pipeline.fuse_lora(components=["unet", "text_encoder"], adapter_names=["dora"])
    torch.testing.assert_close(sample(pipeline), alone, rtol=1e-4, atol=2e-5)


def test_dora_in_a_part_of_the_layers_or_by_input_is_refused_with_the_other_way(pipeline, lora):
    file, _ = kohya_dora(lora)
    first = next(name for name in file if name.endswith(".dora_scale"))
    for spoil in (lambda f: f.pop(first), lambda f: f.update({first: torch.ones(1, 16)})):
        spoiled = dict(file)
        spoil(spoiled)
        with pytest.raises(ValueError, match=r"(all or none|for each input).*apply_weight_delta\(pipeline"):
            pipeline.load_lora_weights(spoiled)
    assert not pipeline.get_list_adapters()


# ---------------------------------------------------------------------------------------------- refused


def state(pipeline: Any) -> dict[str, Any]:
    """Return everything that a refused file could change: weights, layers, scales, settings, flags."""
    found: dict[str, Any] = {}
    for part, model in pipeline.components.items():
        if isinstance(model, nn.Module):
            found |= {f"{part}.{name}": value.clone() for name, value in model.state_dict().items()}
            found |= {f"{part}.{name} trains": value.requires_grad for name, value in model.named_parameters()}
            found[f"{part} config"] = {
                name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()
            }
            for name, module in model.named_modules():
                found[f"{part}.{name} class"] = (type(module), module.training, len(module._forward_hooks))
                if hasattr(module, "lora_A"):
                    adapters = (dict(module.scaling), list(module.active_adapters), module.disable_adapters)
                    found[f"{part}.{name} adapters"] = (*adapters, dict(module.r), list(module.merged_adapters))
    return found


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(now[name], value) if isinstance(value, Tensor) else now[name] == value
        assert same, name


A = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PROJ_IN, CONV1 = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_mid_block_resnets_0_conv1"
REFUSED: dict[str, tuple[Callable[[], File], str]] = {
    "a LoHa layer": (lambda: {f"{PROJ_IN}.hada_w1_a": torch.ones(2, 2)}, "is of a LyCORIS file"),
    "a difference of a bias": (lambda: {f"{PROJ_IN}.diff_b": torch.ones(32)}, "LyCORIS"),
    "an unknown tensor": (lambda: {f"{A}.oft_blocks": torch.ones(2)}, "unexpected tensor"),
    "a textual inversion": (lambda: {"bundle_emb.x.string_to_param": torch.ones(2)}, "unexpected tensor"),
    "a foreign layer": (lambda: pair("unet.mid_block.x"), "does not have"),
    "a foreign component": (lambda: pair("vae.decoder.conv_in"), "'vae.decoder.*is in this model"),
    "a second text encoder": (lambda: pair("text_encoder_2.x"), "layers of the text_encoder_2"),
    "a layer in two spellings": (lambda: pair(f"unet.{UNET[0]}"), "same part of one layer"),
    "other inputs": (lambda: pair(A, inputs=7), "its layer's weight has"),
    "a foreign layer of the text encoder": (lambda: pair("text_encoder.x"), "layer 'x' of the text"),
    "other outputs of the text encoder": (
        lambda: pair("text_encoder.encoder.layers.1.mlp.fc2", outputs=7),
        "its layer's weight has",
    ),
    "PEFT's own file": (lambda: pair(f"base_model.model.{A}"), "alpha is in adapter_config.json"),
    "another model's prefix": (lambda: pair("transformer.blocks.0.attn.to_q"), "made for another architecture"),
    "ids of positions": (lambda: {"text_model.embeddings.position_ids": torch.arange(77)}, "holds torch.int64"),
    "a rank of zero": (lambda: {f"{A}.lora_A.weight": torch.ones(0, 16)}, "expected a matrix of rank 1"),
    "half of a pair": (lambda: {f"{A}.lora_A.weight": torch.ones(2, 16)}, "has no lora_up"),
    "OFT": (lambda: {f"{PROJ_IN}.oft_diag": torch.ones(2)}, "unexpected tensor"),
    "an alpha alone": (lambda: {f"{A}.alpha": torch.ones(())}, "has no lora_down"),
    "a core alone": (lambda: {f"{CONV1}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "has no lora_down"),
    "magnitudes of one layer": (
        lambda: {f"lora_unet_{UNET[0].replace('.', '_')}.dora_scale": torch.ones(16, 1)},
        "1 of the 8 layers of the unet are DoRA",
    ),
}


def pair(layer: str, rank: int = 2, inputs: int = 16, outputs: int = 16) -> File:
    return {f"{layer}.lora_A.weight": torch.ones(rank, inputs), f"{layer}.lora_B.weight": torch.ones(outputs, rank)}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("hotswap", [False, True], ids=["load", "hotswap"])
def test_a_refused_file_changes_nothing(pipeline, more, message, hotswap):
    pipeline.load_lora_weights(Lora(31).kohya(), adapter_name="mine")
    pipeline.load_lora_weights(Lora(33, UNET[:3], []).kohya(), adapter_name="other")
    pipeline.set_adapters(["mine", "other"], [0.7, -0.2])
    before, image = state(pipeline), sample(pipeline)
    file = Lora(32).kohya() | more()
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights(file, adapter_name="mine" if hotswap else "new", hotswap=hotswap)
    assert_same(state(pipeline), before)
    assert torch.equal(sample(pipeline), image)


HOTSWAPS: dict[str, tuple[Callable[[], File], str]] = {
    "more layers": (lambda: Lora(34, [*UNET, *LOCON], []).kohya(), "has no layer"),
    "other layers": (lambda: Lora(34, LOCON, []).kohya(), "has no layer"),
    "a text encoder too": (lambda: Lora(34).kohya(), "not supported for text encoders"),
    "only a text encoder": (lambda: Lora(34, []).kohya(), "not supported for text encoders"),
    "DoRA": (lambda: {k: v for k, v in kohya_dora(Lora(34, UNET))[0].items() if "_te_" not in k}, "DoRA cannot"),
    "LyCORIS": (lambda: {"lora_unet_conv_in.diff": torch.ones(32, 4, 3, 3)}, "apply_weight_delta"),
}


@pytest.mark.parametrize(("make", "message"), HOTSWAPS.values(), ids=HOTSWAPS)
@pytest.mark.parametrize("room", [False, True], ids=["plain", "with room for other ranks"])
def test_a_refused_hotswap_changes_nothing(pipeline, make, message, room):
    if room:
        pipeline.enable_lora_hotswap(target_rank=5)
    pipeline.load_lora_weights(Lora(35, UNET, []).kohya(), adapter_name="a")
    pipeline.set_adapters("a", 0.6)
    before, image = state(pipeline), sample(pipeline)
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights(make(), adapter_name="a", hotswap=True)
    assert_same(state(pipeline), before)
    assert torch.equal(sample(pipeline), image)
    pipeline.load_lora_weights(Lora(36, UNET, []).kohya(), adapter_name="a", hotswap=True)
    assert not torch.equal(sample(pipeline), image)


@pytest.mark.parametrize("hotswap", [False, True], ids=["load", "hotswap"])
def test_a_failure_in_the_middle_of_loading_changes_nothing(pipeline, monkeypatch, hotswap):
    """Whatever the libraries raise after they attached, or wrote into, a part of the layers."""
    pipeline.load_lora_weights(Lora(37, UNET, []).kohya(), adapter_name="a")
    before, image = state(pipeline), sample(pipeline)

    def fail(*_args: Any, **_kwargs: Any) -> None:
        assert not torch.equal(sample(pipeline), image)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(RectifiedFlowPipeline, "load_lora_into_text_encoder", fail)
    name = "a" if hotswap else "b"
    with pytest.raises(ValueError, match="out of luck"):
        pipeline.load_lora_weights(Lora(38, UNET, []).kohya(), adapter_name=name, hotswap=hotswap)
    assert_same(state(pipeline), before)
    assert torch.equal(sample(pipeline), image)


def test_a_name_in_use_by_the_text_encoder_alone_keeps_its_adapter(pipeline):
    """The U-Net's half was attached before the text encoder refused, and the clean-up deleted both."""
    pipeline.load_lora_weights(Lora(39, []).kohya(), adapter_name="a")
    before = state(pipeline)
    with pytest.raises(ValueError, match="cannot be loaded"):
        pipeline.load_lora_weights(Lora(40).kohya(), adapter_name="a")
    assert_same(state(pipeline), before)


def test_a_layer_that_the_libraries_leave_out_is_noticed(pipeline, monkeypatch):
    before = state(pipeline)
    stock = diffusers.StableDiffusionPipeline.load_lora_into_unet.__func__

    def careless(cls: Any, weights: File, *args: Any, **kwargs: Any) -> None:
        dropped = {name: value for name, value in weights.items() if "proj_in" not in name}
        return stock(cls, dropped, *args, **kwargs)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "load_lora_into_unet", classmethod(careless))
    with pytest.raises(ValueError, match=r"proj_in' of the unet was not attached as the file has it|cannot be loaded"):
        pipeline.load_lora_weights(Lora(41).kohya())
    assert_same(state(pipeline), before)


def test_settings_of_another_rank_than_the_tensors(tmp_path, pipeline):
    text = json.dumps({"unet.r": 4, "unet.lora_alpha": 4})
    save_file(pair(A), tmp_path / "lora.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match="is of rank 2, but the file's settings say 4"):
        pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")


def with_alpha(lora: Lora, alpha: float) -> File:
    return {name: torch.tensor(alpha) if name.endswith(".alpha") else t for name, t in lora.kohya().items()}


@pytest.mark.parametrize("room", [False, True], ids=["plain", "with room for other ranks"])
def test_weights_after_a_hotswap_are_of_the_new_alpha(pipeline, room):
    """PEFT keeps the old one, and zeroes adapters whose weights' names contain the swapped one's, here `a`."""
    old, new, other = (Lora(seed, layers, []) for seed, layers in ((44, UNET), (45, UNET), (46, [*UNET, *LOCON])))
    expected: Any = make_tiny_pipeline("flow")
    expected.load_lora_weights(with_alpha(new, 6.0), adapter_name="a")
    if room:
        pipeline.enable_lora_hotswap(target_rank=8)
    pipeline.load_lora_weights(with_alpha(old, 1.0), adapter_name="a")
    for each in (pipeline, expected):
        each.load_lora_weights(other.kohya(), adapter_name="b")
    pipeline.set_adapters(["a", "b"], [0.6, 0.3])
    pipeline.load_lora_weights(with_alpha(new, 6.0), adapter_name="a", hotswap=True)
    expected.set_adapters(["a", "b"], [1.0, 0.3])
    torch.testing.assert_close(sample(pipeline), sample(expected), **CLOSE)
    for names, weights in ((["a"], [0.5]), (["a", "b"], [-2.0, 1.0]), (["b"], [1.0])):
        for each in (pipeline, expected):
            each.set_adapters(names, weights)
        torch.testing.assert_close(sample(pipeline), sample(expected), **CLOSE)
    scaled = [sample(each, cross_attention_kwargs={"scale": 0.4}) for each in (pipeline, expected)]
    torch.testing.assert_close(*scaled, **CLOSE)


def test_a_fused_adapter_is_not_weighted(pipeline):
    """The weights would be fused with one scale and taken back with another."""
    before = sample(pipeline)
    pipeline.load_lora_weights(Lora(47, UNET).kohya(), adapter_name="a")
    pipeline.fuse_lora(lora_scale=0.5)
    with pytest.raises(ValueError, match=r"fused into the pipeline's .*Call unfuse_lora\(\) before set_adapters"):
        pipeline.set_adapters("a", 2.0)
    with pytest.raises(ValueError, match="currently merged into the base weights"):
        pipeline.load_lora_weights(Lora(48, UNET, []).kohya(), adapter_name="a", hotswap=True)
    pipeline.unfuse_lora()
    pipeline.set_adapters("a", 2.0)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(sample(pipeline), before, **CLOSE)


def test_the_given_tensors_are_never_written(pipeline):
    files = [Lora(seed, UNET, []).kohya() for seed in (42, 43)]
    copies = [{name: tensor.clone() for name, tensor in file.items()} for file in files]
    pipeline.load_lora_weights(files[0], adapter_name="a")
    pipeline.load_lora_weights(files[1], adapter_name="a", hotswap=True)
    for file, kept in zip(files, copies, strict=True):
        assert_same(file, kept)


# ---------------------------------------------------------------------------------------------- names


def plain_and_xl() -> list[Any]:
    """Return U-Nets with the blocks of Stable Diffusion 1.5 and SDXL, without memory for their weights."""
    half = {"sample_size": 8, "layers_per_block": 2}
    with torch.device("meta"):
        plain = UNet2DConditionModel(**half, cross_attention_dim=768, attention_head_dim=8)
        xl = UNet2DConditionModel(
            **half,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return [plain, xl]


@pytest.mark.parametrize("unet", plain_and_xl(), ids=["SD 1.5", "SDXL"])
def test_every_layer_is_found_by_each_of_its_names(unet):
    layers = [name for name, module in unet.named_modules() if hasattr(module, "weight")]
    for spell in (lambda name: f"unet.{name}", lambda name: "lora_unet_" + name.replace(".", "_")):
        found = file_layers([f"{spell(name)}.diff" for name in layers], {"unet": unet})
        assert [layer.name for layer in found] == layers


ORIGINAL = {  # as in the checkpoint of SDXL, sd_xl_base_1.0.safetensors
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_8_1_transformer_blocks_9_ff_net_2": "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2",
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_norm": "up_blocks.1.attentions.2.norm",
    "output_blocks_8_0_in_layers_0": "up_blocks.2.resnets.2.norm1",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}


def test_original_names_of_sdxl():
    unet = plain_and_xl()[1]
    found = file_layers([f"lora_unet_{name}.diff" for name in ORIGINAL], {"unet": unet})
    assert [layer.name for layer in found] == list(ORIGINAL.values())


def test_a_file_for_stable_diffusion_xl_with_original_names_and_both_text_encoders():
    pipeline: Any = make_tiny_xl_pipeline()
    assert type(pipeline) is RectifiedFlowXLPipeline
    file: File = {}
    layers = {"lora_unet_": pipeline.unet, "lora_te1_text_model_": pipeline.text_encoder}
    layers["lora_te2_"] = pipeline.text_encoder_2
    expected = []
    for prefix, model in layers.items():
        name = "time_embedding.linear_1" if "unet" in prefix else TEXT[1]
        layer = layer_of(model, "text_projection" if prefix == "lora_te2_" else name)
        key = {"lora_unet_": "lora_unet_time_embed_0", "lora_te2_": "lora_te2_text_projection"}
        key = key.get(prefix, prefix + name.replace(".", "_"))
        down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
        file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
        expected.append((layer, layer.weight.detach() + up @ down / 2))
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    for layer, weight in expected:
        torch.testing.assert_close(layer.weight, weight)


def test_which_files_are_lycoris():
    assert is_lycoris(["lora_unet_conv_in.lokr_w1", "x.lora_down.weight"])
    assert not is_lycoris(["unet.conv_in.lora_A.weight", "unet.conv_in.alpha", "weight"])


def test_diffusers_still_reads_files_by_the_function_that_we_call():
    """`_fetch_state_dict` is private: if this fails, read the file with what took its place."""
    assert mixin._fetch_state_dict is diffusers.loaders.lora_base._fetch_state_dict
