"""The report of a run: what it says, that it is one file, and that equal runs have equal reports."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from rectified_diffusers.evaluation.straightness import Straightness
from rectified_diffusers.training.report import MAX_SHEETS, plot_curve, write_report
from tests.training.helpers import make_trainer

pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_run(folder: Path, steps: int = 60, sheets: int = 3, **columns: float) -> Path:
    (folder / "validation").mkdir(parents=True)
    lines = [
        {"step": i, "loss": 1 / i, "grad_norm": 2.0, "learning_rate": 1e-4, **columns} for i in range(1, steps + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in range(sheets):
        Image.new("RGB", (64, 32), (i, 0, 0)).save(folder / "validation" / f"step-{10 * (i + 1):08d}.png")
    record = {"steps": steps, "trainer": "ReflowTrainer", "dataset_rows": 1234, "batch_size": 8, "loss": "l2"}
    (folder / "training.json").write_text(json.dumps(record))
    return folder


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_it_shows_curves_pictures_and_options(tmp_path):
    page = read(write_report(make_run(tmp_path / "run"), ["a <red> apple", "the sea"]))
    for words in (
        "ReflowTrainer, 60 steps",
        "Loss",
        "Gradient norm",
        "Learning rate",
        "Options",
        "a <red> apple",
        "step 30",
    ):
        assert words in page.text
    for number in ("0.01667 at step 60", "1,234"):
        assert number in page.text
    assert len(page.all("svg")) == 3
    assert len(page.all("img")) == 3
    assert "Straightness" not in page.text


def test_it_needs_no_other_file(tmp_path):
    page = read(write_report(make_run(tmp_path / "run")))
    addresses = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert addresses
    assert all(str(address).startswith("data:image/jpeg;base64,") for address in addresses)
    assert "http" not in (tmp_path / "run" / "report.html").read_text()


def test_straightness_is_shown_where_it_is_known(tmp_path):
    run = make_run(tmp_path / "run", straightness=0.2)
    measured = Straightness(0.125, (0.1, 0.15), (0.0, 0.5, 1.0), 32)
    page = read(write_report(run, straightness=measured))
    assert len(page.all("svg")) == 5
    assert "this model: S = 0.125" in page.text
    assert "S(Z) of 32 paths" in page.text


def test_of_many_sheets_some_are_shown_among_them_the_first_and_the_last(tmp_path):
    page = read(write_report(make_run(tmp_path / "run", sheets=3 * MAX_SHEETS)))
    assert len(page.all("img")) == MAX_SHEETS
    assert page.all("img")[0]["alt"] == "step 10"
    assert page.all("img")[-1]["alt"] == f"step {30 * MAX_SHEETS}"
    assert f"{MAX_SHEETS} of {3 * MAX_SHEETS} sheets" in page.text


def test_a_run_in_progress_has_one_too(tmp_path):
    run = make_run(tmp_path / "run", sheets=0)
    (run / "training.json").unlink()
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 61, "los')
    page = read(write_report(run))
    assert "not finished" in page.text
    assert "Validation" not in page.text


def test_a_loss_that_is_not_a_number_leaves_a_gap(tmp_path):
    run = make_run(tmp_path / "run", grad_norm=math.inf)
    assert len(read(write_report(run)).all("svg")) == 2


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"holds no log\.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("points", "scale"),
    [
        ([(0, 0), (100, 1)], "linear"),
        ([(0, 1e-5), (20_000, 1e-1)], "log"),
        ([(1, 3.0), (2, 3.0)], "linear"),
        ([(7, 0.0)], "linear"),
        ([(0, 2e-6), (1, 8e-6)], "linear"),
        ([(0, -1e-5), (1, 1e-1)], "linear"),
    ],
    ids=["plain", "logarithmic", "flat", "one_point", "small", "negative"],
)
def test_a_curve_stays_inside_its_frame(points, scale):
    (axis,) = plot_curve(points).axes
    (line,) = axis.get_lines()
    assert [tuple(point) for point in line.get_xydata()] == points
    assert axis.get_yscale() == scale
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    assert all(left <= x <= right and low <= y <= high for x, y in points)
    assert line.get_marker() == "o"


def test_a_long_noisy_curve_has_its_mean_above_it():
    points = [(float(i), float(i % 2)) for i in range(100)]
    raw, smooth = plot_curve(points).axes[0].get_lines()
    assert raw.get_alpha() < 1
    assert list(raw.get_ydata()) == [y for _, y in points]
    heights = smooth.get_ydata()
    assert max(heights[5:-5]) - min(heights[5:-5]) < 0.3
    assert heights[0] == pytest.approx(1 / 3)  # the mean of the first three values
    assert len(plot_curve(points, noisy=False).axes[0].get_lines()) == 1


def test_without_matplotlib_the_report_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = read(write_report(make_run(tmp_path / "run"), ["a cat"]))
    assert page.text.count('pip install "rectified_diffusers[evaluation]"') == 1
    assert not page.all("svg")
    assert len(page.all("img")) == 3
    assert "0.01667 at step 60" in page.text


def test_charts_have_the_colors_of_the_page_which_may_be_dark(tmp_path):
    text = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    charts = text[text.index("<svg") : text.rindex("</svg>")]
    assert not [color for color in re.findall(r"#[0-9a-f]{6}\b", charts) if color != "#000000"]
    for name in ("soft", "line", "curve"):
        assert f"var(--{name})" in charts


def test_a_trainer_leaves_a_report(dataset, output_dir, tmp_path):
    options = {"validate_every_steps": 3, "validation_prompts": ("a cat",)}
    make_trainer("distill", dataset, output_dir, **options).train()
    page = read(output_dir / "report.html")
    assert "DistillTrainer, 6 steps" in page.text
    assert "a cat" in page.text
    assert len(page.all("img")) == 2
    make_trainer("distill", dataset, tmp_path / "again", **options).train()
    assert (output_dir / "report.html").read_bytes() == (tmp_path / "again" / "report.html").read_bytes()


def test_a_run_too_short_for_a_line_of_the_log_has_one_as_well(dataset, output_dir):
    make_trainer("distill", dataset, output_dir, log_every_steps=100).train()
    assert "DistillTrainer, 6 steps" in read(output_dir / "report.html").text
