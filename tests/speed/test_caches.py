"""Memory of prompts and times: used when nothing changed, dropped when a weight, a LoRA or an argument did."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from rectified_diffusers.speed.caches import PROMPTS, cached_prompts, cached_times
from rectified_diffusers.speed.optimize import optimize
from tests.marks import slow_but
from tests.tiny import make_tiny_pipeline, sample

LAYERS = ["to_q", "to_k", "to_v", "q_proj", "v_proj"]


@pytest.fixture
def lora() -> dict[str, torch.Tensor]:
    """A LoRA for the U-Net and the text encoder of the tiny pipeline, strong enough to see."""
    pipeline = make_tiny_pipeline(seed=1)
    weights: dict[str, torch.Tensor] = {}
    for name in ("unet", "text_encoder"):
        model = getattr(pipeline, name)
        model.add_adapter(LoraConfig(r=2, target_modules=LAYERS))
        for key, value in get_peft_model_state_dict(model).items():
            weights[f"{name}.{key}"] = torch.randn(value.shape, generator=torch.manual_seed(len(weights))) / 2
    return weights


class Counter:
    """Counts the calls of a model's forward."""

    def __init__(self, model: Any) -> None:
        self.calls = 0
        model.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


def test_a_prompt_is_encoded_once_and_every_argument_counts():
    pipeline: Any = make_tiny_pipeline()
    encoder = Counter(pipeline.text_encoder)
    asked: list[dict[str, Any]] = [
        {},
        {"clip_skip": 1},
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "negative_prompt": "a cat"},
        {"guidance_scale": 2.0, "negative_prompt": "a dog"},
        {"num_images_per_prompt": 2},
        {"prompt": ["a fox", "an owl"]},
    ]
    expected = [sample(pipeline, **options) for options in asked]
    encoder.calls = 0
    with torch.no_grad(), cached_prompts(pipeline):
        first = [sample(pipeline, **options) for options in asked]
        once = encoder.calls
        again = [sample(pipeline, **options) for options in asked]
        assert once > 0
        assert encoder.calls == once
    for runs in zip(expected, first, again, strict=True):
        assert torch.equal(runs[0], runs[1])
        assert torch.equal(runs[0], runs[2])
    assert len({float(latents.double().sum()) for latents in first}) == len(asked)


def test_what_is_given_out_is_a_copy_and_old_prompts_are_forgotten():
    pipeline: Any = make_tiny_pipeline()
    encode = lambda prompt: pipeline.encode_prompt(prompt, "cpu", 1, False)[0]  # noqa: E731
    with torch.no_grad(), cached_prompts(pipeline) as forget:
        first = encode("a fox").clone()
        encode("a fox").zero_()
        assert torch.equal(encode("a fox"), first)
        encoder = Counter(pipeline.text_encoder)
        for i in range(PROMPTS):
            encode(str(i))
        encode("a fox")
        assert encoder.calls == PROMPTS + 1
        forget()
        encode("a fox")
        assert encoder.calls == PROMPTS + 2
        pipeline.encode_prompt(None, "cpu", 1, False, prompt_embeds=first)  # tensors are passed on
        assert encoder.calls == PROMPTS + 2


def test_a_weight_that_changes_drops_the_memory():
    pipeline: Any = make_tiny_pipeline()
    with torch.no_grad(), cached_prompts(pipeline):
        before = sample(pipeline)
        pipeline.text_encoder.load_state_dict(make_tiny_pipeline(seed=1).text_encoder.state_dict())
        assert not torch.equal(sample(pipeline), before)


def test_a_time_is_embedded_once():
    pipeline: Any = make_tiny_pipeline()
    layer = Counter(pipeline.unet.time_embedding.linear_1)
    expected = sample(pipeline, num_inference_steps=3)
    with torch.no_grad(), cached_times(pipeline.unet):
        layer.calls = 0
        assert torch.equal(sample(pipeline, num_inference_steps=3), expected)
        assert torch.equal(sample(pipeline, num_inference_steps=3), expected)
        assert layer.calls == 3
        pipeline.unet.time_embedding.linear_1.weight.mul_(2)
        assert not torch.equal(sample(pipeline, num_inference_steps=3), expected)


@pytest.mark.parametrize("fuse_qkv", slow_but([True], [False, True]))
def test_a_lora_acts_and_goes_as_without_optimize(lora, fuse_qkv):
    """Load, scale, fuse, unfuse, unload: after each, the picture is that of a pipeline that was never optimized."""
    settings: dict[str, Any] = {"dtype": None, "channels_last": False, "fuse_qkv": fuse_qkv, "keep_memory": False}
    plain, fast = make_tiny_pipeline(), make_tiny_pipeline()
    steps: list[Any] = [
        lambda pipe: None,
        lambda pipe: pipe.load_lora_weights(dict(lora), adapter_name="a"),
        lambda pipe: pipe.set_adapters("a", 0.5),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    seen = []
    with optimize(fast, **settings):
        for step in steps:
            step(plain)
            step(fast)
            seen.append(sample(plain))
            torch.testing.assert_close(sample(fast), seen[-1], atol=1e-4, rtol=1e-4)
    for i, j in ((0, 1), (1, 2), (4, 5)):
        assert (seen[i] - seen[j]).abs().max() > 0.01, "the LoRA is too weak to tell"
