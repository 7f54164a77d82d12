import json

import pytest

from rectified_diffusers.evaluation.intervals import interval_of
from rectified_diffusers.evaluation.report import FILE, TABLE, Evaluation, Row

SETTINGS = {"seeds": [0, 1], "num_pictures": 10, "features": "pooled", "alignment": None, "candidates": None}


def row(name="model", steps=1, frechet=(20.0, 22.0), **changes):
    figures = {"frechet_distance_seen": interval_of(frechet)}
    return Row(name, steps, 1.0, "digest", figures, 0.25, **changes)


def test_what_is_written_is_read_again(tmp_path):
    straight = row(steps=4, per_bin=(0.1, 0.2), edges=(0.0, 0.5, 1.0), gallery="cache/a", trajectories="cache/b")
    real = {"frechet_distance_seen": interval_of([10.0, 10.5])}
    report = Evaluation(SETTINGS, real, ("a cat",)).with_row(row()).with_row(straight)
    report.write(tmp_path)
    assert Evaluation.read(tmp_path) == report
    assert Evaluation.open(tmp_path, {**SETTINGS, "seeds": (0, 1)}) == report
    assert json.loads((tmp_path / FILE).read_text())["rows"][0]["figures"]["frechet_distance_seen"]["mean"] == 21
    assert (tmp_path / TABLE).read_text() == report.as_markdown()
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, TABLE]


def test_the_floor_stands_beside_every_frechet_distance():
    real = {"frechet_distance_seen": interval_of([10.0]), "alignment_seen": interval_of([0.7])}
    lines = Evaluation(SETTINGS, real).with_row(row()).as_markdown().split("\n")
    assert lines[0] == "|  | steps | guidance | Frechet, seen | alignment, seen | s / image |"
    assert lines[2] == "| real pictures |  |  | 10.00 | 0.700 |  |"
    assert lines[3] == "| model | 1 | 1 | 21.00 ± 12.71 (floor 10.00) |  | 0.250 |"


def test_a_row_of_the_same_name_steps_and_guidance_is_replaced():
    report = Evaluation(SETTINGS).with_row(row()).with_row(row(steps=2)).with_row(row(frechet=(1.0, 1.0)))
    assert [(own.steps, own.figures["frechet_distance_seen"].mean) for own in report.rows] == [(1, 1), (2, 21)]


def test_other_settings_are_refused(tmp_path):
    Evaluation(SETTINGS).write(tmp_path)
    with pytest.raises(ValueError, match="num_pictures=10, got num_pictures=20"):
        Evaluation.open(tmp_path, {**SETTINGS, "num_pictures": 20})
    with pytest.raises(FileNotFoundError, match=r"there is no .*evaluation\.json"):
        Evaluation.read(tmp_path / "nothing")


def test_straightness_is_listed_per_bin():
    straight = row(steps=4, per_bin=(0.1, 0.2), edges=(0.05, 0.5, 1.0))
    text = Evaluation(SETTINGS).with_row(straight).as_markdown()
    assert "- model, guidance 1, t from 0.050: 0.1000, 0.2000" in text
