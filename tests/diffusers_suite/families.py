"""Test the adapter, and training with it, on the tiny pipelines of diffusers' own tests; write the table of families.

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers
    python -m tests.diffusers_suite.families --diffusers diffusers --output docs/families.md

The pipelines are built by `get_dummy_components` of the checkout's tests; what these load from the Hub is made here.
Weights that diffusers initializes with zero get random values, so that every input has an effect. The installed
diffusers is tested. Each family has a process of its own; with `--results` a run that was stopped goes on. The run
fails if fewer flows pass than `--at-least` says.
"""

import argparse
import copy
import importlib
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from rectified_diffusers.checks import UnsupportedPipelineError
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.self_test import self_test
from tests.diffusers_suite.chain import run_chain
from tests.models_any.text import make_chat_tokenizer
from tests.tiny import make_t5_encoder, make_t5_tokenizer, make_tokenizer

FAMILIES = [
    "flux.test_pipeline_flux",
    "bria.test_pipeline_bria",
    "bria_fibo.test_pipeline_bria_fibo",
    "chroma.test_pipeline_chroma",
    "ovis_image.test_ovis_image",
    "flux2.test_pipeline_flux2",
    "flux2.test_pipeline_flux2_klein",
    "stable_diffusion_3.test_pipeline_stable_diffusion_3",
    "aura_flow.test_pipeline_aura_flow",
    "prx.test_pipeline_prx",
    "sana.test_sana",
    "nucleusmoe_image.test_nucleusmoe_image",
    "hidream_image.test_pipeline_hidream",
    "hunyuan_image_21.test_hunyuanimage",
    "kandinsky5.test_kandinsky5_t2i",
    "qwenimage.test_qwenimage",
    "lumina.test_lumina_nextdit",
    "lumina2.test_pipeline_lumina2",
    "z_image.test_z_image",
    "krea2.test_krea2",
    "cogview4.test_cogview4",
    "wan.test_wan",
    "ltx.test_ltx",
    "hunyuan_video.test_hunyuan_video",
    "mochi.test_mochi",
    "kandinsky5.test_kandinsky5",
    "pixart_alpha.test_pixart",
    "pixart_sigma.test_pixart",
    "hunyuandit.test_hunyuan_dit",
    "cogview3.test_cogview3plus",
    "latte.test_latte",
    "sana_video.test_sana_video",
    "stable_diffusion_xl.test_stable_diffusion_xl",
    "cosmos.test_cosmos2_text2image",
    "omnigen.test_pipeline_omnigen",
    "dreamlite.test_pipeline_dreamlite",
    "prx.test_pipeline_prx_pixel",
    "sana.test_sana_sprint",
    "wan.test_wan_22",
    "motif_video.test_motif_video",
    "glm_image.test_glm_image",
]
SIZES = ("height", "width", "num_frames", "video_length", "text_encoder_out_layers", "use_resolution_binning")
INTRODUCTION = """# Families of pipelines

Which pipelines can be teacher and student through the adapter for any pipeline. Each row is the adapter's self-test on
a tiny random model of diffusers' own tests.

- Euler loop: relative difference between an Euler loop on the adapter's velocity and the stock pipeline.
- prediction: relative difference between the predictions of the network.
- few-step LoRA: the result of four triplets, two steps of reflow, and distillation to a LoRA. By how much the LoRA
  changes the one-step image (mean, in levels of 255); by how much at most the image of the stock pipeline differs from
  that of the trainer's student (of the finished folder, and of the base with the LoRA file); and what loads the LoRA.
- guidance: how the stock pipeline guides, or why it is refused.

Noise and decoding are equal bit for bit in every row that passes.
"""
HEAD = "| pipeline | network | kind | Euler loop | prediction | few-step LoRA | guidance |\n" + "|---" * 7 + "|\n"


def substitute(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
    """Take the place of `from_pretrained`: return a tiny object of the kind that a test asks the Hub for."""
    name, source = cls.__name__, str(source)
    made = {"tiny-random-clip": make_tokenizer, "T5EncoderModel": lambda: make_t5_encoder(32)}
    if "Config" in name:
        return make_t5_encoder(32).config
    if "T5EncoderModel" in name:
        return made["T5EncoderModel"]()
    if "tiny-random-clip" in source:
        return made["tiny-random-clip"]()
    if "t5" in source:
        return make_t5_tokenizer()
    small = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    if name == "LlamaForCausalLM":
        llama = transformers.LlamaConfig(**{**small, "hidden_size": 16}, num_attention_heads=4)
        return transformers.LlamaForCausalLM(llama).eval()
    if name == "BertModel":
        return transformers.BertModel(transformers.BertConfig(**small, num_attention_heads=4)).eval()
    tokenizer: Any = copy.deepcopy(make_chat_tokenizer())
    tokenizer.tokenizer = tokenizer  # of a processor
    if "glm" in source or "gemma" in source:
        start = [("<bos>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=start)
    return tokenizer


def prepare(checkout: Path) -> None:
    """Make the checkout's `tests` importable, and keep them from the Hub."""
    for make in (make_tokenizer, make_t5_tokenizer, make_chat_tokenizer):
        make()  # by the real from_pretrained; kept
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    for name in ("parameterized", "torchsde", "requests_mock"):
        stub: Any = types.ModuleType(name)
        stub.parameterized = types.SimpleNamespace(expand=lambda *args, **kwargs: lambda test: test)
        sys.modules.setdefault(name, stub)
    loaders = ("AutoTokenizer", "PreTrainedTokenizerBase", "AutoConfig", "AutoProcessor", "ProcessorMixin")
    for name in (*loaders, "PreTrainedModel"):
        keep_from_hub(getattr(transformers, name))


def keep_from_hub(kind: Any) -> None:
    """Replace `from_pretrained` of a class; folders are still loaded."""
    original = kind.from_pretrained.__func__

    def load(cls: Any, source: Any, *args: Any, **options: Any) -> Any:
        return (original if Path(str(source)).is_dir() else substitute)(cls, source, *args, **options)

    kind.from_pretrained = classmethod(load)


def fill(pipeline: Any) -> None:
    """Give values to weights that are zero or not initialized, and enough embeddings to text encoders."""
    generator = torch.Generator().manual_seed(3)
    for part in pipeline.components.values():
        if not isinstance(part, torch.nn.Module):
            continue
        part.eval()
        for weight in [*part.parameters(), *part.buffers()]:
            blank = weight.is_floating_point() and not (bool(weight.isfinite().all()) and bool(weight.any()))
            if blank and (isinstance(part, diffusers.ModelMixin) or not bool(weight.isfinite().all())):
                weight.data.normal_(std=0.05, generator=generator)
        if isinstance(part, transformers.PreTrainedModel) and "CLIP" not in type(part).__name__:
            embeddings: Any = part.get_input_embeddings()
            if embeddings is not None and embeddings.num_embeddings < 300:
                part.resize_token_embeddings(400)


def build(module: str) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline of a test module of diffusers, and the arguments of its call that make it small."""
    tests = importlib.import_module(f"tests.pipelines.{module}")
    case = next(
        cls
        for cls in vars(tests).values()
        if isinstance(cls, type) and hasattr(cls, "get_dummy_components") and cls.__module__ == tests.__name__
    )
    test: Any = object.__new__(case)
    pipeline = case.pipeline_class(**test.get_dummy_components())
    try:
        inputs = test.get_dummy_inputs("cpu")
    except TypeError:
        inputs = test.get_dummy_inputs()
    fill(pipeline)
    return pipeline, {name: value for name, value in inputs.items() if name in SIZES}


def examine(module: str) -> dict[str, Any]:
    """Return what the table says about a family: by column, and whether it is a flow and passes its self-test."""
    found: dict[str, Any] = {"pipeline": module, "network": "", "kind": "refused", "flow": False}
    try:
        pipeline, options = build(module)
        found["pipeline"] = type(pipeline).__name__
        denoiser = PipelineDenoiser(pipeline, options=options)
        result = self_test(denoiser)
        found |= {"network": type(denoiser.network).__name__, "flow": result.euler is not None}
        found["kind"] = "flow" if found["flow"] else "diffusion"
        found["euler"] = "" if result.euler is None else f"{result.euler:.0e}"
        found |= {"prediction": f"{result.prediction:.0e}", "guidance": denoiser.guidance_found.kind}
    except UnsupportedPipelineError as error:
        return {**found, "guidance": " ".join(str(error).split())[:160]}
    except (ImportError, AttributeError, StopIteration) as error:  # not in this version of diffusers
        return {**found, "kind": "not built", "guidance": " ".join(str(error).split())[:160]}
    if found["flow"]:
        found["lora"] = train(pipeline, options)
    return found


def train(pipeline: Any, options: dict[str, Any]) -> str:
    """Return what the table says about a few-step LoRA of a pipeline."""
    try:
        chain = run_chain(pipeline, options)
    except Exception as error:  # noqa: BLE001 (whatever the reason is, the table has it)
        return f"no: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return f"changes {chain.change:.0f}, off by {max(chain.folder, chain.lora):.1g}, {chain.loader}"


def run_apart(module: str, checkout: Path, results: Path, seconds: float) -> dict[str, Any]:
    """Examine a family in a process of its own; a result that is there is not made again."""
    file = results / f"{module}.json"
    if not file.exists():
        command = [sys.executable, "-m", "tests.diffusers_suite.families", "--diffusers", str(checkout)]
        try:
            subprocess.run([*command, "--one", module, "--results", str(results)], timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            print(f"{module}: more than {seconds:.0f} seconds", flush=True)
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    return {"pipeline": module, "network": "", "kind": "not run", "flow": False}


def line_of(found: dict[str, Any]) -> str:
    names = ("pipeline", "network", "kind", "euler", "prediction", "lora", "guidance")
    return f"| {' | '.join(str(found.get(name, '')) for name in names)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--diffusers", type=Path, required=True, help="root of a source checkout of diffusers")
    parser.add_argument("--families", nargs="+", default=FAMILIES, help="test modules under tests/pipelines")
    parser.add_argument("--at-least", type=int, default=22, help="flows that must pass (default: 22)")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--results", type=Path, help="folder of finished families, which are not run again")
    parser.add_argument("--seconds", type=float, default=1800, help="for each family (default: 1800)")
    parser.add_argument("--one", help="examine this family only, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        prepare(arguments.diffusers)
        found = json.dumps(examine(arguments.one))
        (arguments.results / f"{arguments.one}.json").write_text(found, encoding="utf-8")
        return 0
    results = arguments.results or Path(tempfile.mkdtemp())
    results.mkdir(parents=True, exist_ok=True)
    found = []
    for module in arguments.families:
        found.append(run_apart(module, arguments.diffusers, results, arguments.seconds))
        print(line_of(found[-1]), flush=True)
    passed = sum(one["flow"] for one in found)
    trained = sum(one.get("lora", "").startswith("changes") for one in found)
    count = f"{passed} flows pass the self-test; {trained} pass as students too"
    versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    text = (
        f"{INTRODUCTION}\n{HEAD}" + "\n".join(map(line_of, found)) + f"\n\n{count}. Made by "
        f"`python -m tests.diffusers_suite.families --diffusers CHECKOUT --output docs/families.md` with {versions}.\n"
    )
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    print(count)
    return 0 if min(passed, trained) >= arguments.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
