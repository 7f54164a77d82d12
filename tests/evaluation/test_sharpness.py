"""The comparison of reflow and direct distillation on toys, rehearsed at a tiny size."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("sharpness", "sharpness_toys", "sharpness_figure", "machine")
KINDS = [("sharp", "new"), ("smooth", "matched"), ("smooth", "bare")]
METRICS = ("own_error", "teacher_error", "frechet", "sliced", "mode_distance")


@pytest.fixture(scope="module")
def scripts():
    """The script and its toys as modules; they import each other from their folder, as they do when run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield [importlib.import_module(name) for name in NAMES[:2]]
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def run(scripts):
    def run(folder):
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["script", "--small", *(f"--work={folder}/work --output={folder}/out".split())])
            scripts[0].main()
        torch.set_num_threads(threads)
        return json.loads((folder / "out.json").read_text())

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def test_the_rows_are_complete(scripts, whole):
    folder, found = whole
    rows = {(row["teacher"], row["start"], row["recipe"], row["steps"], row["learning_rate"]) for row in found["rows"]}
    settings = [(4, 2e-3), (8, 2e-3), (8, 6.7e-4), (8, 6e-3)]
    assert rows == {(*kind, recipe, *at) for kind in KINDS for recipe in scripts[0].RECIPES for at in settings}
    for row in found["rows"]:
        names = [*METRICS, *(f"{name}_ratio" for name in METRICS if row["recipe"] != "direct")]
        names += ["transport_cost", "flow_frechet"] if row["recipe"] == "2rf" else []
        assert all(len(row[name]["values"]) == 2 and row[name]["half_width"] is not None for name in names), row
    assert {"frechet", "sliced", "transport_cost", "transport_cost_independent"} < found["teachers"]["sharp"].keys()
    assert (folder / "out.png").exists()
    text = (folder / "out.md").read_text()
    assert all(words in text for words in ("commit: ", "hardware: ", "date: ", "command: "))


def test_recipes_have_equal_budgets(scripts, whole):
    size = scripts[0].SMALL
    for row in whole[1]["rows"]:
        generated = row["steps"] * size.batch_size // size.examples_per_pair * size.evaluations
        assert row["evaluations"] == generated + 3 * row["steps"] * size.batch_size, row


def test_the_evaluations_are_those_that_are_made(scripts, monkeypatch):
    """Counted where they happen: examples that go through a network or a teacher, three times where it is trained."""
    sharpness, toys = scripts
    counted = []
    network, mixture = toys.Network.forward, toys.Mixture.velocity

    def forward(self, x, time):
        counted.append(len(x) * (3 if torch.is_grad_enabled() else 1))
        return network(self, x, time)

    def velocity(self, x, t):
        counted.append(len(x))
        return mixture(self, x, t)

    monkeypatch.setattr(toys.Network, "forward", forward)
    monkeypatch.setattr(toys.Mixture, "velocity", velocity)
    size = sharpness.SMALL
    steps = 2 * size.chunk  # half of whose pairs fill whole chunks
    for recipe in sharpness.RECIPES:
        bench = sharpness.Bench(size, 0)
        bench.references("sharp")
        counted.clear()
        found = bench.run(sharpness.Cell(0, "sharp", "new", recipe, steps, 1e-3))
        measured = size.samples * (1 + (size.evaluations if recipe == "2rf" else 0))
        assert sum(counted) == found["evaluations"] + measured, recipe


def test_a_run_repeats_to_the_bit_and_a_killed_one_goes_on(scripts, whole, run, tmp_path, monkeypatch):
    original, count = scripts[0].Bench.run, []

    def killed(self, cell):
        if len(count) == 5:
            raise KeyboardInterrupt
        count.append(cell)
        return original(self, cell)

    monkeypatch.setattr(scripts[0].Bench, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(scripts[0].Bench, "run", lambda self, cell: count.append(cell) or original(self, cell))
    resumed = run(tmp_path)
    assert len(count) == len(set(count)) == 2 * len(resumed["rows"])
    assert all(resumed[key] == whole[1][key] for key in ("rows", "teachers", "size"))


def test_the_sharp_teacher_is_the_mean_velocity(scripts):
    """Against the posterior mean by Bayes' rule from its densities, mode by mode, in float64."""
    means = torch.randn(5, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    mixture, x = scripts[1].Mixture(means, 0.3), torch.randn(7, 3, dtype=torch.float64)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    for point, time, velocity in zip(x, t, mixture.velocity(x, t), strict=True):
        variance = (0.3 * time) ** 2 + (1 - time) ** 2
        density = torch.exp(-(point - time * means).square().sum(1) / (2 * variance))
        data = means + 0.09 * time / variance * (point - time * means)
        noise = (1 - time) / variance * (point - time * means)
        expected = (density[:, None] * (data - noise)).sum(0) / density.sum()
        torch.testing.assert_close(velocity, expected)


def test_the_metrics_in_closed_form(scripts):
    data = torch.randn(64, 8, generator=torch.manual_seed(0))
    assert scripts[0].relative_error(data.mean(0).expand_as(data), data) == pytest.approx(1)
    assert scripts[0].relative_error(data, data) == 0
    assert scripts[0].sliced_wasserstein(data, data[torch.randperm(64)], 16) == 0
    shifted = data + 3 * torch.ones(8)  # by 3 sqrt(8), of which a direction sees an eighth of the square on average
    assert scripts[0].sliced_wasserstein(data, shifted, 4096) == pytest.approx(3, rel=0.05)
    mixture = scripts[1].Mixture.draw(scripts[0].SMALL, 0)
    drawn = mixture.sample(4096, torch.Generator().manual_seed(0))
    assert scripts[0].mode_distance(drawn, mixture) == pytest.approx(1, rel=0.03)
