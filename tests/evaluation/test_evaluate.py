import json
import shutil

import pytest
import torch
from PIL import Image

from rectified_diffusers import cli
from rectified_diffusers.cli.evaluate import _image_size
from rectified_diffusers.cli.shared import CommandError
from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.generate import generate_triplets
from rectified_diffusers.data.real_images import choose, read_pictures
from rectified_diffusers.evaluation import gallery as drawing
from rectified_diffusers.evaluation.config import EvaluationConfig
from rectified_diffusers.evaluation.evaluate import CACHE, evaluate
from rectified_diffusers.evaluation.metrics import frechet_distance, squared_discrepancy
from rectified_diffusers.evaluation.report import Evaluation
from rectified_diffusers.evaluation.scorers import inception_scorer, mobilenet_scorer
from tests.tiny import make_tiny_pipeline
from tests.tiny_inputs import SIZE

SMALL = {
    "num_pictures": 6,
    "seeds": (0,),
    "diversity_prompts": 2,
    "diversity_pictures": 2,
    "straightness_prompts": 0,
}
STRAIGHT = {"straightness_prompts": 2, "straightness_steps": 4, "straightness_bins": 2}


@pytest.fixture
def draws(monkeypatch):
    """Count the pictures that are drawn; the timed ones are not."""
    counted = []
    original = drawing.Sampler.sample

    def draw(self, prompts, seeds):
        counted.extend(seeds)
        return original(self, prompts, seeds)

    monkeypatch.setattr(drawing.Sampler, "sample", draw)
    monkeypatch.setattr(drawing.Sampler, "seconds_per_image", lambda self, prompts: 0.5)
    return counted


def run(data, folder, kind="flow", name="model", **options):
    config = EvaluationConfig(**{**SMALL, **options})
    return evaluate(make_tiny_pipeline(kind), read_pictures(data, SIZE), folder, config, name, progress=False)


def test_every_figure_is_there(data, pooled, draws, alignment, sentence_encoder, tmp_path):
    judge = {"alignment": alignment, "sentence_encoder": str(sentence_encoder)}
    report = run(data, tmp_path, steps=(1, 2), seeds=(0, 1), **judge, **STRAIGHT)
    of_both = {
        f"{figure}_{part}"
        for figure in ("frechet_distance", "kernel_distance", "alignment")
        for part in ("seen", "held_out", "held_out_new")  # "two dogs" has words of no other caption
    }
    one, two = report.rows
    assert set(one.figures) == {*of_both, "diversity"} == set(report.real)
    assert set(two.figures) == {*of_both, "diversity", "straightness"}
    assert len(two.per_bin) == 2
    assert two.figures["straightness"].mean == pytest.approx(sum(two.per_bin) / 2)
    assert all(len(interval.values) == 2 for interval in one.figures.values())
    assert len(report.real["alignment_seen"].values) == 1  # of the whole style that the judge has not seen
    assert one.figures["frechet_distance_seen"].mean > report.real["frechet_distance_seen"].mean
    assert Evaluation.read(tmp_path) == report
    assert len(report.prompts) == 3
    assert report.captions == {"held_out_known": 0, "held_out_new": 1}
    for figures in (one.figures, report.real):  # three captions, thus three groups
        assert all(figures[key].over_images for key in ("kernel_distance_seen", "frechet_distance_seen"))
    assert two.figures["straightness"].over_images is None


def test_the_figures_are_those_of_the_pictures(data, pooled, draws, tmp_path):
    report = run(data, tmp_path, seeds=(3,))
    pictures = read_pictures(data, SIZE)
    choice = choose(pictures, "train", 6, seed=3)
    drawer = drawing.Sampler(drawing.for_evaluation(make_tiny_pipeline("flow")), 1, 1.0)
    drawn = drawer.sample(choice.prompts, [f"3/seen/{i}" for i in range(6)])
    statistics = [pooled(images) for images in (drawn, pictures.read(choice.reference))]
    assert report.rows[0].figures["frechet_distance_seen"].mean == pytest.approx(frechet_distance(*statistics))
    statistics[0] = pooled(pictures.read(choice.floor))
    assert report.real["frechet_distance_seen"].mean == pytest.approx(frechet_distance(*statistics))


def test_a_killed_run_goes_on_and_ends_alike(data, pooled, draws, monkeypatch, tmp_path):
    whole = run(data, tmp_path / "whole", steps=(1, 2))
    drawn = len(draws)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(drawing.Sampler, "seconds_per_image", fail)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "cut", steps=(1, 2))
    resumed = run(data, tmp_path / "cut", steps=(1, 2))
    assert len(draws) == 2 * drawn  # nothing twice
    assert (resumed.rows, resumed.real) == (whole.rows, whole.real)
    seen = pooled.seen
    run(data, tmp_path / "cut", steps=(1, 2))
    assert (len(draws), pooled.seen) == (2 * drawn, seen)
    shutil.rmtree(tmp_path / "cut" / CACHE)
    assert run(data, tmp_path / "cut", steps=(1, 2)).rows == whole.rows


def test_replaced_pictures_of_equal_size_are_measured_anew(data, pooled, draws, tmp_path):
    """Their statistics are in the cache; the folder's table is for other pictures, and is refused."""
    pictures = tmp_path / "pictures"
    shutil.copytree(data, pictures)
    run(pictures, tmp_path / "out")
    for path in pictures.rglob("*.png"):
        size = path.stat().st_size
        Image.new("RGB", Image.open(path).size, "red").save(path)
        with path.open("ab") as file:
            file.truncate(size)  # zeros after the end of the image
    with pytest.raises(ValueError, match="pictures"):
        run(pictures, tmp_path / "out")
    (tmp_path / "out" / "evaluation.json").unlink()
    again, fresh = run(pictures, tmp_path / "out"), run(pictures, tmp_path / "fresh")
    assert (again.rows, again.real) == (fresh.rows, fresh.real)


def test_a_second_model_joins_the_table_and_other_settings_do_not(data, pooled, draws, tmp_path):
    run(data, tmp_path, **STRAIGHT)
    options = {"steps": (2,), "guidance_scale": 2.0, "batch_size": 2, **STRAIGHT}
    report = run(data, tmp_path, "diffusion", "teacher", **options)
    assert [row.key for row in report.rows] == [("model", 1, 1.0), ("teacher", 2, 2.0)]
    assert 0 < report.rows[1].edges[0] < 0.1  # where the schedule of the diffusion model begins
    with pytest.raises(ValueError, match="num_pictures=6, got num_pictures=5"):
        run(data, tmp_path, num_pictures=5, **STRAIGHT)


WORDS = [
    {"text": "a red apple", "split": "train", "tags": ["fruit", "red"]},
    {"text": "the sea", "split": "train", "tags": ["water"]},
    {"text": "red water", "split": "caption"},
    {"text": "red fruit", "split": "caption"},
    {"text": "a blue sea", "split": "caption"},
]


def test_held_out_captions_are_split_by_their_words(data, pooled, draws, tmp_path):
    """Words of tags count as seen. The distances of each kind are those of its images alone."""
    (tmp_path / "data").mkdir()
    lines = [{**line, "file_name": f"{number}-{i}.png"} for number, line in enumerate(WORDS) for i in range(6)]
    for line in lines:
        name = line["file_name"]
        shutil.copy(data / f"{int(name[0]) % 4}{name[1:]}", tmp_path / "data" / name)
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run(tmp_path / "data", tmp_path, seeds=(3,))
    assert report.captions == {"held_out_known": 2, "held_out_new": 1}
    pictures = read_pictures(tmp_path / "data", SIZE)
    choice = choose(pictures, "caption", None, seed=3)
    drawer = drawing.Sampler(drawing.for_evaluation(make_tiny_pipeline("flow")), 1, 1.0)
    drawn = pooled(drawer.sample(choice.prompts, [f"3/held_out/{i}" for i in range(9)]))
    real, floor = (pooled(pictures.read(numbers)) for numbers in (choice.reference, choice.floor))
    for part, expected in (("held_out_known", {"red water", "red fruit"}), ("held_out_new", {"a blue sea"})):
        own = [i for i, prompt in enumerate(choice.prompts) if prompt in expected]
        found = report.rows[0].figures[f"kernel_distance_{part}"].mean
        assert found == pytest.approx(squared_discrepancy(drawn[own], real[own]))
        found = report.real[f"frechet_distance_{part}"].mean
        assert found == pytest.approx(frechet_distance(floor[own], real[own]))
    text = report.as_markdown()
    assert "2 with all words seen in training (known words), 1 with a word never seen in training" in text
    assert "kernel, held out, known words" in text


def test_an_evaluation_of_an_earlier_version_is_read_and_continued(data, pooled, draws, tmp_path):
    """It has neither intervals over images nor parts by words; its floors are measured again, its rows stay."""
    report = run(data, tmp_path, name="new")
    path = tmp_path / "evaluation.json"
    old = json.loads(path.read_text())
    for name in ("reference", "captions", "coupling"):
        del old[name]
    for figures in (old["real"], old["rows"][0]["figures"]):
        del figures["kernel_distance_held_out_new"], figures["frechet_distance_held_out_new"]
        for figure in figures.values():
            del figure["deviations"]
    del old["rows"][0]["trainings"]
    old["rows"][0]["name"] = "old"
    path.write_text(json.dumps(old))
    assert "± " not in Evaluation.read(tmp_path).as_markdown().partition("± is")[0]
    again = run(data, tmp_path, name="new")
    assert (again.real, again.captions) == (report.real, report.captions)
    assert [row.name for row in again.rows] == ["old", "new"]
    assert again.rows[0].figures["kernel_distance_seen"].deviations == ()
    assert again.rows[1] == report.rows[0]


def test_figures_can_be_left_out(data, pooled, draws, tmp_path):
    report = run(data, tmp_path, steps=(2,), diversity_prompts=0, held_out_split="none")
    assert set(report.rows[0].figures) == {"frechet_distance_seen", "kernel_distance_seen"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-flow"
    make_tiny_pipeline("flow").save_pretrained(folder)
    return str(folder)


ARGUMENTS = ["--device", "cpu", "--seeds", "0", "--num-pictures", "6", "--diversity-prompts", "2"]
CURVED = ["--straightness-prompts", "2", "--straightness-steps", "10", "--steps", "1", "2"]


def test_the_command_prints_the_table_and_draws_the_plots(data, model, pooled, tmp_path, capsys):
    output = ["--output-dir", str(tmp_path), "--plots"]
    assert cli.main(["evaluate", "--model", model, "--data", str(data), *output, *ARGUMENTS, *CURVED]) == 0
    report = Evaluation.read(tmp_path)
    assert capsys.readouterr().out == report.as_markdown()
    assert {row.key for row in report.rows} == {("tiny-flow", 1, 1.0), ("tiny-flow", 2, 1.0)}
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {"trajectories.png", "straightness.png", "grid.png", "quality.png"}


def test_triplets_can_stand_for_the_real_pictures(model, pooled, tmp_path):
    teacher = make_tiny_pipeline("flow")
    config = TripletConfig(num_triplets=12, num_inference_steps=2, guidance_scale=1.0, triplets_per_shard=8)
    dataset = generate_triplets(teacher, ["a cat", "the sea"], tmp_path / "triplets", config, progress=False)
    output = ["--output-dir", str(tmp_path / "out"), "--triplets", str(dataset.folder), "--name", "the same"]
    assert cli.main(["evaluate", "--model", model, *output, *ARGUMENTS, "--straightness-prompts", "0"]) == 0
    report = Evaluation.read(tmp_path / "out")
    assert report.rows[0].name == "the same"
    data = dataset.rows([0]).data
    with torch.no_grad():
        decoded = teacher.vae.decode(data / teacher.vae.config.scaling_factor).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    from rectified_diffusers.cli.evaluate import _images_of_triplets

    pictures = _images_of_triplets(dataset.folder, teacher, EvaluationConfig())
    assert torch.equal(pictures.read([0]), expected)
    assert pictures.captions == ["a cat", "the sea"] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "no folder 'nowhere'"),
        (["--data", ".", "--triplets", "."], "give either --data or --triplets"),
        ([], "real images are required from one source"),
        (["--data", ".", "--steps", "0"], "steps must be one or more"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    assert cli.main(["evaluate", "--output-dir", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "judge",
    [
        lambda folder: mobilenet_scorer(folder / "none.safetensors", 64, "cpu", False),
        lambda folder: inception_scorer(folder, "cpu", False),
    ],
    ids=["mobilenet", "inception"],
)
def test_weights_that_are_not_there_are_told_at_once(judge, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No weights at .*: expected a safetensors file"):
        judge(tmp_path)


def test_a_model_of_pictures_that_are_not_square_is_refused():
    pipeline = make_tiny_pipeline("flow")
    assert _image_size(pipeline) == SIZE
    pipeline.unet.register_to_config(sample_size=(8, 16))
    with pytest.raises(CommandError, match=r"the model generates 8x16 latents; .* evaluate needs square images"):
        _image_size(pipeline)
