"""Generate an image in one step, conditioned on edges, depth or pose detected in another image.

    python examples/controlnet.py photo.png "a glass bird" --detector canny --output bird.png

Needs the extra `controlnet`. Detectors other than canny load their weights from the Hub."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from PIL import Image

from rectified_diffusers import RectifiedFlowControlNetPipeline

DETECTORS = {  # the class in controlnet_aux, and the Stable Diffusion 1.5 ControlNet for its output
    "canny": ("CannyDetector", "lllyasviel/control_v11p_sd15_canny"),
    "depth": ("MidasDetector", "lllyasviel/control_v11f1p_sd15_depth"),
    "openpose": ("OpenposeDetector", "lllyasviel/control_v11p_sd15_openpose"),
    "softedge": ("PidiNetDetector", "lllyasviel/control_v11p_sd15_softedge"),
}


def load_detector(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its import replaces models of timm, with one warning each
            import controlnet_aux
    except Exception as error:  # not only ImportError: mediapipe 1.2 breaks it
        remedy = 'pip install "rectified_diffusers[controlnet]"; if mediapipe is installed: pip uninstall mediapipe'
        raise RuntimeError(f"controlnet_aux cannot be imported ({error!r}): {remedy}.") from error
    detector = getattr(controlnet_aux, DETECTORS[name][0])
    return detector.from_pretrained("lllyasviel/Annotators") if hasattr(detector, "from_pretrained") else detector()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("picture")
    parser.add_argument("prompt")
    parser.add_argument("--detector", choices=DETECTORS, default="canny")
    parser.add_argument("--model", default="XCLiu/instaflow_0_9B_from_sd_1_5")
    parser.add_argument("--controlnet", help="folder or Hub id (default: the detector's, for Stable Diffusion 1.5)")
    parser.add_argument("--resolution", type=int, default=512, help="pixels of the shorter side, a multiple of 64")
    parser.add_argument("--output", type=Path, required=True, help="the control image is saved as NAME.control.png")
    args = parser.parse_args()

    size = {"detect_resolution": args.resolution, "image_resolution": args.resolution}
    control = load_detector(args.detector)(Image.open(args.picture).convert("RGB"), **size)
    controlnet = ControlNetModel.from_pretrained(args.controlnet or DETECTORS[args.detector][1])
    pipeline = RectifiedFlowControlNetPipeline.from_pretrained(args.model, controlnet=controlnet)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline(args.prompt, image=control, generator=torch.manual_seed(0)).images[0].save(args.output)
    control.save(args.output.with_suffix(".control.png"))


if __name__ == "__main__":
    main()
