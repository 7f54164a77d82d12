"""The report of a run: what it says, that it is one file, and that equal runs have equal reports."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from rectified_diffusers.evaluation.straightness import Straightness
from rectified_diffusers.training.report import MAX_SHEETS, bars, curve, write_report
from tests.training.helpers import make_trainer


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
    for words in ("ReflowTrainer, 60 steps", "Loss", "Gradient norm", "Learning rate", "a <red> apple", "step 30"):
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
    assert len(page.all("rect")) == 2
    assert "0.125" in page.text
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
    ("points", "ticks"),
    [
        ([(0, 0), (100, 1)], ["0", "0.2", "0.4", "0.6", "0.8", "1", "20", "100"]),
        ([(0, 1e-5), (20_000, 1e-1)], ["1e-5", "0.1", "20k", "5k"]),
        ([(1, 3.0), (2, 3.0)], ["3", "1.2"]),
        ([(7, 0.0)], ["0"]),
        ([(0, 2e-6), (1, 8e-6)], ["2e-6", "8e-6"]),
    ],
    ids=["plain", "logarithmic", "flat", "one_point", "small"],
)
def test_a_curve_stays_inside_its_frame_and_has_round_marks(points, ticks):
    svg = curve("a curve", points)
    page = Page(svg)
    (line,) = page.all("polyline")
    drawn = [tuple(map(float, pair.split(","))) for pair in str(line["points"]).split()]
    assert len(drawn) == len(points)
    assert all(0 <= x <= 560 and 0 <= y <= 240 for x, y in drawn)
    for tick in ticks:
        assert f">{tick}</text>" in svg


def test_a_long_noisy_curve_has_its_mean_above_it():
    points = [(float(i), float(i % 2)) for i in range(100)]
    raw, smooth = Page(curve("a curve", points)).all("polyline")
    heights = [float(pair.split(",")[1]) for pair in str(smooth["points"]).split()]
    assert raw["class"] == "raw"
    assert max(heights[5:-5]) - min(heights[5:-5]) < 60  # of 198 pixels between 0 and 1
    assert len(Page(curve("a curve", points, noisy=False)).all("polyline")) == 1


def test_bars_stand_on_zero():
    page = Page(bars("bars", [1.0, 0.0, 0.5], [0.0, 0.25, 0.5, 1.0]))
    heights = [float(str(rectangle["height"])) for rectangle in page.all("rect")]
    assert heights == [198.0, 0.0, 99.0]


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
