"""LyCORIS files as weight deltas: each kind equals its formula, is taken back bit for bit, and is not attached.

The expected differences are computed from the definitions, elementwise or by running the factors as layers, and not by
the products that the package takes. A second part compares with the `lycoris` library itself, where it is installed.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from rectified_diffusers import StackedUNet, apply_weight_delta, load_weight_delta
from rectified_diffusers.demo.styles import Styles, style_kind
from tests.test_lora import layer_of, sample, weights_of
from tests.tiny import make_tiny_pipeline

pytestmark = pytest.mark.slow

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK
LAYERS = {  # a linear layer, a 3x3 convolution, one of 1x1, and a text encoder's
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "lora_unet_",
    "unet.mid_block.resnets.0.conv1": "lora_unet_",
    "unet.mid_block.attentions.0.proj_in": "lora_unet_",
    "text_encoder.encoder.layers.0.mlp.fc1": "lora_te_text_model_",
}
CONVOLUTION = "unet.mid_block.resnets.0.conv1"
NORM = "mid_block.resnets.0.norm1"
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
Parts = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return 0.5 * torch.randn(*shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)


def factors(outputs: int, inputs: int, kernel: tuple[int, ...], core: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a, b and Tucker's core as LyCORIS shapes them in LoHa and LoKr."""
    if core:
        return random(RANK, outputs), random(RANK, inputs), random(RANK, RANK, *kernel)
    flat = torch.Size(kernel).numel()
    return random(outputs, RANK), random(RANK, inputs * flat), None


def matrix(a: Tensor, b: Tensor, core: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return the product of a, b and the core, one entry of the ranks at a time."""
    total = torch.zeros(shape)
    if core is None:
        for r in range(RANK):
            total += (a[:, r, None] * b[r]).view(shape)
        return total
    for i, j in itertools.product(range(RANK), repeat=2):
        total += a[i].view(-1, 1, 1, 1) * b[j].view(1, -1, 1, 1) * core[i, j]
    return total


def lora(weight: Tensor, core: bool = False) -> tuple[Parts, Tensor]:
    outputs, inputs, *kernel = weight.shape
    core = core and bool(kernel)
    ones = [1] * len(kernel)
    down = random(RANK, inputs, *(ones if core else kernel))
    up, mid = random(outputs, RANK, *ones), random(RANK, RANK, *kernel) if core else None
    parts = {"lora_down.weight": down, "lora_up.weight": up} | ({} if mid is None else {"lora_mid.weight": mid})
    if not kernel:
        return parts, SCALE * functional.linear(functional.linear(torch.eye(inputs), down), up).T
    side = kernel[0]  # as the layers that they are, on every unit impulse
    impulses = torch.eye(inputs * side * side).view(-1, inputs, side, side)
    hidden = (
        functional.conv2d(impulses, down) if mid is None else functional.conv2d(functional.conv2d(impulses, down), mid)
    )
    return parts, SCALE * functional.conv2d(hidden, up)[:, :, 0, 0].T.reshape(weight.shape)


def loha(weight: Tensor, core: bool = False) -> tuple[Parts, Tensor]:
    outputs, inputs, *kernel = weight.shape
    pairs = [factors(outputs, inputs, tuple(kernel), core and bool(kernel)) for _ in range(2)]
    parts: Parts = {}
    for i, (a, b, t) in enumerate(pairs, start=1):
        parts |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b} | ({} if t is None else {f"hada_t{i}": t})
    one, two = (matrix(*pair, tuple(weight.shape)) for pair in pairs)
    return parts, SCALE * one * two


def lokr(weight: Tensor, core: bool = False, factor: int = 2, split: tuple[int, ...] = (2,)) -> tuple[Parts, Tensor]:
    """Return LoKr's factors; `split` says which of the two are products themselves."""
    outputs, inputs, *kernel = weight.shape
    small, large = (factor, factor), (outputs // factor, inputs // factor, *kernel)
    parts: Parts = {}
    halves = []
    for i, (out, into, *window) in enumerate((small, large), start=1):
        if i in split:
            a, b, t = factors(out, into, tuple(window), core and bool(window))
            parts |= {f"lokr_w{i}_a": a, f"lokr_w{i}_b": b} | ({} if t is None else {f"lokr_t{i}": t})
            halves.append(matrix(a, b, t, (out, into, *window)))
        else:
            parts[f"lokr_w{i}"] = random(out, into, *window)
            halves.append(parts[f"lokr_w{i}"])
    one, two = halves
    difference = torch.zeros(weight.shape)
    for o, i in itertools.product(range(outputs), range(inputs)):  # kron(w1, w2), by its definition
        row, column = divmod(o, len(two)), divmod(i, two.shape[1])
        difference[o, i] = one[row[0], column[0]] * two[row[1], column[1]]
    return parts, (SCALE if split else 1) * difference


def full(weight: Tensor) -> tuple[Parts, Tensor]:
    difference = random(*weight.shape)
    return {"diff": difference}, difference


def dora(make: Callable[..., Any], by_input: bool, **arguments: Any) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    def made(weight: Tensor) -> tuple[Parts, Tensor]:
        parts, product = make(weight, **arguments)
        axis = 1 if by_input else 0
        shape = [1] * weight.ndim
        shape[axis] = weight.shape[axis]
        parts["dora_scale"] = 0.5 + random(weight.shape[axis]).abs().view(shape)
        sums = (weight + product).square().sum([each for each in range(weight.ndim) if each != axis], keepdim=True)
        return parts, (weight + product) * parts["dora_scale"] / sums.sqrt() - weight

    return made


VARIANTS: dict[str, Callable[[Tensor], tuple[Parts, Tensor]]] = {
    "LoHa": loha,
    "LoHa, Tucker": lambda weight: loha(weight, core=True),
    "LoKr": lokr,
    "LoKr, Tucker": lambda weight: lokr(weight, core=True),
    "LoKr, both split": lambda weight: lokr(weight, split=(1, 2), factor=4),
    "LoKr, small part split": lambda weight: lokr(weight, split=(1,), factor=4),
    "LoKr, full matrices": lambda weight: lokr(weight, split=(), factor=8),
    "full": full,
    "LoHa, DoRA": dora(loha, by_input=False),
    "LoHa, DoRA by input": dora(loha, by_input=True),
    "LoKr, DoRA": dora(lokr, by_input=False),
    "LoCon": lora,
    "LoCon, Tucker": lambda weight: lora(weight, core=True),
    "LoCon, DoRA": dora(lora, by_input=False),
    "LoCon, DoRA by input": dora(lora, by_input=True),
}
ATTACHED_TOO = {"LoCon", "LoCon, Tucker", "LoCon, DoRA"}


def target(pipeline: Any, layer: str) -> Any:
    component, name = layer.split(".", 1)
    return layer_of(getattr(pipeline, component), name)


@torch.no_grad()
def file_of(pipeline: Any, make: Callable[[Tensor], tuple[Parts, Tensor]]) -> tuple[Parts, dict[str, Tensor]]:
    """Return a file with one kind of layer for LAYERS in kohya's names, and the difference of each layer's weight."""
    GENERATOR.manual_seed(0)
    file: Parts = {}
    differences = {}
    for layer, prefix in LAYERS.items():
        parts, differences[layer] = make(target(pipeline, layer).weight)
        key = prefix + layer.split(".", 1)[1].replace(".", "_")
        file |= {f"{key}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        if "diff" not in parts:
            file[f"{key}.alpha"] = torch.tensor(ALPHA)
    return file, differences


@pytest.fixture
def pipeline() -> Any:
    return make_tiny_pipeline("flow")


def unchanged(pipeline: Any, before: dict[str, Tensor]) -> bool:
    now = weights_of(pipeline)
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


# ---------------------------------------------------------------------------------------------- equal to the formulas


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_a_merged_file_equals_its_formula_and_is_taken_back(pipeline, tmp_path, make, scale):
    file, differences = file_of(pipeline, make)
    save_file(file, tmp_path / "lycoris.safetensors", {"ss_network_module": "lycoris.kohya"})
    before = weights_of(pipeline)
    layers = {layer: target(pipeline, layer).weight.detach().clone() for layer in LAYERS}
    applied = apply_weight_delta(pipeline, tmp_path / "lycoris.safetensors", scale)
    for layer, weight in layers.items():
        torch.testing.assert_close(target(pipeline, layer).weight, weight + scale * differences[layer], **CLOSE)
        assert differences[layer].abs().max() > 0.03
    changed = {name for name, weight in weights_of(pipeline).items() if not torch.equal(weight, before[name])}
    assert len(changed) == len(LAYERS)
    applied.take_back()
    assert unchanged(pipeline, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_on_a_pipeline_in_half_precision(pipeline, dtype):
    file, _ = file_of(pipeline, loha)
    pipeline.to(dtype)
    before = weights_of(pipeline)
    halved = {name: tensor.to(dtype) for name, tensor in file.items()}
    expected = make_tiny_pipeline("flow").to(dtype).to(torch.float32)
    apply_weight_delta(expected, {name: tensor.float() for name, tensor in halved.items()})
    applied = apply_weight_delta(pipeline, halved)
    for layer in LAYERS:  # computed in float32, and rounded once
        assert torch.equal(target(pipeline, layer).weight, target(expected, layer).weight.to(dtype))
    applied.take_back()
    assert unchanged(pipeline, before)


def test_norms_and_biases(pipeline):
    norm, convolution = layer_of(pipeline.unet, NORM), target(pipeline, CONVOLUTION)
    wanted = {kind: random(*getattr(norm, kind).shape) for kind in ("weight", "bias")}
    bias = random(len(convolution.bias))
    key = f"lora_unet_{NORM.replace('.', '_')}"
    file = {f"{key}.w_norm": wanted["weight"], f"{key}.b_norm": wanted["bias"]}
    file |= {"lora_unet_mid_block_resnets_0_conv1.diff": torch.zeros_like(convolution.weight)}
    file |= {"lora_unet_mid_block_resnets_0_conv1.diff_b": bias}
    before = {kind: getattr(norm, kind).detach().clone() for kind in wanted}
    old, all_before = convolution.bias.detach().clone(), weights_of(pipeline)
    applied = apply_weight_delta(pipeline.unet, file, 0.5)
    for kind, difference in wanted.items():
        torch.testing.assert_close(getattr(norm, kind), before[kind] + 0.5 * difference, **CLOSE)
    torch.testing.assert_close(convolution.bias, old + 0.5 * bias, **CLOSE)
    applied.take_back()
    assert unchanged(pipeline, all_before)


def test_several_at_once_and_on_top_of_each_other(pipeline):
    """In one call, each is a difference of the original weights; two calls are taken back in reverse order."""
    before = weights_of(pipeline)
    layers = {layer: target(pipeline, layer).weight.detach().clone() for layer in LAYERS}
    first, one = file_of(pipeline, VARIANTS["LoHa"])
    second, two = file_of(pipeline, VARIANTS["LoKr, DoRA"])
    plain = {name: 0.01 * torch.ones_like(weight) for name, weight in pipeline.unet.state_dict().items()}
    applied = apply_weight_delta(pipeline, [first, second, plain], [0.5, -1, 2])
    for layer, weight in layers.items():
        added = 0.02 if layer.startswith("unet.") else 0
        expected = weight + 0.5 * one[layer] - two[layer] + added
        torch.testing.assert_close(target(pipeline, layer).weight, expected, **CLOSE)
    applied.take_back()
    assert unchanged(pipeline, before)
    records = [apply_weight_delta(pipeline, file) for file in (first, second)]
    with pytest.raises(ValueError, match="Undo later changes first, in reverse order"):
        records[0].take_back()
    for record in reversed(records):
        record.take_back()
    assert unchanged(pipeline, before)


def test_the_image_changes_and_the_text_encoder_counts(pipeline):
    before = sample(pipeline)
    file, _ = file_of(pipeline, loha)
    text = {name: tensor for name, tensor in file.items() if name.startswith("lora_te_")}
    images = []
    for part in (file, text):
        applied = apply_weight_delta(pipeline, part)
        images.append(sample(pipeline))
        applied.take_back()
    assert all((image - before).abs().max() > 1e-3 for image in images)
    assert torch.equal(sample(pipeline), before)


def test_a_stacked_unet_takes_it_in_both_halves():
    stacked: Any = StackedUNet.from_unet(make_tiny_pipeline("flow").unet)
    before = {name: weight.clone() for name, weight in stacked.state_dict().items()}
    applied = apply_weight_delta(
        stacked,
        {"lora_unet_conv_out.diff_b": torch.ones(4), "lora_unet_mid_block_resnets_0_conv1.diff_b": torch.ones(16)},
    )
    changed = {name for name, weight in stacked.state_dict().items() if not torch.equal(weight, before[name])}
    halves = {f"{half}mid_block.resnets.0.conv1.bias" for half in ("", "second.")}
    assert changed == {"second.conv_out.bias", *halves}
    applied.take_back()
    assert all(torch.equal(weight, before[name]) for name, weight in stacked.state_dict().items())


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("make", [make for name, make in VARIANTS.items() if name not in ATTACHED_TOO])
def test_loading_such_a_file_as_a_lora_names_the_call(pipeline, make):
    before = weights_of(pipeline)
    file, _ = file_of(pipeline, make)
    with pytest.raises(ValueError, match=r"apply_weight_delta\(pipeline, file, scale\).*take_back"):
        pipeline.load_lora_weights(file)
    assert unchanged(pipeline, before)
    assert not pipeline.get_list_adapters()


QUERY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


def spoiled() -> Iterator[tuple[str, Callable[[Parts], Any], str]]:
    yield "a foreign layer", lambda f: f.update({"lora_unet_x.diff": torch.ones(2)}), "x.* is in this|layer 'x'"
    yield "an unknown tensor", lambda f: f.update({f"{QUERY}.oft_blocks": torch.ones(2, 2)}), "unexpected tensor"
    yield "a factor less", lambda f: f.pop(f"{QUERY}.hada_w2_b"), "expected those of one layer"
    yield (
        "two kinds",
        lambda f: f.update({f"{QUERY}.diff": torch.ones(16, 16)}),
        "expected those of one layer of LoRA, ",
    )
    yield "one core", lambda f: f.update({f"{QUERY}.hada_t1": torch.ones(2, 2, 1, 1)}), "expected those of one"
    yield "NaN", lambda f: f[f"{QUERY}.hada_w1_a"].fill_(torch.nan), "NaN or infinity"
    yield "NaN alpha", lambda f: f[f"{QUERY}.alpha"].fill_(torch.nan), "NaN or infinity"
    yield (
        "other inputs",
        lambda f: f.update({f"{QUERY}.hada_w1_b": torch.ones(2, 7)}),
        "do not give its weight",
    )
    yield "bias of a layer without", lambda f: f.update({f"{QUERY}.diff_b": torch.ones(16)}), "bias of .*has none"
    yield "second text encoder", lambda f: f.update({"lora_te2_x.diff": torch.ones(2)}), "layers of the text_encoder_2"


@pytest.mark.parametrize(("spoil", "message"), [case[1:] for case in spoiled()], ids=[case[0] for case in spoiled()])
def test_a_file_that_does_not_fit_changes_nothing(pipeline, spoil, message):
    file, _ = file_of(pipeline, loha)
    spoil(file)
    before = weights_of(pipeline)
    with pytest.raises(ValueError, match=message):
        apply_weight_delta(pipeline, file)
    assert unchanged(pipeline, before)


def test_a_unet_alone_cannot_take_a_text_encoders_layers(pipeline):
    file, _ = file_of(pipeline, loha)
    with pytest.raises(ValueError, match=r"layers of the text_encoder.*Give a pipeline that has it"):
        apply_weight_delta(pipeline.unet, file)


def test_a_lora_of_diffusers_with_settings_is_not_merged(tmp_path, pipeline):
    """Its alphas are in the settings, which only load_lora_weights reads."""
    file, _ = file_of(pipeline, lora)
    save_file(file, tmp_path / "lora.safetensors", {"lora_adapter_metadata": '{"unet.r": 2}'})
    with pytest.raises(ValueError, match="load_lora_weights"):
        load_weight_delta(tmp_path / "lora.safetensors")


def test_the_demo_merges_them(tmp_path, pipeline):
    file, _ = file_of(pipeline, lokr)
    path = tmp_path / "style.safetensors"
    save_file(file, path)
    assert style_kind(path) == "delta"
    before, styles = sample(pipeline), Styles(pipeline)
    styles.apply([(path, 0.7)])
    assert (sample(pipeline) - before).abs().max() > 1e-3
    styles.apply([])
    assert torch.equal(sample(pipeline), before)


# ---------------------------------------------------------------------------------------------- the library itself

ALGORITHMS: dict[str, dict[str, Any]] = {
    "LoCon": {"algo": "locon"},
    "LoCon, Tucker": {"algo": "locon", "use_tucker": True},
    "DoRA": {"algo": "locon", "dora_wd": True},
    "DoRA by input": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "LoHa": {"algo": "loha"},
    "LoHa, Tucker": {"algo": "loha", "use_tucker": True},
    "LoHa, DoRA": {"algo": "loha", "dora_wd": True},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr, Tucker": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "LoKr, both split": {"algo": "lokr", "decompose_both": True, "factor": 8},
    "LoKr, DoRA": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "full": {"algo": "full"},
    "LoHa and norms": {"algo": "loha", "train_norm": True},
}


def library_network(model: nn.Module, alpha: float, options: dict[str, Any]) -> Any:
    """Attach the library's network with random weights to all layers of a model, and return it."""
    lycoris = pytest.importorskip("lycoris")
    network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=alpha, preset="full", **options)
    network.apply_to()
    GENERATOR.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=GENERATOR)
            parameter.copy_(parameter * (1 + 0.1 * noise) if name.endswith("dora_scale") else 0.2 * noise)
    return network


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_equal_to_the_librarys_own_merge(pipeline, options):
    """With alpha = rank: for others, its merge of LoHa and LoKr multiplies by alpha / rank twice, its forward once."""
    theirs: Any = make_tiny_pipeline("flow")
    network = library_network(theirs.unet, 2.0, options)
    file = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    network.restore()
    network.merge_to(1.0)
    before = weights_of(pipeline)
    applied = apply_weight_delta(pipeline, file)
    ours = pipeline.unet.state_dict()
    expected = theirs.unet.state_dict()
    assert sum(not torch.equal(ours[name], before[f"unet.{name}"]) for name in ours) > 20
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, **CLOSE)
    applied.take_back()
    assert unchanged(pipeline, before)


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_equal_to_a_model_that_the_library_runs(pipeline, options):
    theirs: Any = make_tiny_pipeline("flow")
    network = library_network(theirs.unet, 3.0, options)
    file = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    network.eval()
    with torch.no_grad():
        x, text = random(1, 4, 8, 8), random(1, 77, theirs.unet.config["cross_attention_dim"])
        expected = theirs.unet(x, 500, text).sample
        plain = pipeline.unet(x, 500, text).sample
        apply_weight_delta(pipeline, file)
        ours = pipeline.unet(x, 500, text).sample
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
