"""The code of the README and of every page runs, and the pages are complete: nothing public is missing from them."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

import rectified_diffusers
from rectified_diffusers import cli
from tests.documentation import ROOT, blocks_of, examples, public_names, run_examples, run_page
from tests.hub.client import Client
from tests.hub.conftest import INSTAFLOW, TWO_FLOW, save_published
from tests.hub.server import Repository, read_files, the_hub
from tests.tiny import (
    make_adapter_unet,
    make_tiny_adapter,
    make_tiny_controlnet,
    make_tiny_pipeline,
    make_tiny_xl_pipeline,
)
from tests.tiny_inputs import write_pictures

DOCS = ROOT / "docs"
MAX_EXAMPLE_LINES = 5
EXTRAS = {"export_onnx": "onnx"}  # what an example needs beyond the dependencies of every installation
SHORT = ("README.md",)  # the page whose blocks run in the fast tests; the others are slow together
NEEDED = {"docs/own_images.md": "datasets"}  # packages of an extra that the code of a page imports
SLOW = pytest.mark.slow
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PARSED = [ROOT / "examples" / "emoji" / "README.md"]  # hours of work, and data from elsewhere


@pytest.fixture(scope="session")
def reader(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """A process that is online at a Hub where the models of the pages are, all of them tiny."""
    make = tmp_path_factory.mktemp("made")
    with torch.random.fork_rng(devices=[]):
        save_published(make / "instaflow", 0)
        save_published(make / "two-flow", 1)
    for seed, name in enumerate(("base", "fine-tune")):
        make_tiny_pipeline("diffusion", seed).save_pretrained(make / name)
    make_tiny_controlnet(make_tiny_pipeline("flow").unet).save_pretrained(make / "canny")
    make_tiny_controlnet(make_tiny_xl_pipeline().unet).save_pretrained(make / "xl-canny")
    make_tiny_adapter().save_pretrained(make / "adapter")
    for name in ("sd3", "xl"):
        make_tiny_pipeline(name).save_pretrained(make / name)
    folders = {
        INSTAFLOW: "instaflow",
        TWO_FLOW: "two-flow",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "base",
        "Lykon/dreamshaper-7": "fine-tune",
        "lllyasviel/control_v11p_sd15_canny": "canny",
        "diffusers/controlnet-canny-sdxl-1.0": "xl-canny",
        "TencentARC/t2iadapter_canny_sd15v2": "adapter",
        "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
        "stabilityai/stable-diffusion-xl-base-1.0": "xl",
    }
    hub = the_hub()
    for repo_id, folder in folders.items():
        if repo_id not in hub.repositories:
            hub.repositories[repo_id] = Repository()
            hub.repositories[repo_id].commit(read_files(make / folder))
    return client


LOHA = {"a": (16, 2), "b": (2, 16)}  # of a layer of the tiny U-Net with 16 inputs and outputs


@pytest.fixture
def readers_folder(tmp_path: Path) -> Path:
    """What a reader has by the pages: examples, prompts, a teacher, pictures with and without captions, LoRA files."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "prompts.txt").write_text("a red apple\nthe sea\n")
    make_tiny_pipeline("diffusion").save_pretrained(tmp_path / "TEACHER")
    for name in ("photo.png", "edges.png", "mask.png"):
        Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / name)
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((32, 32), 50).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red apple"}\n')
    for seed, name in enumerate(("style", "detail")):
        pipeline: Any = make_tiny_pipeline("flow", seed)
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
        StableDiffusionPipeline.save_lora_weights(tmp_path, layers, weight_name=f"{name}.safetensors")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.hada"
    factors = {f"{key}_w{i}_{side}": torch.randn(shape) for i in (1, 2) for side, shape in LOHA.items()}
    save_file(factors, tmp_path / "loha.safetensors")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    return tmp_path


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if name_of(page) in SHORT else SLOW) for page in PAGES if blocks_of(page)],
    ids=name_of,
)
def test_the_blocks_of_a_page_run_one_after_the_other(page, reader, readers_folder):
    if (needed := NEEDED.get(name_of(page))) is not None:
        pytest.importorskip(needed)
    assert reader.call(run_page, name_of(page), str(readers_folder)) == len(blocks_of(page))


def test_every_public_class_has_a_short_example():
    classes = {name for name in public_names() if isinstance(getattr(rectified_diffusers, name), type)}
    assert classes - examples().keys() == set()
    assert {name: code for name, code in examples().items() if code.count("\n") > MAX_EXAMPLE_LINES} == {}


@pytest.mark.slow
def test_the_examples_of_docstrings_run(reader, readers_folder):
    write_pictures(readers_folder / "pictures")
    make_tiny_xl_pipeline().save_pretrained(readers_folder / "XL-FLOW")
    flow = make_tiny_pipeline("flow")
    flow.register_modules(unet=make_adapter_unet())
    flow.save_pretrained(readers_folder / "2-rectified-flow")
    left_out = {name for name, extra in EXTRAS.items() if importlib.util.find_spec(extra) is None}
    assert reader.call(run_examples, str(readers_folder), left_out) == {}


@pytest.mark.parametrize("page", PARSED, ids=name_of)
def test_commands_parse(page):
    for block in blocks_of(page):
        for words in block.commands:
            if words[0] == "rectified-diffusers":
                cli.build_parser().parse_args(words[1:])


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in PAGES[1:] if f": {page.relative_to(DOCS).as_posix()}\n" not in navigation] == []


@pytest.fixture
def made_pages(monkeypatch) -> Any:
    """The hooks of the site, if the extra `docs` is installed."""
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(DOCS / "scripts"))
    return importlib.import_module("made_pages")


def test_the_reference_has_every_public_name_command_and_error(made_pages):
    names = made_pages.names()
    elsewhere = {"ModelMixin", "SchedulerMixin", "__version__", "bundled_checkpoint"}
    missing = {name for name in set(rectified_diffusers.__all__) - elsewhere if f"[`{name}`]" not in names}
    assert missing == set()
    commands = made_pages.commands()
    assert "## generate\n" in commands
    assert "### delta make\n" in commands
    assert "`--learning-rate NUMBER`" in commands
    errors = made_pages.errors()
    assert "## rectified_diffusers.flow.ode" in errors
    assert "| ValueError | Expected steps >= 1, got …. |" in errors


def test_links_to_files_of_the_repository_become_pages(made_pages):
    origin = DOCS / "features.md"
    text = made_pages.rewrite_links(
        "[a](../examples/edit.py) [b](papers.md#x) [c](https://a.b/c.md)", origin, "features.md"
    )
    assert text == "[a](source/examples/edit.py.md) [b](papers.md#x) [c](https://a.b/c.md)"
    assert made_pages.source_text(ROOT / "examples" / "edit.py").startswith("# examples/edit.py\n\n````python\n")
