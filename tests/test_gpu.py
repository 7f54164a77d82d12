"""What a GPU does otherwise than a CPU: compiled code, 16 bits, offload, its own generator, FSDP2, a gradient scaler.

Each test runs on a CPU, too, where the path exists there; `python -m pytest -m gpu tests/test_gpu.py` runs the CUDA
variants. On a CPU torch.compile traces the models and leaves out the generation of code, which takes minutes.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch._dynamo.utils import counters

from rectified_diffusers import (
    RectifiedFlowControlNetPipeline,
    RectifiedFlowImg2ImgPipeline,
    TripletConfig,
    TripletDataset,
    generate_triplets,
    optimize,
)
from tests.test_lora import Lora
from tests.tiny import make_tiny_controlnet, make_tiny_pipeline, sample
from tests.training.checkpoints import read_checkpoint
from tests.training.helpers import make_dataset, make_trainer
from tests.training.test_processes import CONFIGS, launch, tensors

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
SLOW_CPU = pytest.param("cpu", marks=pytest.mark.very_slow)
HALVES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Levels of 255: largest and mean difference to float32. The tiny model's weights are random, its pictures full of
# contrast: rounding shows more than usual.
ROUNDING = {torch.float16: (3, 0.2), torch.bfloat16: (12, 1.0)}


def require(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return require(request.param)


@pytest.fixture(params=[SLOW_CPU, CUDA])
def slow_device(request: pytest.FixtureRequest) -> str:
    return require(request.param)


@pytest.fixture(params=[CUDA])
def cuda(request: pytest.FixtureRequest) -> str:
    return require(request.param)


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let convolutions in float32 keep their digits on a GPU and repeat them, so that they can be a reference."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def num_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Count what is compiled, from a clean state; without a GPU, trace only."""
    compile_ = torch.compile
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def draw(pipeline: Any, prompt: Any = "a red apple", **options: Any) -> np.ndarray:
    options = {"num_inference_steps": 2, "output_type": "pil", **options}
    pictures = pipeline(prompt, **{"generator": torch.Generator().manual_seed(0), **options}).images
    return np.stack([np.asarray(picture).astype(int) for picture in pictures])


def assert_near(found: np.ndarray, expected: np.ndarray, dtype: torch.dtype) -> None:
    largest, mean = ROUNDING[dtype]
    differences = np.abs(found - expected)
    print(f"{dtype}: largest {differences.max()}, mean {differences.mean():.3f}")
    assert differences.max() <= largest
    assert 0 < differences.mean() <= mean


# ---------------------------------------------------------------------------------------------- 16 bits


@pytest.mark.parametrize("dtype", HALVES, ids=HALVES.values())
@pytest.mark.parametrize("kind", ["flow", "xl_flow"])
def test_pictures_in_16_bits_are_those_in_32(device, dtype, kind):
    pipeline = make_tiny_pipeline(kind).to(device)
    expected = draw(pipeline)
    with optimize(pipeline, dtype=dtype, compile=False):
        assert pipeline.unet.dtype == dtype
        assert_near(draw(pipeline), expected, dtype)
    np.testing.assert_array_equal(draw(pipeline), expected)
    assert_near(draw(pipeline.to(dtype)), expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flow", "xl_flow"])
def test_pictures_of_a_gpu_are_those_of_a_cpu(cuda, kind):
    expected = sample(make_tiny_pipeline(kind), output_type="pt")
    found = sample(make_tiny_pipeline(kind).to(cuda), output_type="pt")
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------- offload


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("kind", ["flow", "xl_flow", "controlnet"])
def test_offloading_to_a_gpu(cuda, method, kind):
    pipeline, options = make_tiny_pipeline("flow" if kind == "controlnet" else kind), {}
    if kind == "controlnet":
        options["image"] = torch.rand(1, 3, 32, 32, generator=torch.manual_seed(5))
        pipeline = RectifiedFlowControlNetPipeline.from_pipe(pipeline, controlnet=make_tiny_controlnet(pipeline.unet))
    plain = sample(pipeline.to(cuda), output_type="pt", **options)
    pipeline.to("cpu")
    getattr(pipeline, method)()
    for _ in range(2):
        torch.testing.assert_close(sample(pipeline, output_type="pt", **options), plain, atol=1e-5, rtol=0)
    pipeline.maybe_free_model_hooks()
    assert "cuda" not in {parameter.device.type for parameter in pipeline.unet.parameters()}


# ---------------------------------------------------------------------------------------------- generators


def test_a_generator_of_the_device_decides_the_noise(device):
    pipeline = make_tiny_pipeline().to(device)
    generator = lambda seed: torch.Generator(device).manual_seed(seed)  # noqa: E731
    first, second = (draw(pipeline, generator=generator(seed)) for seed in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(draw(pipeline, generator=generator(0)), first)
    both = draw(pipeline, ["a red apple"] * 2, generator=[generator(0), generator(1)])
    assert np.abs(both - np.concatenate([first, second])).max() <= 1  # rounding: a batch adds up in another order
    if device == "cuda":
        assert (draw(pipeline) != first).any()  # a CPU's numbers are others


def test_a_generator_of_the_device_serves_img2img(device):
    pipeline = RectifiedFlowImg2ImgPipeline.from_pipe(make_tiny_pipeline()).to(device)
    options = {"image": torch.rand(1, 3, 32, 32, generator=torch.manual_seed(5)), "strength": 0.5}
    pictures = [draw(pipeline, generator=torch.Generator(device).manual_seed(seed), **options) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).any()


# ---------------------------------------------------------------------------------------------- triplets


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_triplets_with_autocast_are_those_without(device, precision, tmp_path):
    options = {"num_triplets": 4, "num_inference_steps": 4, "guidance_scale": 2.0, "storage_dtype": "float32"}
    made = {}
    for name in ("no", precision):
        teacher, config = make_tiny_pipeline("diffusion").to(device), TripletConfig(**options, mixed_precision=name)
        dataset = generate_triplets(teacher, ["a cat", "a dog"], tmp_path / name, config, progress=False)
        made[name] = dataset.rows(range(4))
    assert torch.equal(made[precision].noise, made["no"].noise)
    difference = (made[precision].data - made["no"].data).norm() / made["no"].data.norm()
    assert 0 < difference < {"bf16": 0.05, "fp16": 0.01}[precision]


# ---------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TripletDataset:
    return make_dataset(tmp_path_factory.mktemp("triplets"))


def environment_of(device: str) -> dict[str, str]:
    """Let launched processes train on a device."""
    if device == "cpu":
        return {"ACCELERATE_USE_CPU": "true"}
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_trained_alike(run: Path, other: Path) -> None:
    """Compare all that two checkpoints hold.

    Adam divides a gradient by its own size: where that is nearly 0, rounding decides about a part of a step of 1e-3.
    """
    found, expected = tensors(run), tensors(other)
    assert found.keys() == expected.keys()
    differences = torch.cat([(found[name].cpu() - expected[name].cpu()).abs().flatten() for name in expected])
    assert differences.mean() < 1e-6
    assert differences.max() < 1e-3


def test_bfloat16_trains_as_float32_does(device, dataset, tmp_path):
    for precision in ("no", "bf16"):
        trainer = make_trainer("reflow", dataset, tmp_path / precision, mixed_precision=precision)
        assert trainer.device.type == device
        trainer.train()
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "no"), rel=0.02)


@pytest.mark.gpu
def test_float16_trains_with_a_scaler_that_is_resumed(cuda, dataset, tmp_path):
    """In a process of its own: accelerate has one scaler, or none, for the life of a process."""
    make_trainer("reflow", dataset, tmp_path / "no", max_steps=4).train()
    options: dict[str, Any] = {"mixed_precision": "fp16", "max_steps": 4}
    runs = {"straight": [options], "parts": [{**options, "max_steps": 2}, options]}
    words = [f"{name}={json.dumps(part)}" for name, parts in runs.items() for part in parts]
    launch(
        [sys.executable, "-m", "tests.training.processes", str(dataset.folder), str(tmp_path), *words],
        **environment_of(cuda),
    )
    assert losses(tmp_path / "straight") == pytest.approx(losses(tmp_path / "no"), rel=0.1)  # without skipped steps
    last = [read_checkpoint(tmp_path / name / "checkpoints" / "step-00000004") for name in runs]
    assert last[0].state["scaler"] == last[1].state["scaler"]
    assert last[0].state["scaler"]["scale"] > 1
    assert_trained_alike(tmp_path / "parts", tmp_path / "straight")


def test_weights_in_fsdp_on_one_device_are_trained_as_without(slow_device, dataset, tmp_path):
    make_trainer("reflow", dataset, tmp_path / "alone", max_steps=4).train()
    fsdp = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())["fsdp_config"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", "PORT"]
    run = f"sharded={json.dumps({'max_steps': 4})}"
    launch(
        [*torchrun, "-m", "tests.training.processes", str(dataset.folder), str(tmp_path), run],
        timeout=300,
        ACCELERATE_USE_FSDP="true",
        **environment_of(slow_device),
        **{name.upper(): str(value) for name, value in fsdp.items()},
    )
    record = json.loads((tmp_path / "sharded-0.json").read_text())
    assert (record["distributed_type"], record["sharded"]) == ("FSDP", True)
    assert_trained_alike(tmp_path / "sharded", tmp_path / "alone")


# ------------------------------------------------------------------------------ compiled, last: it takes longest


def test_a_compiled_pipeline_keeps_up_with_loras_and_sizes_and_is_restored(slow_device, num_graphs):
    """Hotswapped LoRAs compile nothing anew, other sizes once; on a GPU from the third call on it replays graphs."""
    first, second = Lora(6, text=[], rank=2), Lora(7, text=[], rank=5)
    pipeline, plain = (make_tiny_pipeline().to(slow_device) for _ in range(2))
    pipeline.enable_lora_hotswap(target_rank=5)
    for each in (pipeline, plain):
        each.load_lora_weights(first.kohya(), adapter_name="a")
    before = sample(pipeline, output_type="pt")

    def assert_same(**size: int) -> None:
        for seed in range(3):
            expected = sample(plain, seed, output_type="pt", **size)
            torch.testing.assert_close(sample(pipeline, seed, output_type="pt", **size), expected, atol=1e-4, rtol=0)

    with optimize(pipeline, dtype=None, compile=True):
        assert_same()
        compiled = num_graphs()
        assert compiled == 3  # U-Net, decoder and text encoder, each in one piece
        pipeline.load_lora_weights(second.kohya(), adapter_name="a", hotswap=True)
        plain.delete_adapters("a")
        plain.load_lora_weights(second.kohya(), adapter_name="a")
        assert_same()
        assert num_graphs() == compiled
        assert_same(height=64, width=32)
        with_sizes = num_graphs()
        assert with_sizes <= compiled + 2  # U-Net and decoder
        assert_same(height=32, width=64)
        assert_same()
        assert num_graphs() == with_sizes
        pipeline.load_lora_weights(first.kohya(), adapter_name="a", hotswap=True)
    assert "forward" not in vars(pipeline.unet)
    assert torch.equal(sample(pipeline, output_type="pt"), before)
    assert num_graphs() == with_sizes


@pytest.mark.parametrize(
    ("device", "compiles"),
    [
        ("cpu", False),
        pytest.param("cuda", False, marks=pytest.mark.gpu),
        pytest.param("cuda", True, marks=pytest.mark.gpu),
    ],
    indirect=["device"],
)
def test_a_controlnet_steers_an_optimized_pipeline(device, compiles, num_graphs):
    plain = make_tiny_pipeline()
    controlnet = make_tiny_controlnet(plain.unet)
    pipeline = RectifiedFlowControlNetPipeline.from_pipe(plain, controlnet=controlnet).to(device)
    controls = torch.rand(2, 1, 3, 32, 32, generator=torch.manual_seed(5))
    expected = [draw(pipeline, image=control) for control in controls]
    without = draw(pipeline, image=controls[0], controlnet_conditioning_scale=0.0)
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    with optimize(pipeline, dtype=dtype, compile=compiles):
        for control, picture in zip(controls, expected, strict=True):
            found = [draw(pipeline, image=control) for _ in range(3)][-1]
            assert_near(found, picture, dtype)
            assert np.abs(found - without).mean() > 3
    np.testing.assert_array_equal(draw(pipeline, image=controls[1]), expected[1])
