"""rectified-diffusers evaluate: metrics of a model against real images, as JSON, as a table and as plots."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectified_diffusers.cli.shared import (
    PROG,
    CommandError,
    ModelOptions,
    add_command,
    check_output_dir,
    load_pipeline,
    print_result,
)
from rectified_diffusers.evaluation.config import ComparisonConfig, EvaluationConfig
from rectified_diffusers.options import flag, option

if TYPE_CHECKING:
    from rectified_diffusers.data.real_images import RealPictures
    from rectified_diffusers.evaluation.intervals import Interval


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    name: str | None = option(None, "Name of the model in the table.", shown="its folder or Hub id")
    data: Path | None = option(None, "Folder of real images: files with a metadata.jsonl of file_name and text.")
    triplets: Path | None = option(
        None, "Instead of --data: folder that `triplets` wrote; the teacher's data are the real images."
    )
    output_dir: Path = option(MISSING, "Folder of the results.")
    plots: bool = flag("Plot all models of OUTPUT_DIR to OUTPUT_DIR/plots/*.png.")

    def __post_init__(self) -> None:
        if (self.data is None) == (self.triplets is None):
            raise CommandError("real images are required from one source: give either --data or --triplets")


def add_to(commands: Any) -> None:
    text = "Compare a model with real images: distances, alignment, diversity, straightness."
    epilog = (
        "Run it again with another --model and the same --output-dir to compare both in one table. Generated images "
        "are kept in OUTPUT_DIR/cache, so that an interrupted run continues; remove that folder at the end."
    )
    classes = EvaluateOptions, EvaluationConfig, ComparisonConfig
    add_command(commands, "evaluate", run_evaluate, *classes, help=text, epilog=epilog, resumable=True)


def run_evaluate(options: EvaluateOptions, config: EvaluationConfig, comparison: ComparisonConfig) -> None:
    folder = Path(options.data or options.triplets or "")
    if not folder.is_dir():
        raise CommandError(f"no folder {str(folder)!r}; give a folder of real images or of triplets")
    check_output_dir(options.output_dir)
    model = options.source
    load = lambda model: load_pipeline(model, options.device, options.dtype)  # noqa: E731
    pipeline = load(model)
    from rectified_diffusers.data.real_images import read_pictures
    from rectified_diffusers.evaluation.comparison import evaluate_beside, model_name

    name = options.name or model_name(model)
    images = (
        read_pictures(folder, _image_size(pipeline), config.seen_split)
        if options.data
        else _images_of_triplets(folder, pipeline, config)
    )
    report = evaluate_beside(pipeline, load, images, options.output_dir, config, comparison, name)
    if options.triplets and config.transport_pairs:
        report = replace(report, coupling=_transport_cost(folder, config.transport_pairs))
        report.write(options.output_dir)
    if options.plots:
        from rectified_diffusers.evaluation.plots import write_plots

        write_plots(options.output_dir)
    results = options.output_dir / "evaluation.json"
    text = report.as_markdown().rstrip("\n")
    print_result(options, text, name=name, output_dir=options.output_dir, figures=results)


def _image_size(pipeline: Any) -> int:
    """Return the side length in pixels of a model's default image size."""
    from rectified_diffusers.models.latents import latent_shape

    try:
        _, height, width = latent_shape(pipeline)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CommandError(
            f"the size of the images of {type(pipeline).__name__} is not known; evaluate it with --triplets"
        ) from error
    if height != width:
        raise CommandError(f"the model generates {height}x{width} latents; {PROG} evaluate needs square images")
    return height * pipeline.vae_scale_factor


def _images_of_triplets(folder: Path, pipeline: Any, config: EvaluationConfig) -> RealPictures:
    """Return a teacher's data, decoded by the model's own pipeline or VAE, as the real images."""
    import torch

    from rectified_diffusers.data.dataset import TripletDataset
    from rectified_diffusers.data.real_images import RealPictures
    from rectified_diffusers.digests import digest_of
    from rectified_diffusers.models.any_pipeline import PipelineDenoiser
    from rectified_diffusers.models.denoiser import Denoiser
    from rectified_diffusers.models.latents import unscale

    dataset, vae = TripletDataset(folder), pipeline.vae
    manifest = dataset.manifest
    denoiser = Denoiser.of(pipeline) if "call_options" in manifest.settings else None
    generic = denoiser if isinstance(denoiser, PipelineDenoiser) else None
    if generic is not None and generic.latent_shape != manifest.latent_shape:
        raise CommandError(
            f"the triplets have latents {manifest.latent_shape}, images of the default size of "
            f"{type(pipeline).__name__}, which evaluate generates, {generic.latent_shape}; make triplets of that size"
        )

    @torch.no_grad()
    def read(numbers: Any) -> Any:
        parts = []
        for latents in dataset.rows(numbers).data.split(config.batch_size):
            if generic is not None:
                images = generic.decode_pixels(latents.to(generic.network.device))
            else:
                images = vae.decode(unscale(vae, latents.to(vae.device, vae.dtype))).sample
            parts.append(((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8))
        return torch.cat(parts)

    captions: list[str] = []
    for first in range(0, len(dataset), 1024):
        captions += dataset.rows(range(first, min(first + 1024, len(dataset)))).prompts
    identity = digest_of(dataset.manifest.settings)
    return RealPictures(captions, [config.seen_split] * len(captions), [""] * len(captions), identity, read)


def _transport_cost(folder: Path, pairs: int) -> dict[str, Interval]:
    """Return the transport cost of triplets, over `pairs` of them at equal distances in the folder."""
    from rectified_diffusers.data.dataset import TripletDataset
    from rectified_diffusers.evaluation.metrics import transport_cost

    dataset = TripletDataset(folder)
    count = min(pairs, len(dataset))
    rows = dataset.rows([number * len(dataset) // count for number in range(count)])
    return transport_cost(rows.noise, rows.data)
