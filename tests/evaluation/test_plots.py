import sys

import numpy as np
import pytest
import torch

from rectified_diffusers.evaluation.intervals import interval_of
from rectified_diffusers.evaluation.plots import (
    plot_grid,
    plot_quality,
    plot_straightness,
    plot_trajectories,
    write_plots,
)
from rectified_diffusers.evaluation.report import Evaluation, Row
from rectified_diffusers.evaluation.straightness import Trajectories

pytest.importorskip("matplotlib")


def row(name, steps, values=(1.0, 2.0)):
    return Row(name, steps, 1.0, "", {"kernel_distance_seen": interval_of(values)}, 0.1)


def test_trajectories_are_drawn_with_their_chords():
    t = torch.linspace(0, 1, 3)
    path = Trajectories(t, torch.rand(3, 4), torch.rand(3, 2))
    figure = plot_trajectories({"a": path, "b": path})
    assert len(figure.axes) == 4
    lines = figure.axes[0].get_lines()
    assert len(lines) == 8
    chord, curve = (np.asarray(line.get_ydata()) for line in lines[:2])
    assert list(curve) == path.latents[:, 0].tolist()
    assert [float(value) for value in chord] == [curve[0], curve[2]]
    assert [axis.get_title() for axis in figure.axes[:2]] == ["a", "b"]


def test_straightness_is_labelled_with_its_integral():
    figure = plot_straightness({"a": ((1.0, 2.0), (0.0, 0.5, 1.0)), "b": ((1.0, 3.0), (0.2, 0.6, 1.0))})
    legend = figure.axes[0].get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["a: S = 1.5", "b: S = 1.6"]


def test_the_grid_has_a_row_per_model():
    pictures = {name: torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8) for name in ("a", "b")}
    figure = plot_grid(pictures, ["one", "two", "three"])
    assert len(figure.axes) == 6
    assert [axis.get_title() for axis in figure.axes] == ["one", "two", "three", "", "", ""]
    assert (figure.axes[3].get_images()[0].get_array() == pictures["b"][0].permute(1, 2, 0).numpy()).all()


def test_quality_has_a_curve_per_model_in_the_order_of_steps():
    real = {"kernel_distance_seen": interval_of([0.5])}
    report = Evaluation({}, real, (), (row("a", 4, (1.0, 3.0)), row("b", 1), row("a", 1, (5.0, 5.0))))
    figure = plot_quality(report)
    curve = figure.axes[0].containers[0].lines[0]
    assert list(curve.get_ydata()) == [5, 2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["real pictures", "a", "b"]


def test_what_there_are_no_figures_for_is_left_out(tmp_path):
    Evaluation({"seeds": [0], "num_pictures": 2, "features": ""}, {}, ("a",), (row("a", 1),)).write(tmp_path)
    assert [path.name for path in write_plots(tmp_path)] == ["quality.png"]


def test_without_matplotlib_the_plots_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install .rectified_diffusers\[evaluation\]"):
        plot_straightness({})
