"""LoRA by the standard diffusers methods: equal to adding up * down * alpha / rank by hand, and taken back.

The files are those that people have: diffusers' own layout, and kohya's, as on CivitAI, with convolutions (LoCon).
By hand means as the authors' script does it: the product is added to the weights of the models.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from rectified_diffusers import RectifiedFlowEulerScheduler, RectifiedFlowPipeline, RectifiedFlowXLPipeline
from rectified_diffusers.loading.lora_checks import attaching
from tests.test_pipelines import hand_written_loop
from tests.tiny import make_tiny_pipeline, make_xl_components

EXAMPLE = Path(__file__).parent.parent / "examples" / "lora_stacking.py"
PROMPT = "a red apple"
UNET = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_v",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2",
    "mid_block.attentions.0.proj_in",  # a 1x1 convolution
]
LOCON = ["mid_block.resnets.0.conv1", "up_blocks.0.resnets.1.conv_shortcut", "mid_block.resnets.1.time_emb_proj"]
TEXT = [f"encoder.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")]
# The same arithmetic in another order: W x + B (A x) against (W + B A) x. Latents are of order 1.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def sample(pipeline: Any, steps: int = 2, **kwargs: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": steps, "output_type": "latent", **kwargs}
    return pipeline(PROMPT, generator=torch.manual_seed(0), **arguments).images


def layer_of(model: nn.Module, name: str) -> Any:
    """Find a layer by the end of its name: transformers 4 has `text_model.` before a text encoder's."""
    (layer,) = (module for key, module in model.named_modules() if key == name or key.endswith(f".{name}"))
    return layer


class Lora:
    """Random LoRA factors for some layers of the U-Net and the text encoder; each layer has a rank and an alpha."""

    def __init__(self, seed: int, unet: list[str] = UNET, text: list[str] = TEXT, rank: int = 3) -> None:
        self.pipeline: Any = make_tiny_pipeline("flow")
        self.generator = torch.Generator().manual_seed(seed)
        self.rank = rank
        self.unet = {name: self._factors(layer_of(self.pipeline.unet, name)) for name in unet}
        self.text = {name: self._factors(layer_of(self.pipeline.text_encoder, name)) for name in text}

    def _factors(self, layer: Any) -> tuple[Tensor, Tensor, float]:
        if isinstance(layer, nn.Conv2d):
            down, up = (self.rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, self.rank, 1, 1)
        else:
            down, up = (self.rank, layer.in_features), (layer.out_features, self.rank)
        alpha = 1 + 3 * float(torch.rand((), generator=self.generator))
        return self._random(*down), self._random(*up), alpha

    def _random(self, *shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=self.generator)

    def kohya(self) -> dict[str, Tensor]:
        """Return the tensors of a kohya file: lora_unet_... and lora_te_text_model_..., down, up and alpha.

        They are copies: a hotswap of PEFT swaps the tensors themselves.
        """
        tensors = {}
        for prefix, factors in (("lora_unet_", self.unet), ("lora_te_text_model_", self.text)):
            for name, (down, up, alpha) in factors.items():
                key = prefix + name.replace(".", "_")
                tensors[f"{key}.lora_down.weight"] = down.clone()
                tensors[f"{key}.lora_up.weight"] = up.clone()
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
        return tensors

    def peft(self) -> dict[str, Tensor]:
        """Return the tensors of a diffusers file, whose scale is alpha / rank = 1: so it is multiplied in."""
        tensors = {}
        for prefix, factors in (("unet.", self.unet), ("text_encoder.text_model.", self.text)):
            for name, (down, up, alpha) in factors.items():
                tensors[f"{prefix}{name}.lora_A.weight"] = down.clone()
                tensors[f"{prefix}{name}.lora_B.weight"] = up * alpha / self.rank
        return tensors

    def save(self, path: Path) -> Path:
        save_file(self.kohya(), path, {"ss_network_module": "networks.lora"})
        return path


@torch.no_grad()
def by_hand(*loras: tuple[Lora, float]) -> Any:
    """Build a pipeline with weight * up * down * alpha / rank of each LoRA added to its models' weights."""
    pipeline: Any = make_tiny_pipeline("flow")
    for lora, weight in loras:
        for model, factors in ((pipeline.unet, lora.unet), (pipeline.text_encoder, lora.text)):
            for name, (down, up, alpha) in factors.items():
                product = up.flatten(1) @ down.flatten(1)
                parameter = layer_of(model, name).weight
                parameter += weight * alpha / lora.rank * product.view(parameter.shape)
    return pipeline


def weights_of(pipeline: Any) -> dict[str, Tensor]:
    models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return {f"{name}.{key}": weight.clone() for name, m in models.items() for key, weight in m.state_dict().items()}


def assert_bit_equal(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.fixture
def pipeline() -> Any:
    return make_tiny_pipeline("flow")


@pytest.fixture(scope="module")
def loras() -> list[Lora]:
    """Three LoRAs of different ranks and layers, the second without a text encoder's part."""
    return [Lora(1), Lora(2, UNET[::2], [], rank=2), Lora(3, UNET[3:], TEXT[1:], rank=5)]


@pytest.fixture
def stacked(pipeline, loras) -> Any:
    """The pipeline with the three LoRAs, as a, b and c."""
    for name, lora in zip("abc", loras, strict=True):
        pipeline.load_lora_weights(lora.peft(), adapter_name=name)
    return pipeline


# ---------------------------------------------------------------------------------------------- equal to by hand


@pytest.mark.parametrize("layout", [Lora.peft, Lora.kohya], ids=["diffusers", "kohya"])
def test_a_lora_equals_the_product_added_by_hand(pipeline, loras, layout):
    before = sample(pipeline)
    pipeline.load_lora_weights(layout(loras[0]))
    expected = sample(by_hand((loras[0], 1.0)))
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(sample(pipeline), expected, **CLOSE)


def test_three_with_weights_equal_their_sum_by_hand(stacked, loras):
    weights = [0.7, -0.4, 1.2]
    stacked.set_adapters(["a", "b", "c"], weights)
    assert stacked.get_active_adapters() == ["a", "b", "c"]
    expected = sample(by_hand(*zip(loras, weights, strict=True)))
    torch.testing.assert_close(sample(stacked), expected, **CLOSE)


def test_a_kohya_file_with_convolutions(tmp_path, pipeline):
    """LoCon, of LyCORIS: 3x3 down and 1x1 up; here with convolutions of a residual block and its time embedding."""
    lora = Lora(4, [*UNET, *LOCON])
    file = lora.save(tmp_path / "locon.safetensors")
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    attached = {name for name, _ in pipeline.unet.named_modules() if name.endswith(".lora_A")}
    assert attached == {f"{name}.lora_A" for name in [*UNET, *LOCON]}
    expected = sample(by_hand((lora, 1.0)))
    torch.testing.assert_close(sample(pipeline), expected, **CLOSE)
    without_convolutions = sample(by_hand((Lora(4), 1.0)))
    assert (expected - without_convolutions).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [1, 3])
@pytest.mark.parametrize("steps", [1, 4])
def test_equal_to_the_authors_loop_on_merged_weights(pipeline, loras, steps, guidance):
    """Their script merges the LoRA into the weights and then loops: fused, ours is that to the bit."""
    pipeline.load_lora_weights(loras[0].kohya())
    attached = sample(pipeline, steps, guidance_scale=guidance)
    merged = hand_written_loop(by_hand((loras[0], 1.0)), [PROMPT], steps, guidance, seed=0)
    torch.testing.assert_close(attached, merged, rtol=1e-5, atol=5e-5)
    pipeline.fuse_lora(components=["unet", "text_encoder"])
    pipeline.unload_lora_weights()
    fused = sample(pipeline, steps, guidance_scale=guidance)
    assert torch.equal(fused, hand_written_loop(pipeline, [PROMPT], steps, guidance, seed=0))
    torch.testing.assert_close(fused, merged, rtol=1e-5, atol=5e-5)


def test_equal_to_the_stock_pipeline_bit_for_bit(stacked, loras):
    parts = dict(make_tiny_pipeline("flow").components)
    stock: Any = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    for name, lora in zip("abc", loras, strict=True):
        stock.load_lora_weights(lora.peft(), adapter_name=name)
    for either in (stacked, stock):
        either.set_adapters(["a", "b", "c"], [0.7, -0.4, 1.2])
    arguments = {"guidance_scale": 1.0, "cross_attention_kwargs": {"scale": 0.5}}
    assert torch.equal(sample(stacked, **arguments), sample(stock, **arguments))


@pytest.mark.parametrize(
    "text",
    [TEXT[:1], [TEXT[0], TEXT[3].replace("q_", "v_")], [TEXT[0], TEXT[2]], [TEXT[1]], [TEXT[2]]],
    ids=["q", "q v", "q fc1", "out", "fc1"],
)
def test_a_kohya_file_with_some_layers_of_the_text_encoder(pipeline, text):
    """diffusers refuses the first two, and leaves a layer of the third out."""
    lora = Lora(8, UNET[:2], text)
    pipeline.load_lora_weights(lora.kohya())
    torch.testing.assert_close(sample(pipeline), sample(by_hand((lora, 1.0))), **CLOSE)


def test_what_stock_diffusers_makes_of_kohya_files(loras):
    """Why `load_lora_weights` rewrites them: if this fails, diffusers reads them correctly."""
    parts = dict(make_tiny_pipeline("flow").components)
    stock: Any = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
        stock.load_lora_weights(Lora(8, UNET[:2], TEXT[:1]).kohya())
    stock.unload_lora_weights()
    for lora in (Lora(8, UNET[:2], [TEXT[0], TEXT[2]]), loras[0]):  # a layer left out; other alphas
        stock.load_lora_weights(lora.kohya())
        assert (sample(stock, guidance_scale=1.0) - sample(by_hand((lora, 1.0)))).abs().max() > 1e-3
        stock.unload_lora_weights()


@pytest.mark.parametrize("alphas", ["one", "some", "none"])
def test_alphas_of_a_kohya_file(pipeline, alphas):
    """Every layer has its own; one without has its rank."""
    lora = Lora(9)
    for factors in (lora.unet, lora.text):
        for i, (name, (down, up, alpha)) in enumerate(factors.items()):
            keep = alphas == "some" and i % 2
            factors[name] = (down, up, alpha if keep else 1.5 if alphas == "one" else lora.rank)
    file = lora.kohya()
    file = {key: value for key, value in file.items() if not (alphas != "one" and value.ndim == 0 and value == 3)}
    pipeline.load_lora_weights(file)
    torch.testing.assert_close(sample(pipeline), sample(by_hand((lora, 1.0))), **CLOSE)


def test_a_kohya_file_of_different_ranks_in_half_precision(pipeline):
    large, small = Lora(10, rank=6), Lora(11, rank=2)
    large.unet = {name: (large if i % 2 else small).unet[name] for i, name in enumerate(UNET)}
    file = {key: value.half() for key, value in large.kohya().items()}
    pipeline.load_lora_weights(file)
    for name, (down, up, alpha) in large.unet.items():
        large.unet[name] = (down.half().float(), up.half().float(), float(torch.tensor(alpha).half()) * 6 / len(down))
    for name, (down, up, alpha) in large.text.items():
        large.text[name] = (down.half().float(), up.half().float(), float(torch.tensor(alpha).half()))
    torch.testing.assert_close(sample(pipeline), sample(by_hand((large, 1.0))), **CLOSE)


def test_a_kohya_file_for_stable_diffusion_xl():
    """Two text encoders; lora_te1_ and lora_te2_ are their prefixes."""
    pipeline: Any = RectifiedFlowXLPipeline(**make_xl_components(), scheduler=RectifiedFlowEulerScheduler())
    layers = {"lora_unet_": (pipeline.unet, UNET[1]), "lora_te1_text_model_": (pipeline.text_encoder, TEXT[0])}
    layers["lora_te2_text_model_"] = (pipeline.text_encoder_2, TEXT[1])
    file, expected = {}, {}
    for alpha, (prefix, (model, name)) in enumerate(layers.items(), start=1):
        layer = layer_of(model, name)
        down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
        key = prefix + name.replace(".", "_")
        file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        expected[prefix] = layer.weight + alpha / 2 * up @ down
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    for prefix, (model, name) in layers.items():
        torch.testing.assert_close(layer_of(model, name).weight, expected[prefix])


def test_scale_of_a_single_call(pipeline, loras):
    """The authors' pipeline drops cross_attention_kwargs on the way to the U-Net."""
    pipeline.load_lora_weights(loras[0].peft())
    full = sample(pipeline)
    half = sample(pipeline, cross_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(half, sample(by_hand((loras[0], 0.5))), **CLOSE)
    assert torch.equal(sample(pipeline), full)


def test_a_text_encoder_lora_alone(pipeline):
    lora = Lora(5, [])
    before = sample(pipeline)
    pipeline.load_lora_weights(lora.peft())
    torch.testing.assert_close(sample(pipeline), sample(by_hand((lora, 1.0))), **CLOSE)
    pipeline.unload_lora_weights()
    assert torch.equal(sample(pipeline), before)


# ---------------------------------------------------------------------------------------------- managing adapters


def test_set_adapters_picks_and_weighs(stacked, loras):
    for name, lora in zip("abc", loras, strict=True):
        stacked.set_adapters(name, 0.5)
        torch.testing.assert_close(sample(stacked), sample(by_hand((lora, 0.5))), **CLOSE)
    with pytest.raises(ValueError, match="not in the list of present adapters"):
        stacked.set_adapters("d")


def test_the_unet_and_the_text_encoder_may_be_weighed_apart(pipeline, loras):
    pipeline.load_lora_weights(loras[0].peft(), adapter_name="a")
    pipeline.set_adapters("a", [{"unet": 0.0, "text_encoder": 1.0}])
    text_alone = Lora(1)  # the same random numbers
    text_alone.unet = {}
    torch.testing.assert_close(sample(pipeline), sample(by_hand((text_alone, 1.0))), **CLOSE)


def test_disable_and_enable(stacked):
    before, attached = sample(make_tiny_pipeline("flow")), sample(stacked)
    stacked.disable_lora()
    assert torch.equal(sample(stacked), before)
    stacked.enable_lora()
    assert torch.equal(sample(stacked), attached)


def test_delete_leaves_the_others(stacked, loras):
    stacked.set_adapters(["a", "b", "c"], [0.7, -0.4, 1.2])
    stacked.delete_adapters("b")
    assert stacked.get_list_adapters() == {"unet": ["a", "c"], "text_encoder": ["a", "c"]}
    expected = sample(by_hand((loras[0], 0.7), (loras[2], 1.2)))
    torch.testing.assert_close(sample(stacked), expected, **CLOSE)
    stacked.delete_adapters(["a", "c"])
    assert torch.equal(sample(stacked), sample(make_tiny_pipeline("flow")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unload_takes_everything_back_bit_for_bit(pipeline, loras, dtype):
    pipeline.to(dtype=dtype)
    weights, picture = weights_of(pipeline), sample(pipeline)
    for name, lora in zip("abc", loras, strict=True):
        pipeline.load_lora_weights(lora.kohya(), adapter_name=name)
    pipeline.set_adapters(["a", "b", "c"], [0.7, -0.4, 1.2])
    assert not torch.equal(sample(pipeline), picture)
    pipeline.unload_lora_weights()
    assert_bit_equal(weights_of(pipeline), weights)
    assert torch.equal(sample(pipeline), picture)


# ---------------------------------------------------------------------------------------------- fuse, unfuse


BOTH = ["unet", "text_encoder"]


def test_fuse_equals_attached_and_by_hand(stacked, loras):
    weights = [0.7, -0.4, 1.2]
    stacked.set_adapters(["a", "b", "c"], weights)
    attached = sample(stacked)
    stacked.fuse_lora(components=BOTH)
    assert stacked.num_fused_loras == 3
    torch.testing.assert_close(sample(stacked), attached, **CLOSE)
    stacked.unload_lora_weights()  # leaves the weights fused
    torch.testing.assert_close(sample(stacked), attached, **CLOSE)
    expected = weights_of(by_hand(*zip(loras, weights, strict=True)))
    for name, weight in weights_of(stacked).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unfuse_is_exact_to_rounding_and_unload_does_not_mend_it(stacked, dtype):
    """W + d - d is rounded twice per adapter; only what was never fused comes back bit for bit."""
    before = weights_of(make_tiny_pipeline("flow").to(dtype=dtype))
    stacked.to(dtype=dtype)
    stacked.fuse_lora(components=BOTH)
    stacked.unfuse_lora(components=BOTH)
    assert stacked.num_fused_loras == 0
    stacked.unload_lora_weights()
    after = weights_of(stacked)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    tolerance = 8 * torch.finfo(dtype).eps  # of numbers below 2 on the way, 3 adapters on and off
    for name, weight in after.items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=2 * tolerance)


# ---------------------------------------------------------------------------------------------- hotswap


def test_hotswap_puts_another_unet_lora_into_an_adapter(pipeline):
    first, second = Lora(6, text=[]), Lora(7, text=[])
    pipeline.load_lora_weights(first.kohya(), adapter_name="a")
    pipeline.load_lora_weights(second.kohya(), adapter_name="a", hotswap=True)
    assert pipeline.get_list_adapters() == {"unet": ["a"]}
    torch.testing.assert_close(sample(pipeline), sample(by_hand((second, 1.0))), **CLOSE)
    pipeline.unload_lora_weights()
    assert torch.equal(sample(pipeline), sample(make_tiny_pipeline("flow")))


def test_hotswap_to_another_rank_needs_room_made_for_it(pipeline):
    small, large = Lora(6, text=[], rank=2), Lora(7, text=[], rank=5)
    pipeline.enable_lora_hotswap(target_rank=5)
    pipeline.load_lora_weights(small.kohya(), adapter_name="a")
    torch.testing.assert_close(sample(pipeline), sample(by_hand((small, 1.0))), **CLOSE)
    pipeline.load_lora_weights(large.kohya(), adapter_name="a", hotswap=True)
    torch.testing.assert_close(sample(pipeline), sample(by_hand((large, 1.0))), **CLOSE)


def test_hotswap_of_a_text_encoders_lora_is_not_supported_by_diffusers(pipeline, loras):
    """A limit of diffusers up to the newest at the time of writing; delete the adapter and load the other instead."""
    pipeline.load_lora_weights(loras[0].peft(), adapter_name="a")
    with pytest.raises(ValueError, match="hotswapping is not supported for text encoders"):
        pipeline.load_lora_weights(loras[0].peft(), adapter_name="a", hotswap=True)


# ---------------------------------------------------------------------------------------------- saving


def attach(pipeline: Any) -> None:
    pipeline.load_lora_weights(Lora(1).peft())


def fuse(pipeline: Any) -> None:
    attach(pipeline)
    pipeline.fuse_lora(components=BOTH)


def disable(pipeline: Any) -> None:
    attach(pipeline)
    pipeline.disable_lora()


def delete(pipeline: Any) -> None:
    """Deleting the last adapter leaves its layers, and so the names of the weights."""
    attach(pipeline)
    pipeline.delete_adapters("default_0")


def attach_to_the_text_encoder(pipeline: Any) -> None:
    pipeline.load_lora_weights(Lora(1, []).peft())


@pytest.mark.parametrize("do", [attach, fuse, disable, delete, attach_to_the_text_encoder])
def test_saving_with_a_lora_attached_is_a_clear_error(pipeline, tmp_path, do: Callable[[Any], None]):
    do(pipeline)
    name = "text_encoder" if do is attach_to_the_text_encoder else "(unet|text_encoder)"
    with pytest.raises(
        ValueError, match=rf"attached to the pipeline's {name}.*fuse_lora.*unload_lora_weights.*save_lora_weights"
    ):
        pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_remedies_of_that_error(pipeline, tmp_path):
    before = sample(pipeline)
    attach(pipeline)
    attached = sample(pipeline)
    pipeline.fuse_lora(components=BOTH)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    torch.testing.assert_close(sample(RectifiedFlowPipeline.from_pretrained(tmp_path / "fused")), attached, **CLOSE)

    pipeline = make_tiny_pipeline("flow")
    attach(pipeline)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "plain")
    assert torch.equal(sample(RectifiedFlowPipeline.from_pretrained(tmp_path / "plain")), before)


def test_what_stock_diffusers_writes_cannot_be_loaded(pipeline, tmp_path):
    """Why there is an error: if this fails, diffusers can do it, and the guard can go."""
    pipeline.load_lora_weights(Lora(2, text=[]).peft())
    diffusers.StableDiffusionPipeline.save_pretrained(pipeline, tmp_path)
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        sample(RectifiedFlowPipeline.from_pretrained(tmp_path))


def test_a_lora_that_was_added_to_a_text_encoder_from_disk_is_not_saved_as_a_path(pipeline, tmp_path):
    """transformers would write the LoRA and the path of its base, which leads out of the folder."""
    pipeline.save_pretrained(tmp_path / "base")
    loaded: Any = RectifiedFlowPipeline.from_pretrained(tmp_path / "base")
    loaded.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="A LoRA is attached to the pipeline's text_encoder"):
        loaded.save_pretrained(tmp_path / "saved")


# ---------------------------------------------------------------------------------------------- example


def test_the_example_runs(tmp_path, monkeypatch):
    make_tiny_pipeline("flow").save_pretrained(tmp_path / "model")
    files = [f"{Lora(seed).save(tmp_path / f'{seed}.safetensors')}=0.5" for seed in (1, 2, 3)]
    arguments = ["--model", f"{tmp_path}/model", "--output", f"{tmp_path}/sheet.png", "--lora", *files]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_a_lack_of_memory_is_not_taken_for_a_lora_that_does_not_fit(pipeline):
    with pytest.raises(torch.OutOfMemoryError, match="20 GiB"), attaching(pipeline, hotswap=False):
        raise torch.OutOfMemoryError("20 GiB")
