"""How long a picture takes, from the prompt's text to its bytes, by four ways in one run, and how near to the floor.

    python benchmarks/latency.py                                     # this CPU, Stable Diffusion 1.5's shapes
    python benchmarks/latency.py --device cuda --rounds 20 --batches 1 8

The models have the exact shapes of Stable Diffusion 1.5 (or InstaFlow-1.7B, or SDXL) and random weights, on which
speed does not depend. The ways:

- eager: one step in float32 with the full VAE, as the community's InstaFlow pipeline draws. On CUDA there is
  `eager-half` as well, the same in float16.
- fast: `optimize(pipeline)`, with the full VAE.
- tiny: `optimize(pipeline, decoder=AutoencoderTiny)`.
- sd: a Stable Diffusion, 25 steps of DPM-Solver++ with guidance 7.5, float32. On a CPU one run is of --sd-steps steps
  and of one more, and the 25 are extrapolated from both.

Each way lives in a process of its own, since a setting of the memory and compiled code belong to a process. Only one
of them works at a time; the ways take turns (sd comes after them), and the medians are reported. Every picture has a
prompt of its own, so that no cached embedding is timed; what the cache saves is the stage "text".
"""

import argparse
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from machine import median, peak_memory, provenance, rates, seconds, write_results
from rectified_diffusers import RectifiedFlowPipeline, RectifiedFlowXLPipeline, StackedUNet, bundled_checkpoint
from rectified_diffusers.speed.optimize import optimize

SD_STEPS, SD_GUIDANCE = 25, 7.5
XL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SMALL: dict[str, Any] = {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 768, "attention_head_dim": 4}
TEXT_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
TEXT_G: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}


def make(cls: Any, dtype: torch.dtype, device: str, *args: Any, **config: Any) -> Any:
    """Build a model with random weights of the usual size, without the time that its own initialisation takes."""
    with torch.device("meta"):
        model = cls(*args, **config)
    model = model.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.01)
            else:
                parameter.uniform_(-1, 1).mul_(parameter[0].numel() ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return model


def vae_config(args: argparse.Namespace) -> dict[str, Any]:
    widths = (32, 32, 32, 32) if args.small else (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return {"block_out_channels": widths, "layers_per_block": 2, "latent_channels": 4, "sample_size": 512, **blocks}


def unet_of(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    if args.model == "sdxl":
        return UNet2DConditionModel, XL_UNET
    config = SD_UNET | (SMALL if args.small else {})
    return (StackedUNet if args.model == "stacked" else UNet2DConditionModel), config


def build(args: argparse.Namespace, way: str) -> Any:
    """Build the pipeline of a way on its device. The tokenizer's words do not matter; the 77 tokens do."""
    half = torch.float16 if args.device.startswith("cuda") else torch.bfloat16
    eager = torch.float16 if way == "eager-half" else torch.float32
    dtype = eager if way in ("eager", "eager-half", "sd") else half
    on = (dtype, args.device)
    unet, config = unet_of(args)
    layers = 1 if args.small else 12
    text = CLIPTextConfig(vocab_size=49408, num_hidden_layers=layers, eos_token_id=1, pad_token_id=1, **TEXT_L)
    tokenizer = CLIPTokenizer.from_pretrained(bundled_checkpoint() / "tokenizer", model_max_length=77)
    components: dict[str, Any] = {
        "unet": make(unet, *on, **config),
        "vae": make(AutoencoderKL, *on, **vae_config(args)),
        "text_encoder": make(CLIPTextModel, *on, text),
        "tokenizer": tokenizer,
        "scheduler": None,
    }
    if way == "sd":
        components["scheduler"] = DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        )
    if args.model == "sdxl":
        more = CLIPTextConfig(
            vocab_size=49408, num_hidden_layers=32, eos_token_id=1, pad_token_id=1, projection_dim=1280, **TEXT_G
        )
        components |= {"text_encoder_2": make(CLIPTextModelWithProjection, *on, more), "tokenizer_2": tokenizer}
        cls = StableDiffusionXLPipeline if way == "sd" else RectifiedFlowXLPipeline
        pipeline = cls(**components, add_watermarker=False)
    else:
        cls = StableDiffusionPipeline if way == "sd" else RectifiedFlowPipeline
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = cls(**components, **unused)
    pipeline.set_progress_bar_config(disable=True)
    if way in ("fast", "tiny"):
        tiny = make(AutoencoderTiny, *on) if way == "tiny" else None
        optimize(pipeline, decoder=tiny, compile="auto" if args.compile is None else args.compile)
    return pipeline


class Way:
    """One way to draw, in its process: whole pictures, and their stages one by one."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.args, self.name, self.count = args, name, 0
        self.pipeline = build(args, name)

    def prompts(self, batch: int) -> list[str]:
        """Sentences that nobody has asked for yet."""
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
        """Seconds of one call, prompts to pictures; those of 25 steps are extrapolated where they take minutes."""
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
        """Seconds of the stages, each called by itself."""
        pipe, device, found = self.pipeline, self.args.device, {}
        prompts = self.prompts(batch)
        found["text"] = seconds(lambda: pipe.encode_prompt(prompts, device=device, **self.encoding()), device)
        encoded = pipe.encode_prompt(prompts, device=device, **self.encoding())
        found["text again"] = seconds(lambda: pipe.encode_prompt(prompts, device=device, **self.encoding()), device)
        side = self.args.size // 8
        latents = torch.randn(batch, 4, side, side, device=device, dtype=pipe.unet.dtype)
        added: dict[str, Any] = {}
        if self.args.model == "sdxl":
            ids = torch.zeros(batch, 6, device=device, dtype=latents.dtype)
            added["added_cond_kwargs"] = {"text_embeds": encoded[2], "time_ids": ids}
        t = torch.tensor(1000.0, device=device)
        found["U-Net"] = seconds(lambda: pipe.unet(latents, t, encoder_hidden_states=encoded[0], **added), device)
        found["decoder"] = seconds(lambda: pipe.vae.decode(latents), device)
        images = pipe.vae.decode(latents).sample
        found["bytes"] = seconds(lambda: pipe.image_processor.postprocess(images), device)
        return found

    def encoding(self) -> dict[str, Any]:
        return {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}


def work(args: argparse.Namespace, name: str, pipe: Any) -> None:
    """Answer the parent's questions until it hangs up."""
    torch.set_num_threads(args.threads)
    way = Way(args, name)
    pipe.send("ready")
    for question, batch in iter(pipe.recv, None):
        answer = {"whole": way.whole, "stages": way.stages, "memory": lambda _: peak_memory(args.device)}[question]
        pipe.send(answer(batch))


def floor(args: argparse.Namespace, way: str, batch: int, measured: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Least seconds of U-Net and decoder: operations over the matrix rate, or bytes over the copy rate if more.

    Counted on the unchanged models: folding an enlargement into its convolution does with fewer operations. Bytes are
    the weights once, and what each layer reads and writes.
    """
    dtype = torch.float32 if way == "eager" else torch.bfloat16
    unet, config = unet_of(args)
    side = args.size // 8
    with torch.device("meta"):
        models = {"U-Net": unet(**config), "decoder": AutoencoderTiny() if way == "tiny" else None}
        models["decoder"] = models["decoder"] or AutoencoderKL(**vae_config(args))
        latents, embeds = torch.empty(batch, 4, side, side), torch.empty(batch, 77, config["cross_attention_dim"])
        added = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)}
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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time the fast ways and eager, which take turns, then sd by itself: all at once are more than 24 GB hold.

    With --apart, every way by itself.
    """
    half = torch.float16 if args.device.startswith("cuda") else torch.bfloat16
    measured = {"float32": rates(torch.float32, args.device), "half": rates(half, args.device)}
    sizes: dict[int, dict[str, Any]] = {batch: {} for batch in args.batches}
    turns = [[name] for name in args.ways]
    if not args.apart:
        turns = [[name for name in args.ways if name != "sd"], [name for name in args.ways if name == "sd"]]
    for together in turns:
        for batch, rows in take_turns(args, together).items():
            for name, row in rows.items():
                if name != "sd":
                    row["floor"] = floor(args, name, batch, measured)
            sizes[batch] |= rows
    return {"rates": measured, "sizes": sizes}


def take_turns(args: argparse.Namespace, names: list[str]) -> dict[int, dict[str, Any]]:
    """Time some ways by turns; one warm-up turn for each size comes first, in which compiled ones compile."""
    context = multiprocessing.get_context("spawn")
    ends, processes = {}, []
    for name in names:
        ends[name], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(args, name, theirs), daemon=True))
        processes[-1].start()
        ends[name].recv()

    def ask(name: str, question: str, batch: int) -> Any:
        ends[name].send((question, batch))
        return ends[name].recv()

    sizes = {}
    for batch in args.batches:
        rows: dict[str, Any] = {name: {"whole": [], "stages": []} for name in names}
        for turn in range(-args.warm_up, args.rounds):
            for name in names:
                answer = ask(name, "whole", batch), {} if name == "sd" else ask(name, "stages", batch)
                if turn >= 0:
                    for key, value in zip(("whole", "stages"), answer, strict=True):
                        rows[name][key].append(value)
        for name, row in rows.items():
            row["memory"] = ask(name, "memory", batch)
        sizes[batch] = rows
    for name in names:
        ends[name].send(None)
    for process in processes:
        process.join()
    return sizes


def as_markdown(results: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Give the lines of the report, without where it was made."""
    lines = [f"# Latency: {args.model}, {args.size}x{args.size}, {args.device}", ""]
    stages = ("text", "text again", "U-Net", "decoder", "bytes")
    for batch, rows in results["sizes"].items():
        base = median(rows["eager"]["whole"]) if "eager" in rows else None
        lines += [f"Batch of {batch}, seconds, medians of {args.rounds} turns:", ""]
        lines += [f"| | whole | faster than eager | {' | '.join(stages)} | floor: U-Net | decoder | peak GB |"]
        lines += ["|---|---|---|" + "---|" * (len(stages) + 3)]
        for name, row in rows.items():
            whole = median(row["whole"])
            cells = [f"{whole:.4g}", f"{base / whole:.2f}x" if base else ""]
            cells += [f"{median([each[s] for each in row['stages']]):.4g}" if name != "sd" else "" for s in stages]
            cells += [f"{row['floor'][s]['seconds']:.3g}" if "floor" in row else "" for s in ("U-Net", "decoder")]
            lines += [f"| {name} | {' | '.join(cells)} | {row['memory']:.1f} |"]
        if "sd" in rows:
            rest = {name: median(rows["sd"]["whole"]) / median(row["whole"]) for name, row in rows.items()}
            lines += ["", "Times faster than sd: " + ", ".join(f"{n} {r:.1f}" for n, r in rest.items() if n != "sd")]
        lines.append("")
    for name, (flops, size) in results["rates"].items():
        lines.append(f"- {name}: {flops / 1e9:.0f} GFLOP/s of a matrix product, {size / 1e9:.1f} GB/s of a copy")
    if "sd" in args.ways and args.sd_steps < SD_STEPS:
        lines.append(f"- sd: {SD_STEPS} steps, extrapolated from {args.sd_steps} and {args.sd_steps + 1}")
    return [*lines, "- the weights are random; memory is the most that the way's process has held, all sizes so far"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="sd15", choices=["sd15", "stacked", "sdxl"])
    parser.add_argument("--ways", nargs="+", choices=["eager", "eager-half", "fast", "tiny", "sd"])
    parser.add_argument("--size", type=int, help="pixels (default: 512, sdxl 1024)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way that count")
    parser.add_argument("--warm-up", type=int, default=1, help="turns before them")
    parser.add_argument("--apart", action="store_true", help="one way after the other: one in memory at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sd-steps", type=int, help=f"steps run of sd (default: 2 on a CPU, {SD_STEPS} on a GPU)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="of the fast ways (default: auto)")
    parser.add_argument("--small", action="store_true", help="narrow models, to try the script")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/latency"), help="without suffix")
    args = parser.parse_args()
    on_cuda = args.device.startswith("cuda")
    args.size = args.size or (1024 if args.model == "sdxl" else 512)
    args.sd_steps = args.sd_steps or (SD_STEPS if on_cuda else 2)
    args.ways = args.ways or (["eager", *(["eager-half"] if on_cuda else []), "fast", "tiny", "sd"])
    return args


def main() -> None:
    args = parse_arguments()
    # Before the processes start: threads that wait must not spin while another process is timed.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(args.threads)}
    torch.set_num_threads(args.threads)
    results = {"provenance": provenance(args.device), **measure(args)}
    results["settings"] = {name: str(value) for name, value in vars(args).items()}
    write_results(args.output, results, as_markdown(results, args))


if __name__ == "__main__":
    main()
