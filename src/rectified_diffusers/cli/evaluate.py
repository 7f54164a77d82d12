"""rectified-diffusers evaluate: metrics of a model against real images, as JSON, as a table and as plots."""

from __future__ import annotations

import argparse
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectified_diffusers.cli.shared import (
    PROG,
    CommandError,
    add_device,
    add_json,
    check_output_dir,
    default_model,
    load_pipeline,
    print_result,
)
from rectified_diffusers.evaluation.config import EvaluationConfig
from rectified_diffusers.options import add_options, options_from

if TYPE_CHECKING:
    from rectified_diffusers.data.images import RealPictures


def add_evaluate(commands: Any) -> argparse.ArgumentParser:
    text = "Measure a model against real pictures: distances, alignment, diversity, straightness."
    epilog = (
        "Run it again with another --model and the same --output-dir to compare the two in one table. What was drawn "
        "is kept in OUTPUT_DIR/cache, so that a killed run goes on; remove that folder when you are done."
    )
    parser = commands.add_parser("evaluate", help=text, description=text, epilog=epilog)
    parser.add_argument("--model", type=expanduser, help="Pipeline folder or Hub id (default: the bundled model)")
    parser.add_argument("--name", help="Name of the model in the table (default: its folder or Hub id)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", type=Path, help="Folder of real pictures: files with a metadata.jsonl of file_name and text"
    )
    source.add_argument(
        "--triplets", type=Path, help="Instead: the folder that `triplets` wrote; the teacher's data are the real ones"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="Folder of the figures (required)")
    parser.add_argument("--plots", action="store_true", help="Draw OUTPUT_DIR/plots/*.png of all models in it")
    add_options(parser, EvaluationConfig)
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run_evaluate, resumable=True)
    return parser


def run_evaluate(arguments: argparse.Namespace) -> None:
    config = options_from(arguments, EvaluationConfig)
    folder = arguments.data or arguments.triplets
    if not folder.is_dir():
        raise CommandError(f"no folder {str(folder)!r}; give one of real pictures or of triplets")
    check_output_dir(arguments.output_dir)
    model = default_model() if arguments.model is None else arguments.model
    name = arguments.name or (Path(model).resolve().name if Path(model).is_dir() else model)
    pipeline = load_pipeline(model, arguments.device, arguments.dtype)
    from rectified_diffusers.data.images import read_pictures
    from rectified_diffusers.evaluation.evaluate import evaluate

    if arguments.data:
        pictures = read_pictures(folder, _picture_size(pipeline), config.seen_split)
    else:
        pictures = _pictures_of_triplets(folder, pipeline, config)
    report = evaluate(pipeline, pictures, arguments.output_dir, config, name)
    if arguments.plots:
        from rectified_diffusers.evaluation.plots import write_plots

        write_plots(arguments.output_dir)
    figures = arguments.output_dir / "evaluation.json"
    print_result(
        arguments, report.as_markdown().rstrip("\n"), name=name, output_dir=arguments.output_dir, figures=figures
    )


def _picture_size(pipeline: Any) -> int:
    """Return the side length in pixels of a model's default image size."""
    from rectified_diffusers.models.latents import latent_shape

    _, height, width = latent_shape(pipeline)
    if height != width:
        raise CommandError(f"the model draws {height}x{width} latents; {PROG} evaluate needs square pictures")
    return height * pipeline.vae_scale_factor


def _pictures_of_triplets(folder: Path, pipeline: Any, config: EvaluationConfig) -> RealPictures:
    """Return a teacher's data, decoded by the model's own VAE, as the real images."""
    import torch

    from rectified_diffusers.data.dataset import TripletDataset
    from rectified_diffusers.data.images import RealPictures
    from rectified_diffusers.evaluation.gallery import digest_of
    from rectified_diffusers.models.latents import unscale

    dataset, vae = TripletDataset(folder), pipeline.vae

    @torch.no_grad()
    def read(numbers: Any) -> Any:
        parts = []
        for latents in dataset.rows(numbers).data.split(config.batch_size):
            images = vae.decode(unscale(vae, latents.to(vae.device, vae.dtype))).sample
            parts.append(((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8))
        return torch.cat(parts)

    captions = [prompt for first in range(0, len(dataset), 1024) for prompt in _prompts(dataset, first)]
    identity = digest_of(dataset.manifest.settings)
    return RealPictures(captions, [config.seen_split] * len(captions), [""] * len(captions), identity, read)


def _prompts(dataset: Any, first: int) -> list[str]:
    return dataset.rows(range(first, min(first + 1024, len(dataset)))).prompts
