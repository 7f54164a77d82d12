"""Files from strangers, as SECURITY.md promises: no pickle is opened; what lies, is foreign or damaged is an error.

What a test calls a pickle here would leave a file behind if anything unpickled it.
"""

import ast
import contextlib
import json
import pickle
import shutil
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, ControlNetModel, DiffusionPipeline
from safetensors.torch import load_file, save_file

from rectified_diffusers import (
    RectifiedFlowEulerScheduler,
    RectifiedFlowImg2ImgPipeline,
    RectifiedFlowPipeline,
    RectifiedFlowXLPipeline,
    apply_weight_delta,
    load_weight_delta,
    optimize,
)
from rectified_diffusers.cli import main
from rectified_diffusers.cli.shared import load_pipeline
from rectified_diffusers.demo.styles import Styles
from rectified_diffusers.evaluation.alignment import SentenceFeatures
from rectified_diffusers.loading.errors import remedies
from rectified_diffusers.loading.lora_checks import MAX_RANK
from rectified_diffusers.loading.safety import refuse_foreign_code
from rectified_diffusers.weights.components import swap_components
from tests.hub.client import sample
from tests.marks import slow_but
from tests.test_lora import Lora
from tests.tiny import make_tiny_pipeline, make_tiny_xl_pipeline

SOURCE = Path(__file__).parent.parent / "src"
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # 16 channels to 16
TEXT_LAYER = "text_model.encoder.layers.0.self_attn.q_proj"


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """Yield a function that writes a pickle, and check afterwards that none was opened."""
    sprung = tmp_path / "sprung"

    def write(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(Trap(sprung)))
        return path

    yield write
    assert not sprung.exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_tiny_pipeline("flow").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a saved pipeline, its weights as links."""
    target = tmp_path / "model"
    for file in (file for file in saved.rglob("*") if file.is_file()):
        copy = target / file.relative_to(saved)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            copy.symlink_to(file)
        else:
            copy.write_bytes(file.read_bytes())
    return target


def as_pickle(folder: Path, name: str) -> Path:
    """Replace the weights of one part by the same as a pickle."""
    file = folder / name
    pickled = file.with_name("pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin")
    torch.save(load_file(file), pickled)
    file.unlink()
    return pickled


# No pickles


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_folder_with_pickles_is_refused_and_its_conversion_loads(folder, tmp_path, name):
    pickled = as_pickle(folder, name)
    with pytest.raises(OSError, match=r"weights as pickles .*run code.*Convert it once") as error:
        RectifiedFlowPipeline.from_pretrained(folder)
    assert str(pickled) in str(error.value)
    remedy = f"DiffusionPipeline.from_pretrained({str(folder)!r}).save_pretrained(new_folder)"
    assert remedy in str(error.value)
    eval(remedy, {"DiffusionPipeline": DiffusionPipeline, "new_folder": tmp_path / "new"})
    assert torch.equal(
        sample(RectifiedFlowPipeline.from_pretrained(tmp_path / "new")), sample(make_tiny_pipeline("flow"))
    )


def test_the_commands_refuse_a_folder_with_pickles(folder, capsys):
    as_pickle(folder, "vae/diffusion_pytorch_model.safetensors")
    assert main(["generate", "--model", str(folder), "a red apple", "-o", str(folder / "a.png")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "vae/diffusion_pytorch_model.bin), expected .safetensors" in message


def test_a_pickle_beside_safetensors_is_never_opened(folder, trap):
    trap(folder / "unet/diffusion_pytorch_model.bin")
    trap(folder / "text_encoder/pytorch_model.bin")
    sample(RectifiedFlowPipeline.from_pretrained(folder))


def test_asking_for_pickles_is_refused(folder):
    with pytest.raises(ValueError, match=r"use_safetensors=False requests pickles.*Omit it"):
        RectifiedFlowPipeline.from_pretrained(folder, use_safetensors=False)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth", ".SAFETENSORS", ""])
def test_a_single_file_that_is_a_pickle(tmp_path, trap, suffix):
    file = trap(tmp_path / f"model{suffix}")
    with pytest.raises(
        ValueError, match=r"not a \.safetensors file.*run code.*from_single_file\(file\)\.save_pretrained"
    ):
        RectifiedFlowPipeline.from_single_file(str(file))


def test_a_pickle_under_the_name_of_safetensors(tmp_path, trap, folder):
    file = trap(tmp_path / "model.safetensors")
    with pytest.raises((OSError, ValueError)):
        RectifiedFlowPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    pipeline = make_tiny_pipeline("flow")
    with pytest.raises(ValueError, match="cannot be loaded into"):
        pipeline.load_lora_weights(tmp_path, weight_name="model.safetensors")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_weight_delta(file)


@pytest.mark.parametrize("make", [make_tiny_pipeline, make_tiny_xl_pipeline], ids=["1.5", "XL"])
def test_a_lora_that_is_a_pickle(tmp_path, trap, make):
    pipeline: Any = make()
    for suffix in (".bin", ".pt", ".ckpt"):
        file = trap(tmp_path / f"pytorch_lora_weights{suffix}")
        for arguments in ({"weight_name": file.name}, {}):
            source = tmp_path if arguments else file
            with pytest.raises(ValueError, match=r"not a \.safetensors file.*torch\.load\(file, weights_only=True\)"):
                pipeline.load_lora_weights(str(source), **arguments)
    with pytest.raises(ValueError, match=r"not a \.safetensors file"):  # a folder that has nothing else
        pipeline.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors=False"):
        pipeline.load_lora_weights(tmp_path, use_safetensors=False)


def test_words_and_ip_adapters_that_are_pickles(tmp_path, trap):
    pipeline: Any = make_tiny_pipeline("flow")
    file = trap(tmp_path / "learned_embeds.bin")
    for source in (tmp_path, file, [file]):
        with pytest.raises(ValueError, match=r"learned_embeds.bin is not a \.safetensors.*'word.safetensors'"):
            pipeline.load_textual_inversion(source, token="<word>")
    with pytest.raises(ValueError, match=r"other.pt is not a \.safetensors"):
        pipeline.load_textual_inversion(tmp_path, weight_name="other.pt")
    with pytest.raises(ValueError, match=r"adapter.bin is not a \.safetensors.*h94/IP-Adapter"):
        pipeline.load_ip_adapter(tmp_path, "models", ["adapter.bin"])
    with pytest.raises(ValueError, match="Required keys are"):  # of diffusers: tensors have no file to judge
        pipeline.load_ip_adapter({}, subfolder="", weight_name="")
    trap(tmp_path / "models/image_encoder/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not a \.safetensors.*CLIPVisionModel"):
        pipeline.load_ip_adapter(tmp_path, "models", "adapter.safetensors")


def test_other_models_that_are_pickles(tmp_path, trap, saved):
    """The demo's ControlNet, the small decoder of `optimize`, and the text encoder of the evaluation."""
    from rectified_diffusers.cli.demo import _load_controlnet

    pipeline: Any = make_tiny_pipeline("flow")
    ControlNetModel.from_unet(pipeline.unet).save_pretrained(tmp_path / "controlnet")
    AutoencoderTiny().save_config(tmp_path / "tiny")
    pipeline.text_encoder.config.save_pretrained(tmp_path / "text")
    pipeline.tokenizer.save_pretrained(tmp_path / "text")
    (tmp_path / "controlnet/diffusion_pytorch_model.safetensors").unlink()
    for name in ("controlnet/diffusion_pytorch_model.bin", "tiny/diffusion_pytorch_model.bin"):
        trap(tmp_path / name)
    trap(tmp_path / "text/pytorch_model.bin")
    with pytest.raises(OSError, match="weights as pickles"):
        _load_controlnet(str(tmp_path / "controlnet"), torch.float32)
    with pytest.raises(OSError, match="safetensors"):
        optimize(pipeline, decoder=tmp_path / "tiny")
    with pytest.raises(OSError, match="safetensors"):
        SentenceFeatures(tmp_path / "text")


def calls(name: str) -> list[tuple[str, ast.Call]]:
    """Return the calls of a method of that name in our source, with where they are."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
                found.append((f"{file.name}:{node.lineno}", node))
    return found


def test_every_model_that_we_load_is_asked_for_in_safetensors():
    loaded = 0
    for place, call in calls("from_pretrained"):
        whose = ast.unparse(call.func)
        if "Tokenizer" in whose or whose == "super().from_pretrained":  # which `safetensors_only` precedes
            continue
        loaded += 1
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert options.get("use_safetensors") == "True", f"{place}: {whose}"
    assert loaded >= 5
    assert not calls("from_single_file")[1:]  # ours calls diffusers', and nothing else does


def test_trust_remote_code_is_never_set_by_us():
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = {keyword.arg for keyword in node.keywords} if isinstance(node, ast.Call) else set()
            assert "trust_remote_code" not in names, f"{file}:{getattr(node, 'lineno', 0)}"
            is_name = isinstance(node, (ast.Name, ast.arg)) and "trust_remote_code" in ast.unparse(node)
            assert not is_name, f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Dict):
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
                assert "trust_remote_code" not in keys, f"{file}:{node.lineno}"


# Code in a model's folder

CODE = """
from pathlib import Path
from diffusers import {base}
Path({canary!r}).touch()
class Evil({base}):
    pass
"""


def write_code(file: Path, canary: Path, base: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(CODE.format(base=base, canary=str(canary)))


def change_index(folder: Path, **entries: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | entries))


def change_config(folder: Path, file: str, **entries: Any) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | entries))


def code_of_a_part(folder: Path, canary: Path) -> None:
    write_code(folder / "unet" / "evil.py", canary, "UNet2DConditionModel")
    change_index(folder, unet=["evil", "Evil"])


def code_of_the_scheduler(folder: Path, canary: Path) -> None:
    write_code(folder / "scheduler" / "evil.py", canary, "PNDMScheduler")
    change_index(folder, scheduler=["evil", "Evil"])


def code_of_the_text_encoder(folder: Path, canary: Path) -> None:
    write_code(folder / "text_encoder" / "evil.py", canary, "ModelMixin")
    change_index(folder, text_encoder=["evil", "Evil"])


def code_of_the_pipeline(folder: Path, canary: Path) -> None:
    write_code(folder / "pipeline.py", canary, "StableDiffusionPipeline")
    change_index(folder, _class_name=["pipeline", "Evil"])


def code_of_a_pipeline_by_another_name(folder: Path, canary: Path) -> None:
    write_code(folder / "evil.py", canary, "StableDiffusionPipeline")
    change_index(folder, _class_name=["evil", "Evil"])


def code_of_an_additional_part(folder: Path, canary: Path) -> None:
    write_code(folder / "extra" / "evil.py", canary, "UNet2DConditionModel")
    change_index(folder, extra=["evil", "Evil"])


def code_by_a_dotted_name(folder: Path, canary: Path) -> None:
    write_code(folder / "unet" / "evil.py", canary, "UNet2DConditionModel")
    change_index(folder, unet=["unet.evil", "Evil"])


def code_beside_the_index_of_the_working_directory(folder: Path, canary: Path) -> None:
    """Where Python looks for modules in the working directory, as in a notebook, and that is the model's folder."""
    write_code(folder / "evil_module.py", canary, "UNet2DConditionModel")
    change_index(folder, unet=["evil_module", "Evil"])


def code_under_the_name_of_our_scheduler(folder: Path, canary: Path) -> None:
    write_code(folder / "evil_scheduler.py", canary, "PNDMScheduler")
    change_index(
        folder, scheduler=["evil_scheduler", "RectifiedFlowEulerScheduler"], _class_name="StableDiffusionPipeline"
    )


def code_of_an_installed_package(folder: Path, canary: Path) -> None:
    """Importing a package that is there runs it; which one is not for the model to say."""
    change_index(folder, unet=["wsgiref.simple_server", "WSGIServer"])


def code_that_a_config_maps(folder: Path, canary: Path) -> None:
    write_code(folder / "text_encoder" / "evil.py", canary, "ModelMixin")
    change_config(folder, "text_encoder/config.json", auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})
    write_code(folder / "unet" / "evil.py", canary, "UNet2DConditionModel")
    change_config(folder, "unet/config.json", auto_map={"AutoModel": "evil.Evil"})


def code_that_a_tokenizer_maps(folder: Path, canary: Path) -> None:
    write_code(folder / "tokenizer" / "evil.py", canary, "ModelMixin")
    change_config(folder, "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    change_index(folder, tokenizer=["transformers", "AutoTokenizer"])


def code_of_a_model_that_is_asked_for_by_its_config(folder: Path, canary: Path) -> None:
    code_that_a_config_maps(folder, canary)
    change_index(folder, text_encoder=["transformers", "AutoModel"], unet=["diffusers", "AutoModel"])


def an_adapter_that_is_a_pickle(folder: Path, canary: Path) -> None:
    adapter = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(folder / "text_encoder"),
        "target_modules": ["q_proj"],
    }
    (folder / "text_encoder" / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "text_encoder" / "adapter_model.bin").write_bytes(pickle.dumps(Trap(canary)))


def an_adapter_that_names_another_folder(folder: Path, canary: Path) -> None:
    """transformers would load the model there; its config, too, is read from there."""
    outside = folder.parent / "outside"
    shutil.copytree(folder / "text_encoder", outside)
    (outside / "model.safetensors").unlink()
    (outside / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(canary)))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(outside), "target_modules": ["q_proj"]}
    (folder / "text_encoder" / "adapter_config.json").write_text(json.dumps(adapter))


RUNS_NOTHING = [
    code_of_a_part,
    code_of_the_scheduler,
    code_of_the_text_encoder,
    code_of_the_pipeline,
    code_of_a_pipeline_by_another_name,
    code_of_an_additional_part,
    code_by_a_dotted_name,
    code_beside_the_index_of_the_working_directory,
    code_under_the_name_of_our_scheduler,
    code_of_an_installed_package,
    code_that_a_config_maps,
    code_that_a_tokenizer_maps,
    code_of_a_model_that_is_asked_for_by_its_config,
    an_adapter_that_is_a_pickle,
    an_adapter_that_names_another_folder,
]


@pytest.mark.parametrize(
    "plant",
    slow_but(
        [code_of_a_part, code_under_the_name_of_our_scheduler, code_that_a_config_maps, an_adapter_that_is_a_pickle],
        RUNS_NOTHING,
    ),
)
def test_code_in_a_folder_leaves_no_trace(folder, tmp_path, plant, capsys, monkeypatch):
    """Through our class, through diffusers' loader, and through the commands; what loads is what there was without."""
    canary = tmp_path / "canary"
    plant(folder, canary)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend("")
    imported = set(sys.modules)
    loads = [
        lambda: RectifiedFlowPipeline.from_pretrained(folder),
        lambda: RectifiedFlowImg2ImgPipeline.from_pretrained(folder),
        lambda: load_pipeline(str(folder), "cpu", "float32"),
        lambda: swap_components(make_tiny_pipeline("flow"), folder),
    ]
    for load in loads:
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            load()
        assert not canary.exists()
    assert "wsgiref.simple_server" not in sys.modules.keys() - imported
    capsys.readouterr()
    code = main(["generate", "--model", str(folder), "a red apple", "-o", str(tmp_path / "a.png")])
    assert not canary.exists()
    message = capsys.readouterr().err
    if "adapter" in plant.__name__:
        assert code == 2
        assert "text_encoder contains an adapter_config.json" in message
        assert message.count("\n") == 1
    elif "maps" not in plant.__name__:
        assert code == 2, message
        assert not (tmp_path / "a.png").exists()


def test_the_library_of_a_part_that_the_caller_has_imported(folder, monkeypatch):
    """A user's own package: it runs because its user imported it, not because a model names it."""
    change_index(folder, unet=["somebodys_models", "TheirUNet"])
    with pytest.raises(ValueError, match=r"unet .*somebodys_models.*import it first"):
        RectifiedFlowPipeline.from_pretrained(folder)
    monkeypatch.setitem(sys.modules, "somebodys_models", types.ModuleType("somebodys_models"))
    refuse_foreign_code(folder)


def test_the_canary_sings(folder, tmp_path):
    """The folders above do run their code where their reader says so: what they try to do is no empty threat."""
    canary = tmp_path / "canary"
    code_of_a_part(folder, canary)
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert canary.exists()


# Headers that lie


def lie(content: bytes, **changes: Any) -> bytes:
    """Change the entry of the first tensor in the header of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")
    header[first] = {**header[first], **changes}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


LIES = {
    "a huge shape": lambda content: lie(content, shape=[2**31, 2**31]),
    "a negative shape": lambda content: lie(content, shape=[-1]),
    "offsets behind the end": lambda content: lie(content, data_offsets=[0, 2**40]),
    "offsets backwards": lambda content: lie(content, data_offsets=[8, 0]),
    "another dtype": lambda content: lie(content, dtype="F64"),
    "an unknown dtype": lambda content: lie(content, dtype="OBJECT"),
    "a huge header": lambda content: struct.pack("<Q", 2**62) + content[8:],
    "a header of 0 bytes": lambda content: struct.pack("<Q", 0) + content[8:],
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + bytes(8),
    "no header": lambda content: b"",
}


@pytest.mark.parametrize("lie", slow_but(["a huge shape", "a huge header", "cut"], LIES))
def test_headers_that_lie(folder, tmp_path, lie):
    """In a model, a delta and a LoRA: by our classes, no other error than these, and nothing is changed."""
    weights, damage = folder / "unet/diffusion_pytorch_model.safetensors", LIES[lie]
    content = damage(weights.read_bytes())
    weights.unlink()
    weights.write_bytes(content)
    with pytest.raises(OSError, match=r"cannot be read: .* or copy the complete folder again"):
        RectifiedFlowPipeline.from_pretrained(folder)
    pipeline: Any = make_tiny_pipeline("flow")
    before = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
    save_file({name: 0.1 * weight for name, weight in before.items()}, tmp_path / "delta.safetensors")
    save_file(Lora(1).kohya(), tmp_path / "lora.safetensors")
    for name in ("delta", "lora"):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        apply_weight_delta(pipeline.unet, tmp_path / "delta.safetensors")
    with pytest.raises(
        ValueError, match="The LoRA cannot be loaded into RectifiedFlowPipeline: Error while deserializing"
    ):
        pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        Styles(pipeline).apply([(tmp_path / "lora.safetensors", 1.0)])
    after = pipeline.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", 7, None, ["x"]])
def test_an_index_of_shards_that_leaves_its_folder(folder, tmp_path, shard):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    secret = folder / "secret.safetensors"
    save_file(load_file(weights), secret)
    weights.unlink()
    names = load_file(secret)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError)) as ours:
        load_weight_delta(folder / "unet")
    assert "\n" not in str(ours.value)
    with pytest.raises((ValueError, OSError)):
        RectifiedFlowPipeline.from_pretrained(folder)
    # Releases of diffusers that join whatever name they find come this far.
    words = "lists the shard" if isinstance(shard, str) else "of another type or size than expected"
    with pytest.raises(ValueError, match=words), remedies(folder):
        pass


# LoRAs that are not meant for this model, or for none


def peft_lora(rank: int = 2, **changes: Any) -> dict[str, torch.Tensor]:
    weights = {
        f"unet.{LAYER}.lora_A.weight": torch.full((rank, 16), 0.1),
        f"unet.{LAYER}.lora_B.weight": torch.full((16, rank), 0.1),
    }
    return {**weights, **changes}


A, B = f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"
KOHYA = "lora_unet_" + LAYER.replace(".", "_")
HOSTILE_LORAS = {
    "nothing": ({}, "got no weights"),
    "NaN": ({**peft_lora(), A: torch.full((2, 16), torch.nan)}, "holds NaN or infinity in .*lora_A"),
    "infinity": ({**peft_lora(), B: torch.full((16, 2), torch.inf)}, "holds NaN or infinity in .*lora_B"),
    "integers": ({**peft_lora(), A: torch.ones(2, 16, dtype=torch.int64)}, "holds torch.int64"),
    "a huge rank": (peft_lora(10**6), f"expected a matrix of rank 1 to {MAX_RANK}"),
    "rank 0": (peft_lora(0), "expected a matrix of rank 1"),
    "a vector": ({**peft_lora(), A: torch.ones(16)}, "expected a matrix"),
    "a number": ({**peft_lora(), A: torch.tensor(1.0)}, "expected a matrix"),
    "ranks that differ": (
        {**peft_lora(), A: torch.ones(3, 16)},
        "lora_B.* has the shape .16, 2., but its layer's weight has",
    ),
    "one factor": ({A: torch.ones(2, 16)}, "has no lora_up, expected both factors"),
    "other inputs": ({**peft_lora(), A: torch.ones(2, 7)}, "its layer's weight has"),
    "other outputs": ({**peft_lora(), B: torch.ones(7, 2)}, "its layer's weight has"),
    "one foreign layer": (
        {**peft_lora(), **{name.replace("attn1", "attn9"): weight for name, weight in peft_lora().items()}},
        "for a layer '.*attn9.*' of the unet",
    ),
    "a foreign layer of the text encoder": (
        {
            **peft_lora(),
            "text_encoder.x.lora_A.weight": torch.ones(2, 16),
            "text_encoder.x.lora_B.weight": torch.ones(16, 2),
        },
        "for a layer 'x' of the text_encoder",
    ),
    "a text encoder of another size": (
        {
            **peft_lora(),
            f"text_encoder.{TEXT_LAYER}.lora_A.weight": torch.ones(2, 768),
            f"text_encoder.{TEXT_LAYER}.lora_B.weight": torch.ones(768, 2),
        },
        "its layer's weight has",
    ),
    "foreign alone": ({f"foo.{name}": weight for name, weight in peft_lora().items()}, "none of its layers"),
    "no LoRA": ({"weight": torch.ones(2)}, "Invalid LoRA|expected"),
    "kohya, half a pair": ({f"{KOHYA}.lora_down.weight": torch.ones(2, 16)}, "lora_up"),
    "kohya, NaN alpha": (
        {
            f"{KOHYA}.lora_down.weight": torch.ones(2, 16),
            f"{KOHYA}.lora_up.weight": torch.ones(16, 2),
            f"{KOHYA}.alpha": torch.tensor(torch.nan),
        },
        "must be finite",
    ),
    "kohya, alpha of three": (
        {
            f"{KOHYA}.lora_down.weight": torch.ones(2, 16),
            f"{KOHYA}.lora_up.weight": torch.ones(16, 2),
            f"{KOHYA}.alpha": torch.ones(3),
        },
        "3 elements",
    ),
    "kohya, a huge rank": (
        {f"{KOHYA}.lora_down.weight": torch.ones(10**5, 16), f"{KOHYA}.lora_up.weight": torch.ones(16, 10**5)},
        "expected a matrix of rank 1",
    ),
}


@pytest.fixture(scope="module")
def worn():
    """A pipeline that wears a LoRA, its latents, and the demo's styles on another."""
    pipeline: Any = make_tiny_pipeline("flow")
    pipeline.load_lora_weights(peft_lora(), adapter_name="mine")
    return pipeline, sample(pipeline), Styles(make_tiny_pipeline("flow"))


@pytest.mark.parametrize(("weights", "message"), HOSTILE_LORAS.values(), ids=HOSTILE_LORAS.keys())
def test_a_hostile_lora_is_refused_and_changes_nothing(tmp_path, worn, weights, message):
    file = tmp_path / "lora.safetensors"
    save_file({name: weight.clone() for name, weight in weights.items()}, file)
    pipeline, before, styles = worn
    with pytest.raises(
        ValueError, match=f"The LoRA cannot be loaded into RectifiedFlowPipeline: .*({message})"
    ) as error:
        pipeline.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="theirs")
    assert "\n" not in str(error.value)
    assert {name for names in pipeline.get_list_adapters().values() for name in names} == {"mine"}
    assert torch.equal(sample(pipeline), before)
    with pytest.raises(ValueError, match=r"lora\.safetensors cannot be applied to this model"):
        styles.apply([(file, 1.0)])


@pytest.mark.parametrize("kind", ["NaN", "infinity", "integers", "a huge rank", "a vector", "foreign alone"])
def test_the_demo_looks_itself_at_a_lora_for_a_stock_pipeline(tmp_path, kind):
    weights, _ = HOSTILE_LORAS[kind]
    save_file(weights, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora\.safetensors cannot be applied to this model"):
        Styles(make_tiny_pipeline("diffusion")).apply([(tmp_path / "lora.safetensors", 1.0)])


def test_after_a_hostile_lora_the_pipeline_can_be_saved(tmp_path):
    pipeline: Any = make_tiny_pipeline("flow")
    with pytest.raises(ValueError, match="cannot be loaded into"):
        pipeline.load_lora_weights({**peft_lora(), "text_encoder.x.lora_A.weight": torch.ones(2, 16)})
    pipeline.save_pretrained(tmp_path)
    pipeline.load_lora_weights(peft_lora())
    assert pipeline.get_active_adapters()


@pytest.mark.parametrize(
    "settings",
    [{"unet.r": 10**9}, {"unet.lora_alpha": 1e400}, {"unet.rank_pattern": {LAYER: 10**9}}, {"unet.r": 10**400}],
    ids=str,
)
def test_a_lora_whose_settings_lie(tmp_path, settings):
    text = json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": [LAYER], **settings})
    save_file(peft_lora(), tmp_path / "lora.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=f"must be finite, and a rank from 1 to {MAX_RANK}"):
        make_tiny_pipeline("flow").load_lora_weights(tmp_path, weight_name="lora.safetensors")


def test_a_lora_for_stable_diffusion_xl_with_a_foreign_second_text_encoder():
    pipeline = make_tiny_xl_pipeline()
    assert type(pipeline) is RectifiedFlowXLPipeline
    foreign = {f"text_encoder_2.{TEXT_LAYER}.lora_A.weight": torch.ones(2, 1280)}
    foreign |= {f"text_encoder_2.{TEXT_LAYER}.lora_B.weight": torch.ones(1280, 2)}
    with pytest.raises(ValueError, match=r"text_encoder_2.*its layer's weight has"):
        pipeline.load_lora_weights({**peft_lora(), **foreign})
    assert not pipeline.get_list_adapters()


# Configs of wrong types

VALUES = [None, -1, "x", ["x"], {"a": 1}, 1e308]


@pytest.mark.parametrize("value", slow_but([None, "x", 1e308], VALUES), ids=str)
@pytest.mark.parametrize("key", ["", "unet", "scheduler", "_class_name", "text_encoder"])
def test_a_model_index_of_wrong_types(folder, key, value):
    refuse_or_load(folder, "model_index.json", key, value)


@pytest.mark.parametrize("value", slow_but([None, "x", 1e308], VALUES), ids=str)
@pytest.mark.parametrize("key", ["", "num_train_timesteps", "shift", "velocity_direction", "prediction_type"])
def test_a_scheduler_config_of_wrong_types(folder, key, value):
    refuse_or_load(folder, "scheduler/scheduler_config.json", key, value)


@pytest.mark.parametrize("value", slow_but([None, "x"], VALUES[:-2]), ids=str)
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("unet", "block_out_channels"),
        ("unet", "down_block_types"),
        ("unet", "cross_attention_dim"),
        ("vae", "latent_channels"),
        ("text_encoder", "hidden_size"),
        ("text_encoder", ""),
        ("unet", ""),
    ],
)
def test_the_config_of_a_model_of_wrong_types(folder, name, key, value):
    refuse_or_load(folder, f"{name}/config.json", key, value)


def refuse_or_load(folder: Path, name: str, key: str, value: Any) -> None:
    """Put a value into a config; loading ends in a usable pipeline or in an error of one of two kinds."""
    file = folder / name
    config = {**json.loads(file.read_text()), key: value} if key else value
    file.write_text(json.dumps(config))
    with contextlib.suppress(ValueError, OSError):
        assert isinstance(RectifiedFlowPipeline.from_pretrained(folder).scheduler, RectifiedFlowEulerScheduler)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"7", b"null", b'"text"'])
@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json"])
def test_configs_that_are_no_json_objects(folder, capsys, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)) as error:
        RectifiedFlowPipeline.from_pretrained(folder)
    assert str(folder / name) in str(error.value)
    capsys.readouterr()  # a bar
    assert main(["generate", "--model", str(folder), "a red apple", "-o", str(folder / "a.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
