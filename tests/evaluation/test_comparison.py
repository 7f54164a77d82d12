"""Ratios to a reference model, several trainings, the transport cost of triplets, and a second implementation."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rectified_diffusers import cli
from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.generate import generate_triplets
from rectified_diffusers.data.real_images import choose, read_pictures
from rectified_diffusers.evaluation.comparison import mean_of_trainings
from rectified_diffusers.evaluation.config import ComparisonConfig, EvaluationConfig
from rectified_diffusers.evaluation.evaluate import CACHE, evaluate
from rectified_diffusers.evaluation.intervals import interval_of, ratio_of
from rectified_diffusers.evaluation.metrics import transport_cost
from rectified_diffusers.evaluation.report import Evaluation, Row
from rectified_diffusers.evaluation.tables import ratios
from tests.tiny import make_tiny_pipeline
from tests.tiny_inputs import SIZE

ARGUMENTS = ["--device", "cpu", "--seeds", "0", "--num-pictures", "6", "--diversity-prompts", "2"]
ARGUMENTS += ["--straightness-prompts", "0"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("rectified_diffusers.evaluation.gallery.Sampler.seconds_per_image", lambda self, prompts: 0.5)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student, the same trained with another seed, and their teacher."""
    folder = tmp_path_factory.mktemp("models")
    for name, kind in (("student", "flow"), ("again", "flow"), ("teacher", "diffusion")):
        pipeline = make_tiny_pipeline(kind)
        if name == "again":
            with torch.no_grad():
                pipeline.unet.conv_out.weight.mul_(1.5)
        pipeline.save_pretrained(folder / name)
    return folder


def run(models, data, folder, *arguments):
    model = ["--model", str(models / "student"), "--data", str(data), "--output-dir", str(folder)]
    assert cli.main(["evaluate", *model, *ARGUMENTS, *arguments]) == 0
    return Evaluation.read(folder)


def test_ratios_to_a_reference_model_are_printed(models, data, pooled, tmp_path, capsys):
    reference = ["--reference-model", str(models / "teacher"), "--reference-steps", "3"]
    report = run(models, data, tmp_path, *reference, "--reference-guidance-scale", "2")
    student, teacher = report.rows
    assert (student.key, teacher.key) == (("student", 1, 1.0), ("teacher", 3, 2.0))
    assert (report.reference, report.reference_row()) == (teacher.key, teacher)
    found = ratios(report, student)
    assert set(found) == set(student.figures)
    for key in ("kernel_distance_held_out", "frechet_distance_seen"):
        own, other, floor = (figures[key].mean for figures in (student.figures, teacher.figures, report.real))
        plain, corrected = found[key]
        assert plain is not None
        assert corrected is not None
        assert plain.mean == pytest.approx(own / other)
        assert corrected.mean == pytest.approx((own - floor) / (other - floor))
    assert found["diversity"][1] is None  # real images are no floor of it
    printed = capsys.readouterr().out
    assert printed == report.as_markdown()
    plain, corrected = (line for line in printed.splitlines() if "| plain |" in line or "| less the floor |" in line)
    assert "Ratios to teacher, 3 steps, guidance 2:" in printed
    cells = [
        f"{found[key][which]:.2f}" for which in (0, 1) for key in ("kernel_distance_held_out", "frechet_distance_seen")
    ]
    assert f"| {cells[0]} | {cells[1]} |" in plain
    assert f"| {cells[2]} | {cells[3]} |" in corrected
    assert run(models, data, tmp_path).reference == teacher.key  # a later model is compared with it too


def test_a_reference_of_the_same_name_is_refused_before_any_work(models, data, tmp_path, capsys):
    reference = ["--reference-model", str(models / "teacher"), "--reference-steps", "1", "--name", "teacher"]
    model = ["--model", str(models / "student"), "--data", str(data), "--output-dir", str(tmp_path)]
    assert cli.main(["evaluate", *model, *ARGUMENTS, *reference, "--reference-guidance-scale", "1"]) != 0
    assert "The reference model would replace the row 'teacher'" in capsys.readouterr().err
    assert not (tmp_path / CACHE).exists()


def test_several_trainings_are_one_row(models, data, pooled, tmp_path, capsys):
    report = run(models, data, tmp_path, "--repeats", str(models / "again"), "--name", "one-step")
    first, second, mean = report.rows
    assert [row.name for row in report.rows] == ["one-step", "one-step, training 2", "one-step, 2 trainings"]
    own = [row.figures["kernel_distance_seen"] for row in (first, second)]
    found = mean.figures["kernel_distance_seen"]
    assert (mean.trainings, found.values) == (2, (own[0].mean, own[1].mean))
    assert own[0].mean != own[1].mean
    assert found.half_width == interval_of([own[0].mean, own[1].mean]).half_width
    assert found.deviations == pytest.approx([(a + b) / 2 for a, b in zip(*(o.deviations for o in own), strict=True)])
    text = f"| one-step, 2 trainings | 1 | 1 | {found:.4f} (trainings ± {found.half_width:.4f}) |"
    assert text in capsys.readouterr().out


def test_trainings_of_several_seeds_count_as_one_value_each():
    values = [(1.0, 3.0), (4.0, 6.0)]
    rows = [
        Row("a", 4, 1.0, "", {"straightness": interval_of(of_seeds)}, seconds, (mean,), (0.0, 1.0), "gallery")
        for of_seeds, seconds, mean in zip(values, (0.1, 0.3), (2.0, 5.0), strict=True)
    ]
    mean = mean_of_trainings(rows, "a, 2 trainings")
    assert mean.figures == {"straightness": interval_of([2.0, 5.0])}
    assert (mean.per_bin, mean.edges, mean.gallery) == ((3.5,), (0.0, 1.0), "")


def test_a_reference_at_the_floor_has_no_ratio_above_it():
    figures = {"kernel_distance_seen": interval_of([0.2])}
    row, reference = Row("a", 1, 1.0, "", figures, 0.1), Row("b", 9, 1.0, "", figures, 0.1)
    settings = {"seeds": [0], "num_pictures": 2, "features": ""}
    report = Evaluation(settings, dict(figures), (), (row, reference), reference=reference.key)
    assert ratios(report, row) == {"kernel_distance_seen": (ratio_of(*[interval_of([0.2])] * 2), None)}
    assert "| a | 1 | 1 | plain | 1.00 |\n| a | 1 | 1 | less the floor |  |" in report.as_markdown()
    assert "Ratios" not in replace(report, reference=("c", 1, 1.0)).as_markdown()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_steps": 0}, "steps must be one or more"),
        ({"reference_guidance_scale": -1.0}, "guidance_scale must be"),
    ],
)
def test_wrong_options_of_the_reference_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ComparisonConfig(**options)


def test_the_transport_cost_of_triplets_is_printed(models, pooled, tmp_path, capsys):
    config = TripletConfig(num_triplets=12, num_inference_steps=2, guidance_scale=1.0, triplets_per_shard=8)
    dataset = generate_triplets(
        make_tiny_pipeline("flow"), ["a cat", "the sea"], tmp_path / "triplets", config, progress=False
    )
    arguments = ["evaluate", "--model", str(models / "student"), "--triplets", str(dataset.folder), *ARGUMENTS]
    assert cli.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    report = Evaluation.read(tmp_path / "out")
    rows = dataset.rows(range(12))
    assert report.coupling == transport_cost(rows.noise, rows.data)
    printed = capsys.readouterr().out
    assert f"per dimension: {report.coupling['coupled']:.4f}; independent coupling: " in printed
    fewer = ["--output-dir", str(tmp_path / "fewer"), "--transport-pairs", "3"]
    assert cli.main([*arguments, *fewer]) == 0
    rows = dataset.rows([0, 4, 8])
    assert Evaluation.read(tmp_path / "fewer").coupling == transport_cost(rows.noise, rows.data)
    assert cli.main([*arguments, "--output-dir", str(tmp_path / "none"), "--transport-pairs", "0"]) == 0
    assert Evaluation.read(tmp_path / "none").coupling == {}


def test_torch_fidelity_agrees_to_four_digits_on_the_same_features(data, pooled, tmp_path):
    """The distances of an evaluation are those of a second implementation on the features in its cache."""
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    config = EvaluationConfig(seeds=(0,), num_pictures=9, diversity_prompts=0, straightness_prompts=0)
    pictures = read_pictures(data, SIZE)
    report = evaluate(make_tiny_pipeline("flow"), pictures, tmp_path, config, "model", progress=False)
    generated = next((tmp_path / CACHE).glob("*-1-1/0-seen-*/000000.pooled.safetensors"))
    drawn, real = load_file(generated)["features"], pooled(pictures.read(choose(pictures, "train", 9, 0).reference))
    frechet = fid.fid_statistics_to_metric(
        *(fid.fid_features_to_statistics(features) for features in (drawn, real)), verbose=False
    )
    options = {"kid_subsets": 1, "kid_subset_size": 9, "kid_degree": 3, "kid_gamma": None, "kid_coef0": 1}
    kernel = kid.kid_features_to_metric(drawn, real, **options, rng_seed=0, verbose=False)
    figures = report.rows[0].figures
    assert figures["frechet_distance_seen"].mean == pytest.approx(next(iter(frechet.values())), rel=5e-5)
    assert figures["kernel_distance_seen"].mean == pytest.approx(kernel["kernel_inception_distance_mean"], rel=5e-5)
    stored = json.loads((tmp_path / "evaluation.json").read_text())["rows"][0]["figures"]
    assert stored["kernel_distance_seen"]["mean"] == figures["kernel_distance_seen"].mean
