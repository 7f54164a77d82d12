"""The scripts of the tables, at a tiny scale."""

import argparse
import importlib
import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from rectified_diffusers.data.dataset import TripletDataset
from tests.tiny import make_tiny_pipeline
from tests.tiny_inputs import CAPTIONS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """Scripts as modules: table and ablation; they import each other from their folder, as they do when run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    modules = [importlib.import_module(name) for name in ("table", "ablation")]
    yield modules
    for name in ("table", "ablation", "finish"):
        sys.modules.pop(name, None)


@pytest.fixture
def arguments(data, sentence_encoder, alignment, backbone, tmp_path):
    """The arguments of a run from a tiny teacher, with as small weights as the scripts want to find."""
    make_tiny_pipeline("diffusion").save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "minilm").symlink_to(sentence_encoder)
    (weights / "lpips_alexnet.safetensors").symlink_to(backbone)
    folders = {"teacher": tmp_path / "teacher", "data": data, "prompts": tmp_path / "prompts.txt", "weights": weights}
    folders |= {"alignment": alignment, "work": tmp_path / "work", "output": tmp_path / "results" / "table"}
    return [text for name, folder in folders.items() for text in (f"--{name}", str(folder))]


def test_every_row_has_the_whole_budget(scripts):
    table, ablation = scripts
    for line in [*table.ROWS.values(), *ablation.lines_of(list(ablation.VARIANTS)).values()]:
        assert sum(stage.share for stage in line.stages) in ((1,) if line.stages else (0,)), line


def test_the_variants_change_what_they_name(scripts):
    _, ablation = scripts
    lines = ablation.lines_of(["time density", "distillation loss", "EMA", "triplets"])
    reflow, l2, lpips = lines["base"].stages
    assert (reflow.method, l2.options, lpips.options) == ("reflow", {"loss": "l2"}, {"loss": "lpips"})
    assert lines["time density: U-shaped"].stages == (
        type(reflow)("reflow", Fraction(1, 2), {"time_density": "u_shaped"}),
        l2,
        lpips,
    )
    assert [stage.options["loss"] for stage in lines["distillation loss: LPIPS-Huber"].stages[1:]] == [
        "lpips_huber"
    ] * 2
    assert all(stage.options["ema_decay"] == 0.9 for stage in lines["EMA: 0.9"].stages)
    assert lines["triplets: twice as many"].triplets == 2
    pairs = ablation.lines_of(["real pairs"])
    assert [line.real for line in pairs.values()] == [0, Fraction(1, 4)]
    assert all(line.stages == lines["base"].stages for line in pairs.values())


def test_a_variant_that_is_the_base_has_no_row(scripts):
    _, ablation = scripts
    for asked, other in (("weights", "equal signal-to-noise"), ("snr_matching", "the teacher's weights")):
        assert list(ablation.lines_of(["initialisation"], asked)) == ["base", f"initialisation: {other}"]


def test_rows_begin_as_is_asked(scripts):
    table, _ = scripts
    lines = {name: table.begun(line, "snr_matching", "epsilon") for name, line in table.ROWS.items()}
    assert all(table.begun(line, "weights", "epsilon") == line for line in table.ROWS.values())
    assert [stage.options.get("initialisation") for stage in lines["3rf-distill"].stages] == [
        "snr_matching",
        *[None] * 3,
    ]
    assert lines.pop("stacked-distill") == table.ROWS["stacked-distill"]
    assert all(line.stages[0].options["initialisation"] == "snr_matching" for line in lines.values() if line.stages)
    stacked = table.begun(table.ROWS["stacked-distill"], "snr_matching", "v_prediction")
    assert stacked.stages[0].options["initialisation"] == "snr_matching"


def test_a_teacher_whose_config_leaves_the_prediction_type_out_predicts_epsilon(
    scripts, arguments, monkeypatch, tmp_path
):
    """As diffusers reads it: the schedulers of Stable Diffusion 1.5's time say nothing of it."""
    table, _ = scripts
    path = tmp_path / "teacher" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["prediction_type"]
    path.write_text(json.dumps(config))
    lines = table_of(table, arguments, monkeypatch, table.ROWS, "--initialisation", "snr_matching").lines
    assert lines["stacked-distill"] == table.ROWS["stacked-distill"]
    assert lines["2rf-1"].stages[0].options["initialisation"] == "snr_matching"


def test_a_finish_costs_what_it_takes_from_the_stages_before_it(scripts):
    table, ablation = scripts
    base, line, with_real = ablation.lines_of(["distribution-matching finish"]).values()
    *before, finish = line.stages
    assert [stage.share for stage in before] == [Fraction(3, 4) * stage.share for stage in base.stages]
    assert [stage.options for stage in before] == [stage.options for stage in base.stages]
    assert (finish.method, finish.share, finish.cost) == ("dmd", Fraction(1, 4), Fraction(26, 3))
    whole = argparse.Namespace(budget=argparse.Namespace(steps=10_400))
    assert table.Table.steps(whole, finish) == 300
    assert (with_real.stages[-1].discriminator, with_real.stages[-1].cost) == (True, Fraction(44, 3))


def test_students_of_few_steps_have_the_budget_of_one_step(scripts):
    table, _ = scripts
    for steps, passes in ((1, 26), (2, 26 + 3), (4, 26 + 9)):
        name = "2rf-distill-dmd" + (f"-{steps}" if steps > 1 else "")
        line, finish = table.ROWS[name], table.ROWS[name].stages[-1]
        assert (line.steps, sum(stage.share for stage in line.stages)) == (steps, 1)
        assert finish.cost == Fraction(passes, 3)
        later = [stage.options.get("student_steps", 1) for stage in line.stages[1:]]
        assert later == [steps] * 3
        assert "student_steps" not in line.stages[0].options  # one reflow for all of them
    assert table.ROWS["2rf-distill-4"].stages[1].options == {"loss": "l2", "student_steps": 4}


def table_of(table, arguments, monkeypatch, lines, *more, start=None):
    parser = argparse.ArgumentParser()
    table.add_arguments(parser, "table")
    monkeypatch.setattr(sys, "argv", ["script", *arguments, "--budget", "tiny", "--mixed-precision", "no", *more])
    return table.Table(table.parsed(parser), lines, start)


def test_the_network_evaluations_of_a_row_are_counted(scripts, arguments, monkeypatch):
    """Tiny: 12 steps of 4, of a forward pass and a backward that counts as two; 16 triplets of 4 guided steps."""
    table, ablation = scripts
    lines = table.ROWS | ablation.lines_of(["distillation triplets"])
    made = table_of(table, arguments, monkeypatch, lines)
    of_line = {name: (made.evaluations(line), made.evaluations_for_triplets(line)) for name, line in lines.items()}
    assert of_line["teacher-8"] == (0, 0)
    assert of_line["2rf-1"] == (12 * 4 * 3, 16 * 4 * 2)
    assert of_line["2rf-distill"] == of_line["base"] == (12 * 4 * 3, 2 * 16 * 4 * 2)
    assert of_line["3rf-distill"] == (12 * 4 * 3, 3 * 16 * 4 * 2)
    assert of_line["distillation triplets: the teacher's, as for reflow"] == (12 * 4 * 3, 16 * 4 * 2)
    assert of_line["2rf-distill-dmd"][0] == (4 + 2 + 2) * 4 * 3 + 4 * 26  # 12 / 4 steps make no whole update: one
    # Three rounds of 4 steps, each with two steps of the teacher; those of the first round are guided.
    assert of_line["progressive-4"][0] == 4 * (3 * 4 * (3 + 2) + 4 * 2)


def test_distillation_can_have_the_triplets_of_reflow(scripts):
    table, ablation = scripts
    base, reused = ablation.lines_of(["distillation triplets"]).values()
    assert base.stages == reused.stages
    sources = [[table.Table.source(line, line.stages[:i]) for i in (1, 2, 3)] for line in (base, reused)]
    assert sources == [[(), base.stages[:1], base.stages[:1]], [(), (), ()]]


def test_rows_start_from_a_given_model(scripts, arguments, monkeypatch, tmp_path):
    """Its triplets are still those of the teacher."""
    table, _ = scripts
    finish = importlib.import_module("finish")
    assert {sum(stage.share for stage in stages) for stages in finish.TRIALS.values()} == {0, 1}
    lines = {name: table.Line(name, stages, 1) for name, stages in finish.TRIALS.items()}
    made = table_of(table, arguments, monkeypatch, lines, start=tmp_path / "model")
    line = lines["L2"]
    assert made.train(line, (), 0) == tmp_path / "model"
    asked = []

    def generate_triplets(pipeline, prompts, folder, config):
        asked.append(pipeline)
        folder.mkdir(parents=True)

    monkeypatch.setattr(table, "generate_triplets", generate_triplets)
    monkeypatch.setattr(made, "load", lambda folder: folder)
    made.triplets(line, made.source(line, line.stages), 0)
    assert asked == [tmp_path / "teacher"]


def test_a_finish_needs_a_finished_model(scripts, arguments, monkeypatch, capsys):
    """The teacher, where the rows of table.py start, is none."""
    finish = importlib.import_module("finish")
    with pytest.raises(SystemExit):
        run(finish, arguments, monkeypatch)
    assert "the following arguments are required: --model" in capsys.readouterr().err


@pytest.mark.very_slow
def test_finishes_are_tried(scripts, arguments, tiny_pictures, monkeypatch, tmp_path):
    make_tiny_pipeline().save_pretrained(tmp_path / "model")
    finish = importlib.import_module("finish")
    trials = ["as it is", "LPIPS", "matching, regression"]
    more = ["--model", str(tmp_path / "model"), "--trials", *trials, "--seeds", "0"]
    found, text = run(finish, arguments, monkeypatch, *more)
    assert [row["name"] for row in found["rows"]] == trials
    assert tiny_pictures == ["distill", "dmd"]
    assert "network evaluations" in text


@pytest.mark.very_slow
def test_students_of_few_steps_are_made(scripts, arguments, tiny_pictures, monkeypatch):
    rows = ["--rows", "2rf-distill-2", "2rf-distill-dmd-2", "--seeds", "0"]
    found, _ = run(scripts[0], arguments, monkeypatch, *rows)
    assert [row["steps"] for row in found["rows"]] == [2, 2]
    assert tiny_pictures == ["reflow", "distill", "distill", "reflow", "distill", "distill", "dmd"]


def run(module, arguments, monkeypatch, *more):
    tiny = ["--budget", "tiny", "--num-pictures", "4", "--mixed-precision", "no", *more]
    monkeypatch.setattr(sys, "argv", ["script", *arguments, *tiny])
    module.main()
    output = Path(arguments[arguments.index("--output") + 1])
    return json.loads(output.with_suffix(".json").read_text()), output.with_suffix(".md").read_text()


@pytest.fixture
def tiny_pictures(monkeypatch, scripts, pooled):
    (_, ablation), counted = scripts, []
    monkeypatch.setattr("rectified_diffusers.evaluation.gallery.Sampler.seconds_per_image", lambda self, prompts: 0.5)
    original = scripts[0].Table.train_stage

    def train_stage(self, stage, *rest):
        counted.append(stage.method)
        return original(self, stage, *rest)

    monkeypatch.setattr(scripts[0].Table, "train_stage", train_stage)
    monkeypatch.setattr(ablation, "CRITERION", "frechet_distance_seen")
    return counted


@pytest.mark.slow
def test_a_table_is_made_and_made_again_from_what_is_there(scripts, arguments, tiny_pictures, monkeypatch):
    rows = ["--rows", "teacher-8", "2rf-1", "--seeds", "0", "1"]
    found, _ = run(scripts[0], arguments, monkeypatch, *rows)
    assert [(row["name"], row["steps"]) for row in found["rows"]] == [
        ("diffusion teacher, DPM-Solver++", 8),
        ("2-RF", 1),
    ]
    assert all(len(row["figures"]["frechet_distance_seen"]["values"]) == 2 for row in found["rows"])
    assert found["settings"]["seeds"] == [0, 1]
    assert tiny_pictures == ["reflow", "reflow"]
    again, _ = run(scripts[0], arguments, monkeypatch, *rows)
    assert tiny_pictures == ["reflow", "reflow"]
    assert again["rows"] == found["rows"]


@pytest.mark.very_slow
def test_every_kind_of_row_can_be_made(scripts, arguments, tiny_pictures, monkeypatch):
    rows = ["--rows", "teacher-8", "2rf-1", "progressive-4", "stacked-distill", "--seeds", "0"]
    rows += ["--initialisation", "snr_matching"]
    found, text = run(scripts[0], arguments, monkeypatch, *rows)
    assert [(row["name"], row["steps"]) for row in found["rows"]] == [
        ("diffusion teacher, DPM-Solver++", 8),
        ("2-RF", 1),
        ("progressive distillation", 4),
        ("2-RF + distillation, stacked U-Net", 1),
    ]
    # 12 steps of 4: two U-Nets cost twice, so that the last stages of the stacked one have half of their 3 + 3
    assert [row["optimizer_steps"] for row in found["costs"]] == [[], [12], [12], [6, 1, 1]]
    assert "progressive {'initialisation': 'snr_matching', 'teacher_steps': 32" in text
    assert tiny_pictures == ["reflow", "progressive", "reflow", "distill", "distill"]


def test_real_pairs_take_their_share_of_the_triplets(scripts, arguments, monkeypatch):
    table, ablation = scripts
    # From so near to the noise, an untrained flow, too, leads to white noise.
    of_table = table_of(table, arguments, monkeypatch, {}, "--inversion-time", "0.065")
    lines = ablation.lines_of(["real pairs"])
    folders = of_table.triplets(lines["real pairs: a quarter of the triplets"], (), 0)
    assert [len(TripletDataset(folder)) for folder in folders] == [12, 4]
    whole = of_table.triplets(lines["base"], (), 0)
    assert [len(TripletDataset(folder)) for folder in whole] == [16]
    for module in ("generate_triplets", "generate_real_triplets"):
        monkeypatch.delattr(table, module)  # nothing is made again
    assert of_table.triplets(lines["real pairs: a quarter of the triplets"], (), 0) == folders


@pytest.mark.very_slow
def test_a_finish_is_run(scripts, arguments, tiny_pictures, monkeypatch):
    # From so near to the noise, an untrained flow, too, leads to white noise.
    kind = ["--kinds", "distribution-matching finish", "--inversion-time", "0.065"]
    found, text = run(scripts[1], arguments, monkeypatch, *kind, "--seeds", "0")
    assert [row["name"].split(": ")[0] for row in found["rows"]][:3] == ["base"] + ["distribution-matching finish"] * 2
    assert tiny_pictures.count("dmd") == 2
    assert "dmd {}" in text


@pytest.mark.very_slow
def test_an_ablation_is_run(scripts, arguments, tiny_pictures, monkeypatch):
    found, _ = run(scripts[1], arguments, monkeypatch, "--kinds", "prompt dropout", "EMA", "--seeds", "0")
    names = [row["name"] for row in found["rows"]]
    assert names[:4] == ["base: 2-RF + distillation", "prompt dropout: none", "EMA: none", "EMA: 0.9"]
    assert len(tiny_pictures) >= 4 * 3


def test_the_best_of_each_kind_are_combined(scripts):
    names = ["base: 2-RF + distillation", "prompt dropout: none", "EMA: none", "EMA: 0.9"]
    report = argparse.Namespace(rows=[])
    for name, value in zip(names, (5.0, 4.0, 6.0, 3.0), strict=True):
        figures = {"frechet_distance_seen": argparse.Namespace(mean=value)}
        report.rows.append(argparse.Namespace(name=name, figures=figures))
    together = scripts[1].best_together(report, ["prompt dropout", "EMA"])
    assert together.name == "together: prompt dropout none, EMA 0.9"
    assert together.stages[0].options == {"ema_decay": 0.9, "prompt_dropout": 0.0}
    assert scripts[1].best_together(report, ["EMA"]) is None


def test_of_kinds_that_change_the_same_option_the_better_is_combined(scripts):
    distances = {
        "base: 2-RF + distillation": 5.0,
        "lengths of L2 and LPIPS: LPIPS from the start": 4.0,
        "distillation loss: pseudo-Huber, then LPIPS": 3.0,
        "EMA: 0.9": 4.5,
    }
    figures = {name: {"frechet_distance_seen": argparse.Namespace(mean=value)} for name, value in distances.items()}
    report = argparse.Namespace(rows=[argparse.Namespace(name=name, figures=figures[name]) for name in figures])
    together = scripts[1].best_together(report, ["lengths of L2 and LPIPS", "distillation loss", "EMA"])
    assert together.name == "together: distillation loss pseudo-Huber, then LPIPS, EMA 0.9"
    assert [stage.options.get("loss") for stage in together.stages] == [None, "pseudo_huber", "lpips"]
    assert scripts[1].best_together(report, ["lengths of L2 and LPIPS", "distillation loss"]) is None
