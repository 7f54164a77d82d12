"""Measure the latency of an image, from prompt to bytes, in four variants, and compare it with the hardware limit.

    python benchmarks/latency.py                                     # this CPU, Stable Diffusion 1.5's shapes
    python benchmarks/latency.py --device cuda --rounds 20 --batches 1 8

The models have the exact shapes of Stable Diffusion 1.5 (or InstaFlow-1.7B, or SDXL) and random weights; speed does
not depend on the weights. The variants:

- eager: one step in float32 with the full VAE, as in the community's InstaFlow pipeline. On CUDA there is also
  `eager-half`, the same in float16.
- fast: `optimize(pipeline)`, with the full VAE.
- tiny: `optimize(pipeline, decoder=AutoencoderTiny)`.
- openvino, openvino-tiny: U-Net and decoder of `fast` and of `tiny`, by OpenVINO in bfloat16, for comparison (only if
  named; needs `pip install openvino`). Each model is converted for its first shapes.
- sd: Stable Diffusion, 25 steps of DPM-Solver++ with guidance 7.5, float32. On a CPU, runs of --sd-steps steps and of
  one step more are timed, and the time of 25 steps is extrapolated from both.

Each variant runs in a separate process, because memory settings and compiled code belong to a process. Only one
variant runs at a time; the variants take turns (sd runs after the others), and the medians are reported. There are two
exceptions on a GPU, to save time: the processes start together, and the first images, during which compiled variants
compile, are generated concurrently. Every image has a different prompt, so that no cached embedding is timed; the
cache would save the stage "text". The results so far are written after each turn. A variant that fails does not affect
the others.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from machine import median, peak_memory, provenance, rates, seconds, write_results
from models import MAX_TOKENS, MODELS, make, make_pipeline, unet_of, vae_config
from rectified_diffusers import optimize

SD_STEPS, SD_GUIDANCE = 25, 7.5
WAYS = ("eager", "eager-half", "fast", "tiny", "openvino", "openvino-tiny", "sd")


def build(args: argparse.Namespace, way: str) -> Any:
    """Build the pipeline of a variant on its device."""
    half = torch.float16 if args.device.startswith("cuda") else torch.bfloat16
    eager = torch.float16 if way == "eager-half" else torch.float32
    dtype = eager if way in ("eager", "eager-half", "sd") else half
    pipeline = make_pipeline(args.model, dtype, args.device, diffusion=way == "sd", small=args.small)
    tiny = make(AutoencoderTiny, dtype, args.device) if way.endswith("tiny") else None
    if way in ("fast", "tiny"):
        optimize(pipeline, decoder=tiny, compile="auto" if args.compile is None else args.compile)
    if way.startswith("openvino"):
        pipeline.to(torch.float32)
        pipeline.register_modules(vae=pipeline.vae if tiny is None else tiny.float())
        use_openvino(pipeline, args.threads)
    return pipeline


class ByOpenVino(nn.Module):
    """A model that OpenVINO computes in bfloat16 on a CPU, converted at the first call for these shapes."""

    def __init__(self, model: Any, threads: int, **keywords: Any) -> None:
        super().__init__()
        self.model, self.stock, self.keywords, self.threads = model, model.forward, keywords, threads
        self.compiled: Any = None

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Call the stock model; this is what the converter traces."""
        result = self.stock(*inputs, **self.keywords)
        return result[0] if isinstance(result, tuple) else result

    def compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        import openvino  # pyright: ignore[reportMissingImports]

        if self.compiled is None:
            model = openvino.convert_model(self, example_input=inputs)
            model.reshape({i: list(each.shape) for i, each in enumerate(inputs)})
            hints = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
            hints["INFERENCE_NUM_THREADS"] = self.threads
            self.compiled = openvino.Core().compile_model(model, "CPU", hints)
            for parameter in self.model.parameters():  # OpenVINO has its own copy
                parameter.data = parameter.data.new_empty(0)
        return torch.from_numpy(self.compiled([each.numpy() for each in inputs])[0].copy())


def use_openvino(pipeline: Any, threads: int) -> None:
    """Compute the U-Net and the decoder of a pipeline by OpenVINO."""
    unet = ByOpenVino(pipeline.unet, threads, return_dict=False)
    decoder = ByOpenVino(pipeline.vae.decoder, threads)

    def predict(latents: torch.Tensor, time: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> Any:
        return (unet.compute(latents, time.float().reshape(1), encoder_hidden_states),)

    pipeline.unet.forward = predict
    pipeline.vae.decoder.forward = lambda latents, *_: decoder.compute(latents)


class Way:
    """One variant in its process: times complete images and their separate stages."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.args, self.name, self.count = args, name, 0
        self.pipeline = build(args, name)

    def prompts(self, batch: int) -> list[str]:
        """Return prompts that have not been used before."""
        self.count += batch
        return [f"a red apple, number {self.count + i}" for i in range(batch)]

    def draw(self, batch: int, steps: int) -> None:
        generator = torch.Generator(self.args.device).manual_seed(0)  # on a GPU the noise comes from the GPU
        guidance = SD_GUIDANCE if self.name == "sd" else 1.0
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator}
        size = {"height": self.args.size, "width": self.args.size}
        pictures = self.pipeline(self.prompts(batch), **options, **size).images
        if len(pictures) != batch or pictures[0].size != (self.args.size, self.args.size):
            raise RuntimeError(f"expected {batch} pictures of {self.args.size} pixels, got {pictures}")

    def whole(self, batch: int) -> float:
        """Return the seconds of a call, from prompts to images; 25 steps are extrapolated where they take minutes."""
        time = lambda steps: seconds(lambda: self.draw(batch, steps), self.args.device)  # noqa: E731
        if self.name != "sd":
            return time(1)
        few = self.args.sd_steps
        if few >= SD_STEPS:
            return time(SD_STEPS)
        first, second = time(few), time(few + 1)
        return first + (SD_STEPS - few) * (second - first)

    @torch.no_grad()
    def stages(self, batch: int) -> dict[str, float]:
        """Return the seconds of the stages, each called separately."""
        pipe, device, found = self.pipeline, self.args.device, {}
        prompts = self.prompts(batch)
        found["text"] = seconds(lambda: pipe.encode_prompt(prompts, device=device, **self.encoding()), device)
        encoded = pipe.encode_prompt(prompts, device=device, **self.encoding())
        found["text again"] = seconds(lambda: pipe.encode_prompt(prompts, device=device, **self.encoding()), device)
        side = self.args.size // 8
        latents = torch.randn(batch, 4, side, side, device=device, dtype=pipe.unet.dtype)
        added: dict[str, Any] | None = None
        if self.args.model == "sdxl":
            ids = torch.zeros(batch, 6, device=device, dtype=latents.dtype)
            added = {"text_embeds": encoded[2], "time_ids": ids}
        # With the keywords of the pipelines' own calls: any others would be compiled for once more.
        asked = {"encoder_hidden_states": encoded[0], "timestep_cond": None, "cross_attention_kwargs": None}
        asked |= {"added_cond_kwargs": added, "return_dict": False}
        t = torch.tensor(1000.0, device=device)
        found["U-Net"] = seconds(lambda: pipe.unet(latents, t, **asked), device)
        found["decoder"] = seconds(lambda: pipe.vae.decode(latents), device)
        images = pipe.vae.decode(latents).sample
        found["bytes"] = seconds(lambda: pipe.image_processor.postprocess(images), device)
        return found

    def encoding(self) -> dict[str, Any]:
        return {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}


def work(args: argparse.Namespace, name: str, pipe: Any) -> None:
    """Answer the parent's requests until it closes the pipe; send an error as the last answer."""
    torch.set_num_threads(args.threads)
    try:
        way = Way(args, name)
        pipe.send("ready")
        asked = {"whole": way.whole, "stages": way.stages, "memory": lambda _: peak_memory(args.device)}
        for question, batch in iter(pipe.recv, None):
            pipe.send(asked[question](batch))
    except BaseException as error:
        pipe.send({"error": f"{type(error).__name__}: {str(error)[:1000]}"})
        raise


class Failed(RuntimeError):
    """The process of a variant ended."""


class Ways:
    """Several variants, each in its process; a variant that fails is skipped from then on."""

    def __init__(self, args: argparse.Namespace, names: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.ends, self.processes, self.errors = {}, [], {}
        for name in names:
            self.ends[name], theirs = context.Pipe()
            self.processes.append(context.Process(target=work, args=(args, name, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()
        for name in names:
            self.guarded(name, lambda name=name: self.receive(name))

    def guarded(self, name: str, call: Callable[[], Any]) -> Any:
        """Return the result of a call, or None if the variant has failed."""
        if name in self.errors:
            return None
        try:
            return call()
        except Failed as error:
            self.errors[name] = str(error)
            print(f"{name}: {error}", flush=True)
            return None

    def receive(self, name: str) -> Any:
        try:
            answer = self.ends[name].recv()
        except EOFError:
            raise Failed("its process ended without a word") from None
        if isinstance(answer, dict) and "error" in answer:
            raise Failed(answer["error"])
        return answer

    def send(self, name: str, question: str, batch: int) -> None:
        try:
            self.ends[name].send((question, batch))
        except OSError:
            raise Failed("its process ended without a word") from None

    def ask(self, name: str, question: str, batch: int) -> Any:
        self.guarded(name, lambda: self.send(name, question, batch))
        return self.guarded(name, lambda: self.receive(name))

    def ask_all(self, question: str, batch: int, side_by_side: bool) -> dict[str, Any]:
        """Send a request to every variant: in turn, or to all before the first has answered."""
        if not side_by_side:
            return {name: self.ask(name, question, batch) for name in self.ends}
        for name in self.ends:
            self.guarded(name, lambda name=name: self.send(name, question, batch))
        return {name: self.guarded(name, lambda name=name: self.receive(name)) for name in self.ends}

    def close(self) -> None:
        for name in self.ends:
            if name not in self.errors:
                self.ends[name].send(None)
        for process in self.processes:
            process.join()


def measure(args: argparse.Namespace, results: dict[str, Any], save: Callable[[], None]) -> None:
    """Time the variants in turns; on a CPU sd runs after the others, because together they need more than 24 GB.

    With --apart, each variant runs separately. `save` is called after each turn.
    """
    results |= {"rates": {}, "sizes": {batch: {} for batch in args.batches}}
    turns = [[name] for name in args.ways]
    if not args.apart:
        last = [name for name in args.ways if name == "sd" and args.device == "cpu"]
        turns = [[name for name in args.ways if name not in last], last]
    for together in filter(None, turns):
        ways = Ways(args, together)
        for dtype in (torch.float32, torch.float16 if args.device.startswith("cuda") else torch.bfloat16):
            key = "float32" if dtype == torch.float32 else "half"
            results["rates"][key] = results["rates"].get(key) or rates(dtype, args.device, small=args.small)
        for batch in args.batches:
            rows = {name: {"first": None, "whole": [], "stages": []} for name in together}
            results["sizes"][batch] |= rows
            take_turns(args, ways, batch, rows, save)
        ways.close()
    for batch, rows in results["sizes"].items():
        for name, row in rows.items():
            if name != "sd" and row["whole"]:
                row["floor"] = floor(args, name, batch, results["rates"])
    save()


def take_turns(
    args: argparse.Namespace, ways: Ways, batch: int, rows: dict[str, Any], save: Callable[[], None]
) -> None:
    """Time some variants in turns, after warm-up turns in which compiled ones compile."""
    for turn in range(-args.warm_up, args.rounds):
        first = turn == -args.warm_up
        side_by_side = turn < 0 and args.device.startswith("cuda")
        answers = {"whole": ways.ask_all("whole", batch, side_by_side)}
        staged = {name: ways.ask(name, "stages", batch) for name in rows if name != "sd"}
        answers["stages"] = {"sd": {}} | staged
        for name, row in rows.items():
            if name in ways.errors:
                row["error"] = ways.errors[name]
            elif first and turn < 0:
                row["first"] = answers["whole"][name]
            elif turn >= 0:
                for key, found in answers.items():
                    row[key].append(found[name])
                row["memory"] = ways.ask(name, "memory", batch)
        save()


def floor(args: argparse.Namespace, way: str, batch: int, measured: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Return lower bounds of U-Net and decoder seconds: operations / matrix rate, or bytes / copy rate if larger.

    Counted on the unchanged models: folding an upsampling layer into its convolution needs fewer operations. Bytes are
    the weights once, and what each layer reads and writes.
    """
    dtype = torch.float32 if way == "eager" else torch.bfloat16
    unet, config = unet_of(args.model, args.small)
    side = args.size // 8
    with torch.device("meta"):
        models = {"U-Net": unet(**config), "decoder": AutoencoderTiny() if way.endswith("tiny") else None}
        models["decoder"] = models["decoder"] or AutoencoderKL(**vae_config(args.small))
        latents = torch.empty(batch, 4, side, side)
        embeds = torch.empty(batch, MAX_TOKENS, config["cross_attention_dim"])
        added: dict[str, Any] = {}
        if args.model == "sdxl":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added = {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, 6)}
    flops_rate, bytes_rate = measured["float32" if way == "eager" else "half"]
    found: dict[str, Any] = {}
    for stage, model in models.items():
        moved = [sum(p.numel() for p in (model.decoder if stage == "decoder" else model).parameters())]

        def count(module: nn.Module, inputs: Any, output: Any, moved: list[int] = moved) -> None:
            moved[0] += sum(each.numel() for each in (*inputs, output) if isinstance(each, torch.Tensor))

        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(count)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if stage == "decoder":
                model.decode(latents)
            else:
                model(latents, torch.tensor(1000.0, device="meta"), embeds, added_cond_kwargs=added)
        operations, size = counter.get_total_flops(), moved[0] * dtype.itemsize
        least = max(operations / flops_rate, size / bytes_rate)
        found[stage] = {"TFLOP": operations / 1e12, "GB": size / 1e9, "seconds": least}
    return found


def as_markdown(results: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Return the lines of the report, without its provenance."""
    lines = [f"# Latency: {args.model}, {args.size}x{args.size}, {args.device}", ""]
    stages = ("text", "text again", "U-Net", "decoder", "bytes")
    for batch, rows in results["sizes"].items():
        done = {name: row for name, row in rows.items() if row["whole"]}
        base = median(done["eager"]["whole"]) if "eager" in done else None
        lines += [f"Batch of {batch}, seconds, medians of {args.rounds} turns:", ""]
        lines += [f"| | whole | faster than eager | {' | '.join(stages)} | floor: U-Net | decoder | peak GB | first |"]
        lines += ["|---|---|---|" + "---|" * (len(stages) + 4)]
        for name, row in done.items():
            whole = median(row["whole"])
            cells = [f"{whole:.4g}", f"{base / whole:.2f}x" if base else ""]
            cells += [f"{median([each[s] for each in row['stages']]):.4g}" if name != "sd" else "" for s in stages]
            cells += [f"{row['floor'][s]['seconds']:.3g}" if "floor" in row else "" for s in ("U-Net", "decoder")]
            first = "" if row["first"] is None else f"{row['first']:.1f}"
            lines += [f"| {name} | {' | '.join(cells)} | {row['memory'] or 0:.1f} | {first} |"]
        if "sd" in done:
            rest = {name: median(done["sd"]["whole"]) / median(row["whole"]) for name, row in done.items()}
            lines += ["", "Times faster than sd: " + ", ".join(f"{n} {r:.1f}" for n, r in rest.items() if n != "sd")]
        lines += against_openvino(done)
        lines += ["", *(f"{name} failed: {row['error']}\n" for name, row in rows.items() if "error" in row)]
    for name, (flops, size) in results["rates"].items():
        lines.append(f"- {name}: {flops / 1e9:.0f} GFLOP/s of a matrix product, {size / 1e9:.1f} GB/s of a copy")
    if "sd" in args.ways and args.sd_steps < SD_STEPS:
        lines.append(f"- sd: {SD_STEPS} steps, extrapolated from {args.sd_steps} and {args.sd_steps + 1}")
    return [
        *lines,
        "- first: the first picture of that size, in which compiled ways compile",
        "- the weights are random; memory is the most that the way's process has held, all sizes so far",
    ]


def against_openvino(done: dict[str, Any]) -> list[str]:
    """Return lines that compare the shortest times of U-Net and decoder with OpenVINO's, if both were measured."""
    lines: list[str] = []
    for ours, theirs in (("fast", "openvino"), ("tiny", "openvino-tiny")):
        for stage in ("U-Net", "decoder") if ours in done and theirs in done else ():
            a, b = (min(each[stage] for each in done[name]["stages"]) for name in (ours, theirs))
            lines.append(f"- {ours}, {stage}: {a:.3f} s, OpenVINO {b:.3f} s, speed {b / a:.2f} of OpenVINO's")
    return ["", "Shortest times, the machine being least disturbed then:", "", *lines] if lines else []


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="sd15", choices=MODELS)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--size", type=int, help="pixels (default: 512, sdxl 1024, small models 128)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each variant")
    parser.add_argument("--warm-up", type=int, default=1, help="turns before the timed ones")
    parser.add_argument("--apart", action="store_true", help="one variant in memory at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sd-steps", type=int, help=f"steps of sd to run (default: 2 on a CPU, {SD_STEPS} on a GPU)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="for fast and tiny (default: auto)")
    parser.add_argument("--small", action="store_true", help="narrow models, to test the script")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/latency"), help="without suffix")
    args = parser.parse_args(words)
    on_cuda = args.device.startswith("cuda")
    args.size = args.size or (128 if args.small else 1024 if args.model == "sdxl" else 512)
    args.sd_steps = args.sd_steps or (SD_STEPS if on_cuda else 2)
    args.ways = args.ways or (["eager", *(["eager-half"] if on_cuda else []), "fast", "tiny", "sd"])
    return args


def main() -> None:
    args = parse_arguments()
    # Before the processes start: threads that wait must not spin while another process is timed.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(args.threads)}
    torch.set_num_threads(args.threads)
    settings = {name: str(value) for name, value in vars(args).items()}
    results: dict[str, Any] = {"provenance": provenance(args.device), "settings": settings}
    if any(name.startswith("openvino") for name in args.ways):
        results["provenance"]["versions"] += f", openvino {version('openvino')}"
    measure(args, results, lambda: write_results(args.output, results, as_markdown(results, args), quiet=True))
    print(args.output.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
