"""A LoRA on a quantized base: the base stays as it is, and the stock pipeline loads the LoRA without quantization."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from rectified_diffusers.cli import main
from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.loading.errors import dtype_option
from rectified_diffusers.models.quantization import quantization_of, quantized_loading, stored_tensors
from rectified_diffusers.training.config import DistillConfig
from rectified_diffusers.training.distill import DistillTrainer
from rectified_diffusers.training.lora import WEIGHTS
from rectified_diffusers.training.trainer import Trainer
from tests.marks import slow_but
from tests.models_any.families import build
from tests.models_any.test_training import PROMPTS, make_triplets
from tests.tiny import make_tiny_pipeline
from tests.training.helpers import SHORT, TRAINERS, digests

LORA: dict[str, Any] = {"lora_rank": 2, "learning_rate": 5e-2, "warmup_steps": 0, "ema_decay": 0.0}
STEPS = {"max_steps": 2, "save_every_steps": 1}


@pytest.fixture(params=["int8", "nf4"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A quantization. bitsandbytes computes nf4 on a CPU, for which diffusers only has to be told to load it there."""
    if request.param == "int8":
        pytest.importorskip("torchao")
    else:
        modules = pytest.importorskip("bitsandbytes").nn.modules
        from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as Quantizer

        monkeypatch.setattr(Quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(Quantizer, "update_device_map", lambda self, found: found or {"": "cpu"})
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: False, raising=False)  # packs only multiples of 32
    return request.param


def save(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Save a tiny pipeline; return its folder and the options of its call."""
    pipeline, options = (make_tiny_pipeline(), {}) if name == "unet" else build(name)
    pipeline.save_pretrained(folder)
    return str(folder), options


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], TripletDataset]:
    """Return the folder of a tiny Stable Diffusion 3, the options of its call, and triplets of it."""
    base = tmp_path_factory.mktemp("sd3")
    folder, options = save("sd3", base / "base")
    return folder, options, make_triplets(load(folder, None), base / "triplets", options)


def load(folder: str, kind: Any, precision: Any = "no", dtype: torch.dtype = torch.float32) -> Any:
    quantized = {} if kind is None else {"quantization_config": quantized_loading(folder, kind, precision)}
    return DiffusionPipeline.from_pretrained(folder, **dtype_option(dtype), **quantized)


def network_of(pipeline: Any) -> Any:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def restored(layer: nn.Module) -> torch.Tensor:
    """Return the values that a quantized layer computes with."""
    weight: Any = layer.weight
    if hasattr(weight, "dequantize") and not hasattr(weight, "quant_state"):
        return weight.dequantize()
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


def make(
    method: str, pipeline: Any, triplets: TripletDataset, folder: Path, teacher: Any = None, **options: Any
) -> Trainer[Any]:
    trainer_class, config_class = TRAINERS[method]
    settings = {**SHORT, **LORA, **STEPS, "batch_size": 2, **options}
    if method == "progressive":
        settings |= {"teacher_steps": 2, "steps_per_round": settings.pop("max_steps")}
    more = {"teacher": teacher or pipeline} if method == "dmd" else {}
    settings |= {"fake_updates": 1, "teacher_guidance_scale": 1.0} if method == "dmd" else {}
    return trainer_class(pipeline, triplets, config_class(output_dir=folder, **settings), **more)


CASES = [("distill", "unet"), ("reflow", "flux"), ("progressive", "z_image"), ("dmd", "sd3")]


@pytest.mark.parametrize(("method", "name"), slow_but([("distill", "unet")], CASES))
def test_the_lora_loads_onto_the_stock_pipeline(
    method: str, name: str, kind: Any, dataset: TripletDataset, tmp_path: Path
) -> None:
    """With the values of the quantized layers, the stock network with the LoRA answers as the trained one."""
    folder, options = save(name, tmp_path / "base")
    triplets = dataset if name == "unet" else make_triplets(load(folder, None), tmp_path / "triplets", options)
    pipeline = load(folder, kind)
    base = network_of(pipeline)
    before = {part: value.clone() for item in base.state_dict().items() for part, value in stored_tensors(*item)}
    trainer = make(method, pipeline, triplets, tmp_path / "run", mixed_precision="bf16" if name == "flux" else "no")
    trained = trainer.train()
    assert all(weight.dtype == torch.float32 for weight in trainer.student.parameters)
    assert all(".lora_" in name for name in trainer.student.names)
    after = dict(part for item in base.state_dict().items() for part in stored_tensors(*item))
    assert all(torch.equal(value, after[part]) for part, value in before.items())
    assert quantization_of(trained) == kind

    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert WEIGHTS in names
    assert not {"model_index.json", "transformer", "unet", "vae"} & names
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["quantization"] == kind
    assert f"trained on the base quantized to {kind}" in (tmp_path / "run" / "README.md").read_text()

    stock = load(folder, None)
    quantized, plain = dict(base.named_modules()), dict(network_of(stock).named_modules())
    for part, layer in plain.items():
        if isinstance(layer, nn.Linear) and type(quantized[part].weight) is not nn.Parameter:
            layer.weight = nn.Parameter(restored(quantized[part]))
    batch, conditioning = triplets.rows([0]), trainer.prompt_encoder(triplets.rows([0]).prompts)

    @torch.no_grad()
    def velocity(network: Any) -> torch.Tensor:
        return trainer.denoiser.velocity(network.eval(), batch.noise, torch.zeros(1), conditioning)

    alone = velocity(network_of(stock))
    stock.load_lora_weights(tmp_path / "run", weight_name=WEIGHTS)
    expected = velocity(trained)
    assert (expected - alone).abs().max() > 1e-2
    torch.testing.assert_close(velocity(network_of(stock)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "unet"])
def test_only_the_linear_layers_of_the_network_are_quantized(name: str, kind: Any, tmp_path: Path) -> None:
    folder, _ = save(name, tmp_path / "base")
    quantized, plain = load(folder, kind), load(folder, None)
    assert quantization_of(network_of(quantized)) == kind
    assert all(quantization_of(part) is None for part in (quantized.text_encoder, quantized.vae, network_of(plain)))
    layers = dict(network_of(quantized).named_modules())
    for part, layer in network_of(plain).named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Linear):
            error = (restored(layers[part]) - layer.weight).norm() / layer.weight.norm()
            assert 0 < error < {"int8": 0.01, "nf4": 0.15}[kind]
        elif weight is not None:
            assert torch.equal(layers[part].weight, weight)


@pytest.mark.parametrize(
    ("method", "name", "precision"),
    [("distill", "sd3", "bf16"), pytest.param("dmd", "unet", "no", marks=pytest.mark.slow)],
)
def test_a_run_in_two_parts_equals_one(
    method: str, name: str, precision: str, kind: Any, sd3: Any, dataset: TripletDataset, tmp_path: Path
) -> None:
    folder, _, triplets = sd3 if name == "sd3" else (*save(name, tmp_path / "base"), dataset)
    for run, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        pipeline = load(folder, kind, precision)
        settings = {"max_steps": steps, "mixed_precision": precision, "keep_checkpoints": 1}
        make(method, pipeline, triplets, tmp_path / run, **settings).train()
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")
    repeated = make(method, load(folder, kind, precision), triplets, tmp_path / "parts", **settings)
    before = (tmp_path / "parts" / WEIGHTS).stat().st_mtime_ns
    repeated.train()
    assert (tmp_path / "parts" / WEIGHTS).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=f"a run with quantization='{kind}', got quantization=None"):
        make(method, load(folder, None), triplets, tmp_path / "parts", **settings).train()


@pytest.mark.parametrize("method", slow_but(["dmd"], ["progressive", "dmd"]))
def test_the_quantized_weights_are_shared(method: str, kind: Any, sd3: Any, tmp_path: Path) -> None:
    folder, _, triplets = sd3
    pipeline = load(folder, kind)
    trainer: Any = make(method, pipeline, triplets, tmp_path / "run")
    shared = {id(weight) for weight in pipeline.transformer.parameters()}
    networks = [trainer.student.network, trainer.teacher, *([trainer.fake_score.network] if method == "dmd" else [])]
    for network in networks:
        assert all(".lora_" in name for name, weight in network.named_parameters() if id(weight) not in shared)


def test_a_pipeline_in_bfloat16_has_its_lora_in_float32(kind: Any, sd3: Any, tmp_path: Path) -> None:
    folder, _, triplets = sd3
    pipeline = load(folder, kind, "bf16", torch.bfloat16)
    trainer = make("distill", pipeline, triplets, tmp_path / "run", mixed_precision="bf16")
    assert {weight.dtype for weight in trainer.student.parameters} == {torch.float32}
    trainer.train()
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "run" / WEIGHTS).values())


def test_a_folder_that_is_already_quantized(kind: Any, sd3: Any, tmp_path: Path) -> None:
    """It is the base of a LoRA as it is; quantizing it again, and training its weights, are refused."""
    folder, _, triplets = sd3
    made = str(tmp_path / "quantized")
    load(folder, kind).save_pretrained(made)
    pipeline = load(made, None)
    assert quantization_of(pipeline.transformer) == kind
    make("distill", pipeline, triplets, tmp_path / "run", max_steps=1).train()
    assert (tmp_path / "run" / WEIGHTS).exists()
    with pytest.raises(ValueError, match=f"The transformer of .* is already quantized, got quantize='{kind}'"):
        load(made, kind)
    config = DistillConfig(output_dir=tmp_path / "full", **{**SHORT, "batch_size": 2})
    with pytest.raises(ValueError, match=rf"The transformer is quantized \({kind}\).*Set lora_rank"):
        DistillTrainer(pipeline, triplets, config)
    assert not (tmp_path / "full").exists()


def test_other_quantizations_are_refused(sd3: Any, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    pipeline, triplets = load(sd3[0], None), sd3[2]
    quantization.quantize_(pipeline.transformer, quantization.Int8WeightOnlyConfig())  # no config says so
    with pytest.raises(ValueError, match=r"The transformer is quantized \(Int8Tensor\), expected int8 of torchao"):
        make("distill", pipeline, triplets, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_pipeline_without_a_network_of_diffusers_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    parts = {"vae": ["diffusers", "AutoencoderKL"], "network": ["elsewhere", "Network"], "text_encoder": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **parts}))
    with pytest.raises(ValueError, match="has no network of diffusers to quantize"):
        quantized_loading(str(tmp_path), "int8")


def test_a_diffusion_teacher_is_refused(kind: Any, dataset: TripletDataset, tmp_path: Path) -> None:
    folder, _ = save("unet", tmp_path / "flow")
    make_tiny_pipeline("diffusion").save_pretrained(tmp_path / "diffusion")
    teacher = load(str(tmp_path / "diffusion"), kind)
    with pytest.raises(
        ValueError, match="The unet is quantized, and initialisation='snr_matching' computes new weights"
    ):
        make("dmd", load(folder, kind), dataset, tmp_path / "run", teacher)


def command(folder: str, triplets: TripletDataset, output: Path, *more: str) -> list[str]:
    settings = {"model": folder, "triplets": triplets.folder, "output-dir": output, "max-steps": 2, "batch-size": 2}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return ["distill", *options, "--warmup-steps", "0", "--learning-rate", "1e-2", *more]


def test_the_command(sd3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    folder, options, triplets = sd3
    run = tmp_path / "run"
    assert main(command(folder, triplets, run, "--quantize", "int8", "--lora-rank", "2")) == 0
    assert "trained to step 2" in capsys.readouterr().out
    stock: Any = load(folder, None)
    stock.load_lora_weights(run, weight_name=WEIGHTS)
    assert stock(PROMPTS[0], num_inference_steps=1, guidance_scale=1.0, **options).images
    assert main(command(folder, triplets, tmp_path / "full", "--quantize", "int8")) == 2
    assert "error: --quantize is for the base of a LoRA; give --lora-rank" in capsys.readouterr().err
    (run / "checkpoints").rename(tmp_path / "checkpoints")
    assert main(command(folder, triplets, run, "--quantize", "int8", "--lora-rank", "2")) == 2
    assert "holds a LoRA and no checkpoint of a run to resume" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_a_missing_library_is_one_line(
    library: str, sd3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import diffusers

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError(f"no {library}")

    kind, name = {"torchao": ("int8", "TorchAoConfig"), "bitsandbytes": ("nf4", "BitsAndBytesConfig")}[library]
    monkeypatch.setattr(diffusers, name, missing)
    folder, _, triplets = sd3
    assert main(command(folder, triplets, tmp_path / "run", "--quantize", kind, "--lora-rank", "2")) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert f'error: quantize="{kind}" needs {library}: pip install "rectified_diffusers[quantization]"' in lines[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nf4_without_a_gpu_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder, _ = save("sd3", tmp_path / "base")
    with pytest.raises(ValueError, match=r'quantize="nf4" does not run here: No GPU found.*Use "int8"'):
        quantized_loading(folder, "nf4")
