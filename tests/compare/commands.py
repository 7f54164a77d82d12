"""The command lines that both versions run; edit them when a command or an option is renamed.

Name: lines, one after the other. A command writes files and folders of its own name, by which others find them. A line
that begins with -c is Python: public names that no command calls.
"""

TRIPLETS = "--num-triplets 8 --triplets-per-shard 4 --batch-size 4 --num-inference-steps 2"
GUIDED = "--guidance-scale 5"  # the default became that of the pipeline's own call
TRAIN = "--batch-size 4 --learning-rate 1e-3 --warmup-steps 2 --log-every-steps 1 --save-every-steps 2 --ema-decay 0.9"
WATCH = "--validate-every-steps 2 --validation-prompts 'a cat' --straightness-paths 2"
ALEX = "--lpips-weights inputs/alexnet.safetensors"
FIGURES = (
    "--num-pictures 6 --seeds 0 --feature-size 32 --mobilenet-weights inputs/mobilenet.safetensors "
    "--alignment inputs/alignment --sentence-encoder inputs/sentences --diversity-prompts 2 --diversity-pictures 2 "
    "--straightness-prompts 2 --straightness-steps 4 --straightness-bins 2"
)
API = (
    "import rectified_diffusers as rd, safetensors.torch, torch; from PIL import Image; "
    "picture = Image.open('inputs/pictures/0-0.png').resize((32, 32)); "
    "flow = rd.RectifiedFlowPipeline.from_pretrained('reflow'); "
)
REFLOW = f"reflow --model inputs/teacher --triplets triplets --output-dir reflow {TRAIN} {WATCH}"
LORA = f"reflow --model inputs/teacher --triplets triplets --output-dir reflow-lora {TRAIN} --lora-rank 2"
DMD = f"dmd --model distill --teacher inputs/teacher --triplets flow-triplets {TRAIN} --fake-updates 2"
DMD_REAL = f"{DMD} --real-triplets real-triplets --first-fake-updates 1 --output-dir dmd-real"
MAKE_TRIPLETS = (
    f"triplets --teacher inputs/teacher --prompts inputs/prompts.txt --output-dir triplets {TRIPLETS} {GUIDED}"
)
EVALUATE = f"evaluate --data inputs/pictures --output-dir evaluate {FIGURES}"

COMMANDS: dict[str, list[str]] = {
    "completion": ["--print-completion bash"],
    "generate": ["generate 'a red apple' 'the sea' -o generate.png --num-images 2 --seed 3"],
    "generate-fast": ["generate 'a red apple' 'the sea' 'a cat' -o generate-fast.png --fast"],
    "interpolate": [
        "interpolate 'a red apple' 'the sea' -o interpolate.gif -o interpolate.png -o interpolate.mp4 "
        "--seeds 1 2 --frames 3 --loop"
    ],
    "inspect": ["inspect inputs/teacher --json"],
    "triplets": [MAKE_TRIPLETS],
    "triplets-stored": [
        "triplets --teacher inputs/v-teacher --prompts inputs/prompts.jsonl --output-dir triplets-stored "
        f"{TRIPLETS} {GUIDED} --store-text-embeddings --solver DDIMScheduler --storage-dtype float32 --seed 5"
    ],
    "real-triplets": [
        "real-triplets --teacher inputs/teacher --data inputs/pictures --output-dir real-triplets "
        f"{TRIPLETS} --inversion-time 0.065"
    ],
    "real-triplets-new": [
        "real-triplets --teacher inputs/teacher --data inputs/pictures --output-dir real-triplets-new "
        f"{TRIPLETS} --num-inference-steps 0 --store-text-embeddings"
    ],
    "verify": ["verify triplets", "verify real-triplets"],
    "reflow": [f"{REFLOW} --max-steps 2", f"{REFLOW} --max-steps 4"],  # the second resumes
    "reflow-lora": [f"{LORA} --max-steps 2"],
    "reflow-v": [
        "reflow --model inputs/v-teacher --triplets triplets-stored --output-dir reflow-v --max-steps 2 "
        f"{TRAIN} --initialisation snr_matching --time-density logit_normal --micro-batch-size 2"
    ],
    "reflow-modern": [
        "reflow --model inputs/teacher --triplets triplets real-triplets --output-dir reflow-modern --max-steps 2 "
        f"{TRAIN} --preset modern --loss lpips_huber {ALEX} --gradient-checkpointing"
    ],
    "flow-triplets": [
        f"triplets --teacher reflow --prompts inputs/prompts.txt --output-dir flow-triplets {TRIPLETS} "
        "--num-triplets 12 --guidance-scale 1.5 --mixed-precision bf16"
    ],
    "distill": [f"distill --model reflow --triplets flow-triplets --output-dir distill --max-steps 3 {TRAIN} {WATCH}"],
    "distill-lpips": [
        "distill --model reflow --triplets flow-triplets --output-dir distill-lpips --max-steps 2 "
        f"{TRAIN} --loss lpips {ALEX} --lr-schedule cosine"
    ],
    "distill-plain": [
        "distill --model reflow-v --triplets triplets-stored --output-dir distill-plain --max-steps 2 "
        f"{TRAIN} --plain-unet --loss pseudo_huber"
    ],
    "progressive": [
        "progressive --model reflow --triplets triplets --output-dir progressive --teacher-steps 4 "
        f"--steps-per-round 2 --teacher-guidance-scale 2 {TRAIN}"
    ],
    "progressive-coupled": [
        "progressive --model inputs/teacher --triplets triplets --output-dir progressive-coupled --teacher-steps 2 "
        f"--steps-per-round 2 --pairs coupled --initialisation snr_matching {TRAIN}"
    ],
    "dmd": [f"{DMD} --output-dir dmd --max-steps 2 --regression-weight 0.5"],
    "dmd-real": [f"{DMD_REAL} --max-steps 2"],
    "evaluate": [f"{EVALUATE} --model reflow --steps 2", f"{EVALUATE} --model distill --plots"],
    "evaluate-triplets": [
        f"evaluate --triplets flow-triplets --model distill --output-dir evaluate-triplets {FIGURES}"
    ],
    "export-onnx": ["export onnx --model reflow -o export-onnx"],
    "export-diffusers": [
        "export diffusers --model reflow -o export-diffusers",
        "export diffusers --model distill-plain -o export-diffusers/dpm --scheduler dpm_solver++",
    ],
    "export-comfyui": ["export comfyui --model reflow -o export-comfyui.safetensors"],
    "export-ldm": ["export ldm --model reflow -o export-ldm.safetensors"],
    "delta": [
        "delta make --fine-tune reflow --base inputs/teacher -o delta.safetensors",
        "delta apply --model inputs/teacher --delta delta.safetensors=0.5 --components-from reflow -o delta",
    ],
    "generate-flow": [
        "generate 'a cat' 'the sea' -o generate-flow.png --model reflow --steps 3 --guidance-scale 2 "
        "--negative-prompt 'two dogs' --height 48 --width 32",
        "generate 'a cat' -o generate-flow-lora.png --model reflow-lora",
        "generate 'a cat' -o generate-flow-v.png --model reflow-v --steps 2",
        "generate 'a cat' -o generate-flow-plain.png --model distill-plain",
    ],
    "generate-refined": [
        "generate 'a cat' -o generate-refined.png --model reflow --refine inputs/refiner --refine-steps 4 "
        "--refine-strength 0.5"
    ],
    **{
        f"reflow-{kind}": [
            f"triplets --teacher inputs/{kind} --prompts inputs/prompts.txt --output-dir reflow-{kind}-triplets "
            f"{TRIPLETS} {GUIDED} --height 32 --width 32",
            f"reflow --model inputs/{kind} --triplets reflow-{kind}-triplets --output-dir reflow-{kind} --max-steps 2 "
            f"{TRAIN}",
            f"generate 'a cat' -o reflow-{kind}.png --model reflow-{kind} --height 32 --width 32",
        ]
        for kind in ("xl", "sd3", "flux")
    },
    "demo": ["-c \"from tests.compare.demo import draw; draw('a cat', 'demo.png', '--model', 'distill')\""],
    "portable": [f"-c \"{API}rd.save_portable(flow, 'portable')\""],
    "invert": [
        f'-c "{API}'
        "noise = rd.invert(flow, picture, 'a cat', 2).contiguous(); "
        "safetensors.torch.save_file({'noise': noise}, 'invert.safetensors'); "
        "rd.edit(flow, picture, 'a cat', 'two dogs', 2, strength=0.5)[0].save('invert.png')\""
    ],
    "pipelines": [
        f'-c "{API}options = dict(num_inference_steps=2); '
        "image = rd.RectifiedFlowImg2ImgPipeline(**flow.components); "
        "seeded = lambda: torch.Generator().manual_seed(0); "
        "image('a cat', picture, strength=0.5, generator=seeded(), **options).images[0].save('pipelines-image.png'); "
        "inpaint = rd.RectifiedFlowInpaintPipeline(**flow.components); mask = picture.convert('L'); "
        "inpaint('a cat', picture, mask, height=32, width=32, generator=seeded(), **options)"
        ".images[0].save('pipelines-inpaint.png')\""
    ],
}

# Likewise, in a folder where the version before has run all commands.
OLD: dict[str, list[str]] = {
    "old-resume": [f"{REFLOW} --max-steps 6", f"{LORA} --max-steps 4", f"{DMD_REAL} --max-steps 4"],
    "old-triplets": [
        "-c \"import os; os.remove('triplets/shard-00001.safetensors')\"",
        MAKE_TRIPLETS,
        "verify triplets",
    ],
    "old-verify": ["verify real-triplets", "verify flow-triplets"],
    "old-reflow": [
        "reflow --model reflow --triplets flow-triplets real-triplets --output-dir old-reflow --max-steps 2 " + TRAIN
    ],
    "old-dmd": [f"{DMD} --output-dir old-dmd --max-steps 2 --real-triplets real-triplets-new"],
    "old-generate": [
        f"generate 'a cat' 'the sea' -o old-generate-{model}.png --steps 2 --model {model}"
        for model in ("reflow", "reflow-lora", "reflow-v", "distill", "distill-plain", "dmd", "delta", "reflow-xl")
    ],
    "old-evaluate": [f"{EVALUATE} --model reflow --steps 2", f"{EVALUATE} --model dmd"],
    "old-delta": ["delta apply --model reflow --delta delta.safetensors -o old-delta"],
}
