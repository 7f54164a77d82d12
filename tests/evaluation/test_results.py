"""Numbers in the README, the documentation and the model card are those of the committed tables."""

import json
from pathlib import Path

import pytest

from rectified_diffusers.evaluation.report import Evaluation, Row
from rectified_diffusers.evaluation.tables import ratios
from tests import emoji

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "src" / "rectified_diffusers" / "assets" / "emoji-one-step"
TABLES = (
    "emoji_one_step",
    "emoji_table",
    "emoji_initialisation",
    "emoji_second_teacher",
    "emoji_bundled",
    "emoji_other_images",
    "emoji_inception",
    "emoji_few_steps",
    "emoji_finish",
    "emoji_finish_seeds",
    "emoji_finish_long",
    "ablation_distillation",
)
PARTS = ("seen", "held_out")
BEFORE = "distilled: work/one_step/finished"  # the bundled model of 0.2.0, before its last stages
ROWS = {  # first cell of a row in the README and in docs/papers.md, and the row's name in the results
    "diffusion teacher": "diffusion teacher",
    "teacher": "diffusion teacher",
    "2-RF": "2-RF",
    "distilled, L2, then LPIPS": "distilled: work/one_step/one-step-lpips",
    "then distribution matching, with real images": BEFORE,
    "the bundled model": "distilled: work/bundled",
    "the bundled model of 0.2.0": "distilled: work/before",
    "the same, with the new decoder": "distilled: work/before-with-decoder",
}
TRIALS = (  # the rows of the table of trials in docs/papers.md: file of results, and the row's name in it
    ("ablation_distillation", "base: 2-RF + distillation"),
    ("ablation_distillation", "distillation triplets: the teacher's, as for reflow"),
    ("ablation_distillation", "lengths of L2 and LPIPS: L2 to the end"),
    ("ablation_distillation", "lengths of L2 and LPIPS: LPIPS from the start"),
    ("emoji_finish", "as it is"),
    ("emoji_finish", "matching, real pictures x10"),
    ("emoji_finish", "matching, real pictures x100, discriminator x10"),
    ("emoji_finish", "matching, real pictures x1000, discriminator x100"),
    ("emoji_finish", "matching, real pictures x1000, discriminator x100, regression x4"),
    ("emoji_finish_long", "matching, real pictures x100, discriminator x10"),
    ("emoji_finish_seeds", "as it is"),
    ("emoji_finish_seeds", "matching, real pictures x1000, discriminator x100"),
    ("emoji_finish_seeds", "matching, real pictures x1000, discriminator x100, regression x4"),
)
README = {  # heading of a column, the metric's key and format
    "kernel distance": ("kernel_distance_seen", ".4f"),
    "Fréchet distance": ("frechet_distance_seen", ".1f"),
    "R-precision": ("alignment_seen", ".3f"),
    "diversity": ("diversity", ".3f"),
}


def report_of(name: str) -> Evaluation:
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for part in ("made", "costs", "budget"):  # of the benchmark that wrote it
        content.pop(part, None)
    return Evaluation.of(content)


def table_after(path: str, start: str) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows, without emphasis, of the table that begins with the line `start`."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    first = lines.index(start)
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("*") for cell in line.strip().strip("|").split("|")])
    return rows[0], rows[2:]


def named(report: Evaluation, name: str) -> Row:
    (row,) = [row for row in report.rows if row.name == name]
    return row


def row_of(report: Evaluation, name: str, steps: str) -> Row:
    return next(row for row in report.rows if (row.name, row.steps) == (ROWS[name], int(steps)))


@pytest.mark.parametrize("name", TABLES)
def test_a_committed_table_is_that_of_its_json(name):
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert report_of(name).as_markdown().strip() in text


def test_the_table_of_the_readme():
    report = report_of("emoji_bundled")
    start = "| | steps | s / image | kernel distance | Fréchet distance | R-precision | diversity |"
    heads, rows = table_after("README.md", start)
    assert len(rows) == len(report.rows) - 2 + 1  # without two steps of the models before, and with the floor
    for cells in rows:
        found = dict(zip(heads, cells, strict=True))
        is_floor = found[""].startswith("floor: ")
        row = None if is_floor else row_of(report, found[""], found["steps"])
        figures = report.real if row is None else row.figures
        assert found["s / image"] == ("" if row is None else f"{row.seconds_per_image:.3f}")
        for head, (key, spec) in README.items():
            assert found[head] == f"{figures[key].mean:{spec}}", (cells[0], head)


def test_the_ratios_of_the_readme():
    report = report_of("emoji_bundled")
    of_steps = [ratios(report, row_of(report, "the bundled model", steps)) for steps in ("1", "2")]
    head = "| bundled model / teacher | 1 step, seen captions | held-out captions | 2 steps, seen captions "
    _, rows = table_after("README.md", head + "| held-out captions |")
    keys = {"kernel distance": "kernel_distance", "R-precision": "alignment"}
    for name, *cells in rows:
        key, which = ("frechet_distance", 1) if name.startswith("Fréchet") else (keys.get(name, name), 0)
        parts = [f"{key}_{part}" for part in PARTS] if key != "diversity" else [key, ""]
        assert cells == [f"{found[part][which]:.2f}" if part else "" for found in of_steps for part in parts], name


def test_the_model_before_has_the_metrics_that_it_had():
    again, before = report_of("emoji_bundled"), report_of("emoji_one_step")
    row = next(row for row in before.rows if row.name == BEFORE)
    assert again.settings["features"] == before.settings["features"]
    measured = next(row for row in again.rows if row.name == "distilled: work/before" and row.steps == 1)
    for found, expected in ((measured.figures, row.figures), (again.real, before.real)):
        for key, figure in expected.items():
            assert found[key].mean == pytest.approx(figure.mean, rel=1e-4), key
            assert found[key].over_images is not None


def test_the_held_out_captions_of_the_readme():
    figures = row_of(report_of("emoji_bundled"), "the bundled model", "1").figures
    known, new = (f"{figures[f'alignment_held_out_{words}']:.3f}" for words in ("known", "new"))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    sentence = (
        f"the R-precision of the bundled model is {known} if all words of the caption occur in training, and {new} if"
    )
    assert sentence in text


def test_the_table_and_the_ratios_of_the_papers_page():
    report = report_of("emoji_one_step")
    start = "| | steps | kernel distance, seen | held out | Fréchet distance, seen | held out "
    start += "| R-precision, seen | held out | diversity |"
    _, rows = table_after("docs/papers.md", start)
    keys = [f"{name}_{part}" for name in ("kernel_distance", "frechet_distance", "alignment") for part in PARTS]
    specs = [".4f"] * 2 + [".1f"] * 2 + [".3f"] * 3
    for name, steps, *cells in rows:
        figures = report.real if name.startswith("real") else row_of(report, name, steps).figures
        assert cells == [f"{figures[key].mean:{spec}}" for key, spec in zip([*keys, "diversity"], specs, strict=True)]
    bundled = ratios(report, next(row for row in report.rows if row.name == BEFORE))
    plain = {key: f"{both[0]:.2f}" for key, both in bundled.items()}
    corrected = {key: f"{both[1]:.2f}" for key, both in bundled.items() if both[1]}
    text = " ".join((ROOT / "docs" / "papers.md").read_text(encoding="utf-8").split())
    for sentence in (
        f"has {plain['kernel_distance_seen']} of the kernel distance, {plain['alignment_seen']} of the R-precision "
        f"and {plain['diversity']} of the diversity; on held-out captions, {plain['kernel_distance_held_out']} of the "
        f"kernel distance and {plain['alignment_held_out']} of the R-precision",
        f"The ratio of the Fréchet distances, {plain['frechet_distance_seen']}, flatters it",
        f"less the floor it is {corrected['frechet_distance_seen']}, and {corrected['frechet_distance_held_out']} on "
        "held-out captions",
    ):
        assert sentence in text
    second = report_of("emoji_second_teacher")
    lpips = ratios(second, next(row for row in second.rows if row.name.endswith("one-step-lpips")))
    kernel, precision = (f"{lpips[key][0]:.2f}" for key in ("kernel_distance_seen", "alignment_seen"))
    assert f"the kernel distance was {kernel} and the R-precision {precision} of the teacher's" in text


def test_the_table_of_the_bundled_model():
    report = report_of("emoji_bundled")
    head = "| | steps | kernel distance, seen | held out | R-precision, seen | held out | diversity |"
    _, rows = table_after("docs/papers.md", head)
    assert len(rows) == len(report.rows) - 1 + 1  # without two steps and the earlier decoder, and with the floor
    keys = [f"{name}_{part}" for name in ("kernel_distance", "alignment") for part in PARTS]
    for name, steps, *cells in rows:
        figures = report.real if name.startswith("real") else row_of(report, name, steps).figures
        specs = zip([*keys, "diversity"], [".4f"] * 2 + [".3f"] * 3, strict=True)
        assert cells == [f"{figures[key].mean:{spec}}" for key, spec in specs], (name, steps)
    before, after = (row.figures for row in report_of("emoji_inception").rows)
    kernel, frechet = "kernel_distance_seen", "frechet_distance_seen"
    sentence = f"{before[kernel]:.4f} and {after[kernel]:.4f}, the Fréchet distances {before[frechet]:.1f} and "
    others = [row.figures for row in report_of("emoji_other_images").rows if row.steps == 1]
    text = " ".join((ROOT / "docs" / "papers.md").read_text(encoding="utf-8").split())
    assert f"{sentence}{after[frechet]:.1f} (" in text
    seen, held_out, precision, diversity = (
        " to ".join(f"{figures[key]:{spec}}" for figures in others)
        for key, spec in (
            ("kernel_distance_seen", ".4f"),
            ("kernel_distance_held_out", ".4f"),
            ("alignment_seen", ".3f"),
            ("diversity", ".3f"),
        )
    )
    rises = f"the R-precision rises from {precision}, and the diversity from {diversity} ("
    assert f"falls from {seen}, held out from {held_out}; {rises}" in text


def test_the_table_of_few_steps():
    report = report_of("emoji_few_steps")
    head = "| | steps | kernel distance, seen | divided by that of one step | held out | divided by that of one step |"
    _, rows = table_after("docs/papers.md", head)
    assert len(rows) == len(report.rows)
    for cells, row in zip(rows, report.rows, strict=True):
        divided, expected = ratios(report, row), [row.name, str(row.steps)]
        for key in ("kernel_distance_seen", "kernel_distance_held_out"):
            expected += [f"{row.figures[key]:.4f}", f"{divided[key][0]:.2f}" if row.steps > 1 else ""]
        assert cells == expected


def test_the_table_of_trials():
    head = (
        "| training | updates | network evaluations | seeds | kernel distance, seen | held out | R-precision, seen | "
    )
    _, rows = table_after("docs/papers.md", f"{head}diversity |")
    assert len(rows) == len(TRIALS)
    specs = [(f"kernel_distance_{part}", ".4f") for part in PARTS] + [("alignment_seen", ".3f"), ("diversity", ".3f")]
    for (_, *cells), (file, name) in zip(rows, TRIALS, strict=True):
        report = report_of(file)
        row = named(report, name)
        costs = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))["costs"]
        (cost,) = [cost for cost in costs if cost["name"] == name]
        evaluations = cost["evaluations"] + cost["evaluations for triplets"]
        updates = " + ".join(map(str, cost["optimizer_steps"])) or "0"
        expected = [updates, f"{evaluations:,}", str(len(report.settings["seeds"]))]
        assert cells == expected + [f"{row.figures[key]:{spec}}" for key, spec in specs], name


def test_what_the_trials_say():
    """The ratios that the text below the table repeats, as they are in the tables of results."""
    text = " ".join((ROOT / "docs" / "papers.md").read_text(encoding="utf-8").split())
    text = text.partition("### What was tried for the bundled model")[2]

    def ratio(file: str, name: str, key: str = "kernel_distance_seen") -> str:
        report = report_of(file)
        found = ratios(report, named(report, name))[key][0]
        assert found is not None
        return f"{found:.2f}" + (f" (trainings ± {found.half_width:.2f})" if found.half_width is not None else "")

    teachers = [
        row_of(report_of(name), "teacher", "25").figures for name in ("emoji_second_teacher", "emoji_one_step")
    ]
    seen, held_out, precision, diversity = (
        " to ".join(f"{figures[key].mean:{spec}}" for figures in teachers)
        for key, spec in [(f"kernel_distance_{part}", ".4f") for part in PARTS]
        + [("alignment_seen", ".3f"), ("diversity", ".3f")]
    )
    rises = f"the R-precision rises from {precision}, and the diversity falls from {diversity} ("
    assert f"falls from {seen}, held out from {held_out}, {rises}" in text
    reused, l2, lpips = (ratio("ablation_distillation", name) for _, name in TRIALS[1:4])
    assert f"teacher's triplets gives {reused} of the kernel distance" in text
    assert f"L2 only has {l2} of the kernel distance of L2 and then LPIPS, LPIPS only {lpips}." in text
    plain, regression = (ratio("emoji_finish_seeds", name) for _, name in TRIALS[-2:])
    assert f"the kernel distance is {plain.replace(' (', ' of the model before (')}, because" in text
    held_out = ratio("emoji_finish_seeds", TRIALS[-1][1], "kernel_distance_held_out")
    assert f"it is {regression}, and {held_out} on held-out captions" in text
    keys = ("kernel_distance_seen", "kernel_distance_held_out", "diversity")
    seen, held_out, diversity = (ratio(*TRIALS[9], key) for key in keys)
    assert (
        f"is {seen} of the model before, and {held_out} on held-out captions, but the diversity is {diversity}."
        in text
    )


def test_the_other_pages_repeat_numbers_of_the_tables():
    report = report_of("emoji_bundled")
    bundled = ratios(report, row_of(report, "the bundled model", "1"))["frechet_distance_seen"]
    text = " ".join((ROOT / "docs" / "how_to" / "evaluate.md").read_text(encoding="utf-8").split())
    assert f"the plain ratio is {bundled[0]:.2f}, and {bundled[1]:.2f} less the floor" in text
    second = report_of("emoji_second_teacher")
    row = next(row for row in second.rows if row.name.endswith("one-step-lpips"))
    found = [row.figures[key].mean for key in ("kernel_distance_seen", "alignment_seen")]
    text = (ROOT / "examples" / "emoji" / "README.md").read_text(encoding="utf-8")
    assert f"an hour in all: kernel distance {found[0]:.4f}, R-precision {found[1]:.3f}\n" in text


@pytest.mark.parametrize(("template", "card"), [("CARD", ASSETS), ("TEACHER_CARD", emoji.FOLDER / "teacher")])
def test_the_cards_are_written_by_the_script(template, card, monkeypatch):
    """Paragraphs into which nothing is inserted."""
    with emoji.example("bundle.py", monkeypatch) as load:
        paragraphs = load(name="bundle")[template].split("\n\n")
    text = (card / "README.md").read_text(encoding="utf-8")
    missing = [paragraph for paragraph in paragraphs if "{" not in paragraph and paragraph not in text]
    assert len(paragraphs) > 3
    assert not missing


def test_the_card_of_the_bundled_model_has_the_committed_table():
    card = (ASSETS / "README.md").read_text("utf-8")
    assert report_of("emoji_bundled").as_markdown().strip() in card
    assert "| diversity |" in card
