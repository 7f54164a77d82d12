"""Evaluation of any pipeline: metrics of its images, transport cost and straightness, or an error before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rectified_diffusers import cli
from rectified_diffusers.cli.evaluate import _image_size, _images_of_triplets
from rectified_diffusers.cli.shared import CommandError
from rectified_diffusers.data.real_images import RealPictures
from rectified_diffusers.evaluation import scorers
from rectified_diffusers.evaluation.config import EvaluationConfig
from rectified_diffusers.evaluation.evaluate import evaluate
from rectified_diffusers.evaluation.gallery import require_images
from rectified_diffusers.evaluation.report import Evaluation
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from tests.marks import slow_but
from tests.models_any.families import build
from tests.models_any.made_up import make_made_up_pipeline
from tests.models_any.test_training import make_triplets
from tests.training.helpers import TRAINERS

QUICK: dict[str, Any] = {"seeds": (0,), "num_pictures": 2, "diversity_prompts": 0}
PICTURES = RealPictures(["a cat"] * 4, ["train"] * 4, [""] * 4, "none", lambda numbers: torch.empty(0))


class Means(torch.nn.Module):
    """Cheap features in the place of MobileNetV2's."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1)


@pytest.mark.slow
def test_metrics_transport_cost_and_straightness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "mobilenet_scorer", lambda *args: scorers.Scorer("means", Means, False))
    pipeline, options = build("sd3")
    pipeline.save_pretrained(tmp_path / "model")
    dataset = make_triplets(pipeline, tmp_path / "triplets", options, num_triplets=8)
    arguments = ["--model", str(tmp_path / "model"), "--triplets", str(dataset.folder), "--device", "cpu"]
    arguments += ["--output-dir", str(tmp_path / "out"), "--seeds", "0", "--num-pictures", "4", "--steps", "1", "2"]
    arguments += ["--diversity-prompts", "0", "--straightness-prompts", "1", "--straightness-steps", "10"]
    assert cli.main(["evaluate", *arguments]) == 0
    report = Evaluation.read(tmp_path / "out")
    assert report.rows[0].figures.keys() == {"frechet_distance_seen", "kernel_distance_seen"}
    assert report.rows[1].figures["straightness"].mean > 0
    assert report.coupling["ratio"].mean > 0


@pytest.mark.parametrize("name", slow_but(["flux"], ["flux", "sd3"]))
def test_triplets_are_decoded_by_the_pipeline(name: str, tmp_path: Path) -> None:
    pipeline, options = build(name)
    dataset = make_triplets(pipeline, tmp_path, options, num_triplets=4)
    found = _images_of_triplets(dataset.folder, pipeline, EvaluationConfig()).read([1])
    noise = dataset.rows([1]).noise
    prompt = dataset.rows([1]).prompts[0]
    call = {"num_inference_steps": 3, "output_type": "pt", **options}
    expected = pipeline(prompt=prompt, latents=noise, **call)[0]
    assert (found.float() - 255 * expected.float()).abs().max() <= 1.5
    with pytest.raises(CommandError, match="make triplets of that size"):
        _images_of_triplets(dataset.folder, build("sd3" if name == "flux" else "flux")[0], EvaluationConfig())


def test_what_is_not_evaluated_is_refused_before_any_work(tmp_path: Path) -> None:
    def refused(pipeline: Any, reason: str, **options: Any) -> None:
        with pytest.raises(TypeError, match=reason):
            evaluate(pipeline, PICTURES, tmp_path, EvaluationConfig(**{**QUICK, **options}), "model")
        assert not list(tmp_path.iterdir())

    refused(build("ltx_video")[0], "evaluate compares images, and LTXPipeline generates videos")
    made_up: Any = make_made_up_pipeline()
    with pytest.raises(TypeError, match="evaluate passes prompt to a pipeline, which the call of MadeUpPipeline"):
        require_images(made_up)
    with pytest.raises(CommandError, match="the size of the images of MadeUpPipeline is not known"):
        _image_size(made_up)


def test_guidance_that_two_passes_do_not_repeat_has_no_straightness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PipelineDenoiser, "guides_by_two_passes", False)
    config = EvaluationConfig(**QUICK, steps=(2,), guidance_scale=3.0, straightness_prompts=1)
    with pytest.raises(ValueError, match="Two passes do not repeat the guidance of StableDiffusion3Pipeline"):
        evaluate(build("sd3")[0], PICTURES, tmp_path, config, "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", slow_but(["reflow", "dmd"], ["distill", "progressive", "reflow", "dmd"]))
def test_lpips_of_a_video_is_refused_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    pipeline, options = build("ltx_video")
    triplets = make_triplets(pipeline, tmp_path / "triplets", options)
    losses: dict[str, dict[str, Any]] = {
        "reflow": {"loss": "lpips_huber"},
        "dmd": {"regression_loss": "lpips", "regression_weight": 1.0},
    }
    trainer_class, config_class = TRAINERS[kind]
    config = config_class(output_dir=tmp_path / "run", **losses.get(kind, {"loss": "lpips"}))
    more: dict[str, Any] = {"teacher": pipeline} if kind == "dmd" else {}
    with pytest.raises(ValueError, match=r"LPIPS compares images \(B, 3, H, W\), got .* \(1, 5, 3.*LTXPipeline"):
        trainer_class(pipeline, triplets, config, **more)
    assert not (tmp_path / "run").exists()
